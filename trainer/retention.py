"""Which checkpoints of a run are kept, and which step is the best.

Both answers are pure functions of what is on record: the validation rows and the committed steps. Nothing is remembered
between calls, so a life that begins anew answers as the one before it did.
"""

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Annotated, Literal

from pydantic import Field, field_validator

from .config import Config
from .spacing import seconds_of


class CheckpointConfig(Config):
    """When checkpoints are committed and which of them stay."""

    # Commits within a chunk: at multiples of so many steps, after so long ("90s", "10m", "2h"), as often as it pays ("auto"); None: none.
    every: Annotated[int, Field(ge=1)] | str | None = None
    keep_latest: int = Field(3, ge=1)  # so many of the newest stay
    keep_every: int | None = Field(None, ge=1)  # steps; its multiples stay for good; None: off
    monitor: str = Field("loss", min_length=1)  # the value of the validation rows whose best step stays
    monitor_mode: Literal["min", "max"] = "min"
    # GB that damaged checkpoints and rolled-back futures may take before the oldest go: a small disk sets it, who looks into failures not.
    quota_gb: float | None = Field(None, ge=0)
    device_digest: Literal["sampled", "full", "off"] = "sampled"  # of the values on the devices, compared after a restore
    root: str | None = None  # None: in the run directory

    @field_validator("every")
    @classmethod
    def _spacing(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, str):
            seconds_of(value)
        return value

    @field_validator("root")
    @classmethod
    def _in_run_directory(cls, value: str | None) -> str | None:
        if value is not None:
            raise ValueError(f"checkpoints at {value!r} are not available yet; leave root null and publish copies instead")
        return value


def best_step(val_rows: Iterable[tuple[int, Mapping[str, float]]], config: CheckpointConfig) -> int | None:
    """The step with the best `config.monitor` among `val_rows` (step, values), None where no row has a finite one.

    Rows may come in any order; of equal values the earliest step is the best.
    """
    sign = 1 if config.monitor_mode == "min" else -1
    found = [(sign * v, step) for step, values in val_rows if (v := values.get(config.monitor)) is not None and math.isfinite(v)]
    return min(found)[1] if found else None


def steps_to_delete(
    steps: Sequence[int], *, best: int | None, unpublished: Collection[int], config: CheckpointConfig, reach: int = 0
) -> list[int]:
    """Those of the committed `steps` that nothing keeps, oldest first.

    Kept are the newest `config.keep_latest`, multiples of `config.keep_every`, `best`, all `unpublished`, and the
    newest that is `reach` steps behind the newest, for a rollback to go to. Deleting what is returned and asking again returns
    nothing.
    """
    ordered = sorted(set(steps))
    kept = {*ordered[-config.keep_latest :], *unpublished, best}
    kept.update([s for s in ordered if s <= ordered[-1] - reach][-1:])
    if config.keep_every is not None:
        kept.update(s for s in ordered if s % config.keep_every == 0)
    return [s for s in ordered if s not in kept]
