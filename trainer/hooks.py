"""The moments of a training, as methods that a trainer of one's own may override: each tells the callbacks.

What an override adds to the values is logged with them; one that does not call its base keeps the callbacks in the dark.
"""

from typing import Any

from .audience import Audience


class Hooks:
    """The hooks of TrainerModule."""

    audience: Audience

    def on_training_start(self) -> None:
        """Before the first step."""
        self.audience.tell("on_training_start")

    def on_training_end(self) -> None:
        """After the last step."""
        self.audience.tell("on_training_end")

    def on_training_epoch_start(self, epoch_idx: int) -> None:
        """An epoch, counted from 1, begins."""
        self.audience.tell("on_training_epoch_start", epoch=epoch_idx)

    def on_training_epoch_end(self, train_metrics: dict[str, Any], epoch_idx: int) -> None:
        """An epoch ended with these values."""
        self.audience.tell("on_training_epoch_end", train_metrics, epoch=epoch_idx)

    def on_validation_epoch_start(self, epoch_idx: int, step_idx: int) -> None:
        """A validation begins."""
        self.audience.tell("on_validation_epoch_start", epoch=epoch_idx, step=step_idx)

    def on_validation_epoch_end(self, eval_metrics: dict[str, Any], epoch_idx: int, step_idx: int) -> None:
        """A validation ended with these values."""
        self.audience.tell("on_validation_epoch_end", eval_metrics, epoch=epoch_idx, step=step_idx)

    def on_test_epoch_start(self, epoch_idx: int) -> None:
        """A test begins."""
        self.audience.tell("on_test_epoch_start", epoch=epoch_idx)

    def on_test_epoch_end(self, test_metrics: dict[str, Any], epoch_idx: int) -> None:
        """A test ended with these values."""
        self.audience.tell("on_test_epoch_end", test_metrics, epoch=epoch_idx)
