"""An optimizer is an optax transformation and the schedule it reads; a config builds both."""

from typing import Any, NamedTuple

from ..config import PartConfig


class Optimizer(NamedTuple):
    """What `build` gives: `tx` (an optax.GradientTransformation) and `schedule` (update index from 0 -> learning rate)."""

    tx: Any
    schedule: Any


class OptimizerConfig(PartConfig):
    """Base of optimizer configs."""

    def build(self, *, num_steps: int) -> Optimizer:
        """The optimizer for a run of `num_steps` steps."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build its optimizer")
