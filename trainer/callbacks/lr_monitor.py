"""Shows the learning rate of a row's step under the plain name `lr`.

The training step records the rate of its very update, and every row has it as `lr_single`, by the naming of log modes.
This part repeats that number; it asks no schedule, which could only be wrong by a step.
"""

from typing import Literal

from .base import NOTHING, Answer, Callback, CallbackPartConfig, Moment


class LRMonitorConfig(CallbackPartConfig):
    """Nothing to choose."""

    kind: Literal["lr"] = "lr"

    def build(self) -> "LRMonitor":
        """The callback."""
        return LRMonitor()


class LRMonitor(Callback):
    """Adds `lr` to each row that has `lr_single`; a training step of the user's own that records none gets none."""

    def on_row(self, moment: Moment) -> Answer:
        """`lr_single` once more, as `lr`."""
        return Answer(values={"lr": moment.values["lr_single"]}) if "lr_single" in moment.values else NOTHING
