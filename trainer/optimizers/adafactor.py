"""Adafactor: a second moment kept as row and column means, and steps in proportion to the weights."""

from typing import Any, Literal

from pydantic import Field

from .base import ChainConfig


class AdafactorConfig(ChainConfig):
    """Shazeer and Stern 2018 (arXiv 1804.04235, algorithms 4 to 6), without first moment.

    beta2_t = 1 - t^-decay_exponent; the update is cut to root mean square `clip_update` and multiplied by
    max(eps_scale, RMS(x)), so lr is relative to the weights. With three and more dims the two largest are factored.
    """

    kind: Literal["adafactor"] = "adafactor"
    decay_exponent: float = Field(0.8, gt=0)
    clip_update: float | None = Field(1.0, gt=0)  # RMS of a parameter's update; None: off
    eps_grad: float = Field(1e-30, gt=0)  # added to squared gradients
    eps_scale: float = Field(1e-3, gt=0)  # least RMS that a parameter counts with, so that zeros can leave 0
    min_dim_size_to_factor: int = Field(128, ge=1)  # both dims at least this long; else the moment is kept whole

    def transform(self) -> Any:
        """Rescaling, clipping of the update, scaling by the parameter."""
        import optax

        parts = [
            optax.scale_by_factored_rms(
                decay_rate=self.decay_exponent, min_dim_size_to_factor=self.min_dim_size_to_factor, epsilon=self.eps_grad
            )
        ]
        if self.clip_update is not None:
            parts.append(optax.clip_by_block_rms(self.clip_update))
        return optax.chain(*parts, optax.scale_by_param_block_rms(self.eps_scale))
