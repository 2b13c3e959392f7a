"""Ends training once so many validations in a row were no better than the best one before them.

The decision is a pure function of the validation rows seen so far. They are the state, not a counter: a life that begins
anew, validates a step again or has another `patience` decides by the same rows.
"""

import math
from collections.abc import Iterable
from typing import Any, Literal

from pydantic import Field

from ..errors import ConfigError
from .base import NOTHING, Answer, Callback, CallbackPartConfig, Moment, float32


class EarlyStoppingConfig(CallbackPartConfig):
    """What has to become better, by how much and how soon."""

    kind: Literal["early_stopping"] = "early_stopping"
    monitor: str = Field("loss", min_length=1)  # a value of the validation rows
    mode: Literal["min", "max"] = "min"
    patience: int = Field(5, ge=1)  # validations
    min_delta: float = Field(0.0, ge=0, allow_inf_nan=False)  # better means better by more than this

    def build(self) -> "EarlyStopping":
        """The callback, with no row seen."""
        return EarlyStopping(self)


def num_since_best(values: Iterable[float], *, mode: Literal["min", "max"], min_delta: float) -> int:
    """How many of `values`, in their order, came after the last that was better than the best before it.

    Values that are not finite are never better; the first finite one is. With none, all count.
    """
    sign = 1 if mode == "min" else -1
    best, since = math.inf, 0
    for value in values:
        if math.isfinite(value) and sign * value < best - min_delta:
            best, since = sign * value, 0
        else:
            since += 1
    return since


class EarlyStopping(Callback):
    """Its state is {steps (int32), values (float32)} of the validations seen, ascending. Values are compared in float32."""

    def __init__(self, config: EarlyStoppingConfig):
        self.config = config
        self._rows: dict[int, float] = {}

    def on_training_start(self, moment: Moment) -> Answer:
        """Stop where the rows of earlier lives say so. Raises ConfigError for a monitor that no validation will have."""
        names = moment.info.get("eval_metrics")
        if names is not None:
            self._check(names)
        return self._decide()

    def on_validation_epoch_end(self, moment: Moment) -> Answer:
        """Stop once patience is at its end. Raises ConfigError where the monitor is no value of the row."""
        self._check(moment.values)
        earlier = {
            step: value for step, value in self._rows.items() if step < moment.step
        }  # after going back, what came later is not known
        self._rows = earlier | {moment.step: float32(moment.values[self.config.monitor])}
        return self._decide()

    def get_state(self) -> Any:
        """The rows seen."""
        import numpy as np

        if not self._rows:
            return None
        return {"steps": np.array(list(self._rows), np.int32), "values": np.array(list(self._rows.values()), np.float32)}

    def set_state(self, state: Any) -> None:
        """The rows seen, as `get_state` gave them."""
        import numpy as np

        steps, values = (np.asarray(state[key]).tolist() for key in ("steps", "values")) if state else ([], [])
        self._rows = dict(zip(steps, values, strict=True))

    def _check(self, names: Iterable[str]) -> None:
        if self.config.monitor not in names:
            raise ConfigError(
                f"early_stopping.monitor {self.config.monitor!r} is no value of a validation; choose one of {', '.join(sorted(names))}"
            )

    def _decide(self) -> Answer:
        c = self.config
        since = num_since_best(self._rows.values(), mode=c.mode, min_delta=c.min_delta)
        if since < c.patience:
            return NOTHING
        steps = list(self._rows)
        best = f"{self._rows[steps[-since - 1]]:.6g} at step {steps[-since - 1]}" if since < len(steps) else "none that was finite"
        by = f" by more than {c.min_delta:g}" if c.min_delta else ""
        return Answer(stop=f"{c.monitor} was not better{by} in {since} validations; the best is {best}")
