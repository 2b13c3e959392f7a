"""Asks for commits: at multiples of a number of steps, after validations, or both.

The trainer does the saving and the retention; this part only says when. What stays and which step is the best is said by the
run's own `checkpoint` in the pipeline, and for `train_model`, which has no such config, by `keep`. When commits happen never
changes what is trained.
"""

from typing import Literal, Self

from pydantic import Field, model_validator

from ..retention import CheckpointConfig
from .base import NOTHING, Answer, Callback, CallbackPartConfig, Moment


class CheckpointCallbackConfig(CallbackPartConfig):
    """When to ask for a commit."""

    kind: Literal["checkpoint"] = "checkpoint"
    every_n_steps: int | None = Field(None, ge=1)  # at its multiples; None: off
    after_validation: bool = True
    keep: CheckpointConfig = CheckpointConfig()  # train_model: which checkpoints stay, and what makes one the best

    @model_validator(mode="after")
    def _ever(self) -> Self:
        if self.every_n_steps is None and not self.after_validation:
            raise ValueError("this checkpoint callback never saves; set every_n_steps or after_validation, or leave the callback out")
        return self

    def build(self) -> "CheckpointCallback":
        """The callback."""
        return CheckpointCallback(self)


class CheckpointCallback(Callback):
    """Has no state: its answer is a function of the step."""

    def __init__(self, config: CheckpointCallbackConfig):
        self.config = config

    def wants(self, step: int) -> bool:
        """A step can only be saved once it is finished."""
        every = self.config.every_n_steps
        return every is not None and step % every == 0

    def grid(self) -> int | None:
        """All steps to save at."""
        return self.config.every_n_steps

    def on_training_step(self, moment: Moment) -> Answer:
        """Save at the multiples of `every_n_steps`."""
        return Answer(save=True) if self.wants(moment.step) else NOTHING

    def on_validation_epoch_end(self, moment: Moment) -> Answer:
        """Save once the validation's values are known."""
        return Answer(save=True) if self.config.after_validation else NOTHING
