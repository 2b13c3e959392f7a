"""LAMB: Adam's direction, scaled per parameter to the length of its weights; for very large batches."""

from typing import Any, Literal

from pydantic import Field

from .adam import MomentsConfig


class LambConfig(MomentsConfig):
    """You et al. 2019 (arXiv 1904.00962, algorithm 2): x <- x - lr ||x|| / ||r + decay x|| (r + decay x), r from Adam.

    A "layer" is one parameter; the ratio is 1 where either norm is 0.
    """

    kind: Literal["lamb"] = "lamb"
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.01, ge=0)

    def rescale(self) -> Any:
        """The trust ratio; the paper takes the norm with the decay in it."""
        import optax

        return optax.scale_by_trust_ratio()
