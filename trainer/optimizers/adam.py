"""Adam and its relatives. They differ in what they make of two running moments of the gradient; decay is decoupled in all."""

from typing import Any, Literal

from pydantic import Field

from .base import ChainConfig


class MomentsConfig(ChainConfig):
    """All that keep m <- beta1 m + (1 - beta1) g and a second moment; Adam's own transform unless they say otherwise."""

    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)

    def transform(self) -> Any:
        """Adam's rescaling."""
        import optax

        return optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps)


class AdamConfig(MomentsConfig):
    """Kingma and Ba 2014 (arXiv 1412.6980, algorithm 1): m^ / (sqrt(v^) + eps), both moments corrected for their start at 0."""

    kind: Literal["adam"] = "adam"


class AdamWConfig(MomentsConfig):
    """Loshchilov and Hutter 2017 (arXiv 1711.05101, algorithm 2): Adam with decoupled decay; defaults for language models."""

    kind: Literal["adamw"] = "adamw"
    beta2: float = Field(0.95, ge=0, lt=1)
    weight_decay: float = Field(0.1, ge=0)


class NAdamConfig(MomentsConfig):
    """Dozat 2016 (OpenReview OM0jvwB8jIp57ZJjtNEZ, algorithm 2) with a constant beta1: Adam with a look ahead.

    m^ = beta1 m_t / (1 - beta1^(t+1)) + (1 - beta1) g_t / (1 - beta1^t). The paper's further factor beta2 on v^ is left out,
    as in other implementations.
    """

    kind: Literal["nadam"] = "nadam"

    def transform(self) -> Any:
        """Adam's rescaling of the moment one step ahead."""
        import optax

        return optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps, nesterov=True)


class RAdamConfig(MomentsConfig):
    """Liu et al. 2019 (arXiv 1908.03265, algorithm 2): Adam times r_t while its variance is bounded, else m^ alone.

    rho_t = rho_inf - 2 t beta2^t / (1 - beta2^t) must be 5 or more, as in the authors' code (above 4 in the paper).
    """

    kind: Literal["radam"] = "radam"

    def transform(self) -> Any:
        """Rectified Adam."""
        import optax

        return optax.scale_by_radam(b1=self.beta1, b2=self.beta2, eps=self.eps)


class AdaMaxConfig(MomentsConfig):
    """Kingma and Ba 2014 (arXiv 1412.6980, algorithm 2): m^ / u with u <- max(beta2 u, |g| + eps)."""

    kind: Literal["adamax"] = "adamax"

    def transform(self) -> Any:
        """Rescaling by a running maximum."""
        import optax

        return optax.scale_by_adamax(b1=self.beta1, b2=self.beta2, eps=self.eps)
