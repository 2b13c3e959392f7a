"""The callbacks and loggers of a run in its directory: what they are told, and when.

A validation comes after the commit that it judges, so what it made callbacks decide is no part of that commit. A life that
restores it tells them of the validation's row again, which is all that they learnt then.
"""

from typing import Any

from .audience import Audience
from .follow import followers
from .module import TrainerModule
from .rows import find
from .rundir import EARLY_STOP, RunDir

EPOCH = 1  # a run of the pipeline counts steps, not epochs


class Onlookers(Audience):
    """Those of one life. They are told through the trainer's own hooks, which a subclass may override."""

    def __init__(self, trainer: TrainerModule, run_dir: RunDir):
        super().__init__(trainer)
        self.run_dir = run_dir
        self._began = self._told_of_end = False
        trainer.folder, trainer.audience = run_dir.path, self
        trainer.init_callbacks(trainer.trainer_config.callbacks)

    def begin(self, *, num_steps: int, loader: Any, eval_names: list[str]) -> None:
        """Start loggers and callbacks at the trainer's step, which is committed."""
        t, self._began = self.trainer, True  # from here on somebody may have opened what only `finalize` closes
        t.init_logger(t.trainer_config.logger)
        t.loggers = followers(t.loggers, self.run_dir)
        self.facts = {"eval_metrics": eval_names}
        t.log_training_info(None, num_steps, None, loader, None, None)
        t.on_training_start()
        self.take_save()  # it stands
        if row := find(self.run_dir.metrics, "val", t.global_step):
            self.evaluating("val", t.global_step)
            self.evaluated("val", t.global_step, row)

    def stepped(self) -> None:
        """A step was dispatched."""
        self.tell("on_training_step", epoch=EPOCH)

    def row(self, step: int, values: dict[str, Any]) -> None:
        """A logging window closed; callbacks may add to its values."""
        self.tell("on_row", values, epoch=EPOCH, step=step)

    def evaluating(self, split: str, step: int) -> None:
        """An evaluation begins."""
        if split == "val":
            self.trainer.on_validation_epoch_start(EPOCH, step)
        elif split == "test":
            self.trainer.on_test_epoch_start(EPOCH)

    def evaluated(self, split: str, step: int, values: dict[str, Any]) -> None:
        """An evaluation ended; callbacks may add to its values."""
        if split == "val":
            self.trainer.on_validation_epoch_end(values, EPOCH, step)
        elif split == "test":
            self.trainer.on_test_epoch_end(values, EPOCH)
        self.take_save()  # what is evaluated is committed: left for later, the wish would be granted at another step

    def feed(self, committed: int) -> None:
        """Give the loggers the rows of committed steps."""
        for logger in self.trainer.loggers:
            logger.give(committed)

    def ended_at(self, step: int, config_digest: str) -> bool:
        """Note in the event log that training ended here by their decision; False where that stands already."""
        told = {"step": step, "reason": self.stop_reason, "config_digest": config_digest}
        if any(e["event"] == EARLY_STOP and told.items() <= e.items() for e in self.run_dir.read_events()):
            return False
        self.run_dir.event(EARLY_STOP, **told)
        return True

    def conclude(self) -> None:
        """All is done."""
        if self._began:
            self.end_training()
        self.finalize("success")

    def finalize(self, status: str) -> None:
        """The end of this life, told once."""
        if self._began:
            self._began = False
            super().finalize(status)

    def end_training(self) -> None:
        """Training is over; told once."""
        if not self._told_of_end:
            self._told_of_end = True
            self.trainer.on_training_end()
