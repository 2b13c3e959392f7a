"""Gradient descent with momentum; with decay it is SGDW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 1)."""

from typing import Any, Literal

from pydantic import Field

from .base import ChainConfig


class SGDConfig(ChainConfig):
    """Sutskever et al. 2013 (ICML, eq. 1 to 4) with the rate outside: b <- momentum b + g; the step is b, or g + momentum b."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(0.0, ge=0, lt=1)  # 0: the gradient itself, no state
    momentum_kind: Literal["heavy_ball", "nesterov"] = "heavy_ball"

    def transform(self) -> Any:
        """The trace of gradients."""
        import optax

        return optax.trace(self.momentum, nesterov=self.momentum_kind == "nesterov") if self.momentum else optax.identity()
