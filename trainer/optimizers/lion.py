"""Lion: the sign of an interpolated momentum, half of Adam's state."""

from typing import Any, Literal

from pydantic import Field

from .base import ChainConfig


class LionConfig(ChainConfig):
    """Chen et al. 2023 (arXiv 2302.06675, algorithm 2): sign(beta1 m + (1 - beta1) g), then m <- beta2 m + (1 - beta2) g.

    Every value moves by lr, so lr is 3 to 10 times smaller than AdamW's and the decay as many times larger (section 5).
    """

    kind: Literal["lion"] = "lion"
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.99, ge=0, lt=1)
    weight_decay: float = Field(0.1, ge=0)

    def transform(self) -> Any:
        """The sign."""
        import optax

        return optax.scale_by_lion(b1=self.beta1, b2=self.beta2)
