"""Rows to Weights & Biases, one W&B run for as long as no row has to be taken back.

What was sent stays sent. `wandb.json` keeps the W&B run's id and the last step sent: a life that starts there or later
continues that run; one that starts earlier begins a new run, whose config names its parent and the step it left it at.
The step is a value with which all others are plotted: W&B's own step counter drops rows of a step it has passed.

The package is an extra, imported when the logger is built. An offline run's files are in `wandb/`, one folder per life.
"""

import json
import logging
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import ConfigError, StorageError
from ..files import fsync, walk, write_atomic
from ..rundir import read_lines
from .base import Gate, LoggerPartConfig

log = logging.getLogger(__name__)


class WandbLoggerConfig(LoggerPartConfig):
    """Where on W&B the run is shown. The key is W&B's own affair (`wandb login`, WANDB_API_KEY), never the config's."""

    kind: Literal["wandb"] = "wandb"
    project: str = "everstep"
    entity: str | None = None  # user or team; None: the default of the account
    name: str | None = None  # None: W&B makes one up
    group: str | None = None
    tags: tuple[str, ...] = ()
    mode: Literal["online", "offline", "disabled"] = "offline"  # offline: send later by `wandb sync`; disabled: nothing is kept

    def build(self, folder: Path) -> "WandbLogger":
        """The logger that keeps its files in `folder`. Raises ConfigError if the package is not there."""
        return WandbLogger(self, folder, _import_wandb())


def _import_wandb() -> Any:
    try:
        import wandb
    except ImportError as e:
        raise ConfigError(f"logger 'wandb' needs a package that is not there ({e}); pip install everstep[wandb], or remove it") from e
    return wandb


@dataclass(frozen=True)
class Sent:
    """What W&B has: a run, the last step sent to it, and where it came from."""

    id: str
    step: int
    parent: str | None = None
    parent_step: int | None = None


class WandbLogger:
    """`wandb` is the package, or what behaves like it."""

    def __init__(self, config: WandbLoggerConfig, folder: Path, wandb: Any):
        self.config = config
        self.folder = folder
        self.wandb = wandb
        self.path = folder / "wandb.json"
        self.gate = Gate("wandb")
        self.sent: Sent | None = None
        self.run: Any = None

    def start(self, step: int, info: Mapping[str, Any]) -> None:
        """Continue the W&B run of the last life, or begin one. Raises ConfigError or StorageError if W&B does not let us."""
        sent = next((Sent(**record) for record in read_lines(self.path)), None)
        if sent is None:
            sent = Sent(id=secrets.token_hex(8), step=step)
        elif step < sent.step:
            sent = Sent(id=secrets.token_hex(8), step=step, parent=sent.id, parent_step=step)
        self._finish(0)
        self._keep(sent)  # before there is a run on W&B: a start that fails there is tried again with the same id
        self.run = self._init(sent)
        origin = {"parent": sent.parent, "parent_step": sent.parent_step} if sent.parent else {}
        self.run.config.update({**info, **origin}, allow_val_change=True)  # a later life may have another mesh
        place = self.run.url if self.config.mode == "online" else self.config.mode
        log.info("opened W&B run %s of project %s: %s", sent.id, self.config.project, place)
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")
        self.gate.open()

    def row(self, split: str, step: int, values: Mapping[str, Any]) -> None:
        """Send the row; None is left out."""
        self.gate.check(split, step)
        assert self.sent
        if step > self.sent.step:
            self._keep(replace(self.sent, step=step))  # before it is sent: a needless new run is better than a row twice
        self.run.log({"step": step, **{f"{split}/{name}": value for name, value in values.items() if value is not None}})

    def finalize(self, status: str) -> None:
        """Send, or bring to the disk, what is left; the W&B run's summary tells the status."""
        if self.gate.close(status):
            self.run.summary.update({"status": status})
            self._finish(0 if status == "success" else 1)
            for file in walk(self.folder / "wandb"):
                if not file.is_symlink():
                    fsync(file)

    def _init(self, sent: Sent) -> Any:
        try:
            return self.wandb.init(
                project=self.config.project,
                entity=self.config.entity,
                name=self.config.name,
                group=self.config.group,
                tags=list(self.config.tags),
                mode=self.config.mode,
                id=sent.id,
                resume="allow",
                reinit="create_new",  # a run that the host program has open stays open
                dir=str(self.folder),
                settings=self.wandb.Settings(console="off", quiet=True),  # the host's output is not ours to catch, or to fill
            )
        except self.wandb.UsageError as e:
            raise ConfigError(f"W&B refused project {self.config.project!r}: {e}; run `wandb login`, or set mode=offline") from e
        except self.wandb.Error as e:
            raise StorageError(f"W&B run {sent.id} of project {self.config.project!r} was not opened: {e}; or set mode=offline") from e

    def _keep(self, sent: Sent) -> None:
        write_atomic(self.path, json.dumps(asdict(sent)).encode() + b"\n")
        self.sent = sent

    def _finish(self, exit_code: int) -> None:
        if self.run is not None:
            self.run.finish(exit_code=exit_code)
            self.run = None
