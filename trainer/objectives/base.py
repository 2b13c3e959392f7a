"""An objective turns a model's outputs on a batch into a loss and metrics."""

from typing import Any, Protocol

from ..config import PartConfig


class Objective(Protocol):
    """What is minimised. Pure; called under jit."""

    def inputs(self, batch: Any) -> Any:
        """What of a batch the model gets."""

    def loss(self, params: Any, apply_fn: Any, batch: Any, rng: Any, train: bool) -> tuple[Any, tuple[dict, dict]]:
        """`(loss, (metrics, mutable))`; the loss is a scalar mean, or a pair (sum, weight) of scalars."""


class ObjectiveConfig(PartConfig):
    """Base of objective configs."""

    def build(self) -> Objective:
        """The objective this config describes."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build its objective")
