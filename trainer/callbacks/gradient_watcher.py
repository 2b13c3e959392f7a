"""Warns when the gradient is much larger than it used to be, which often comes before a loss that does not recover.

What it used to be is the median of the last rows: one outlier does not move it, so the next one is noticed too.
"""

import logging
import math
import statistics
from typing import Any, Literal

from pydantic import Field

from ..errors import ConfigError
from .base import NOTHING, Answer, Callback, CallbackPartConfig, Moment, float32

log = logging.getLogger(__name__)
# As a row names it, by the log modes of the run; where there are several, the mean of the window is the steadiest.
NAMES = ("grad_norm_mean", "grad_norm", "grad_norm_single", "grad_norm_max")


class GradientWatcherConfig(CallbackPartConfig):
    """How much is much, compared with how many rows."""

    kind: Literal["gradient_watcher"] = "gradient_watcher"
    factor: float = Field(3.0, gt=1)
    window: int = Field(20, ge=2)  # rows

    def build(self) -> "GradientWatcher":
        """The callback, with no row seen."""
        return GradientWatcher(self)


class GradientWatcher(Callback):
    """Silent until it has seen `window` rows, and for the rest of a window after each warning.

    Its state is {norms (float32) of the last rows, quiet_rows (int32) still to come}. Norms that are not finite are warned of,
    but are no part of what it compares with.
    """

    def __init__(self, config: GradientWatcherConfig):
        self.config = config
        self._norms: list[float] = []
        self._quiet_rows = 0

    def on_row(self, moment: Moment) -> Answer:
        """Compare the row's norm with those before it. Raises ConfigError where the row has none."""
        name = next((n for n in NAMES if n in moment.values), None)
        if name is None:
            raise ConfigError(
                f"the row of step {moment.step} has none of {', '.join(NAMES)}; "
                "set trainer.log_grad_norm=true, or leave the gradient_watcher out"
            )
        norm, window = float32(moment.values[name]), self.config.window
        if self._quiet_rows:
            self._quiet_rows -= 1
        elif len(self._norms) == window:
            usual = statistics.median(self._norms)
            if not norm <= self.config.factor * usual:  # so that NaN is warned of
                log.warning("gradient norm %.4g at step %d, over %g times the usual %.4g", norm, moment.step, self.config.factor, usual)
                self._quiet_rows = window - 1
        if math.isfinite(norm):
            self._norms = [*self._norms, norm][-window:]
        return NOTHING

    def get_state(self) -> Any:
        """The last norms, and for how long to be silent."""
        import numpy as np

        if not self._norms:
            return None
        return {"norms": np.array(self._norms, np.float32), "quiet_rows": np.asarray(self._quiet_rows, np.int32)}

    def set_state(self, state: Any) -> None:
        """Go on from what `get_state` gave; of a longer window the newest norms count."""
        import numpy as np

        self._norms = np.asarray(state["norms"]).tolist()[-self.config.window :] if state else []
        self._quiet_rows = int(state["quiet_rows"]) if state else 0
