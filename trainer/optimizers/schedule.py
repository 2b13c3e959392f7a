"""Learning-rate schedules: linear warmup, a main part, constant afterwards."""

from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from ..config import Config


class ScheduleConfig(Config):
    """`lr` is reached after `warmup_steps`, then falls to `end_lr_factor * lr` at `decay_steps`, all counted from step 0."""

    kind: Literal["cosine", "linear", "constant"] = "cosine"
    lr: float = Field(1e-3, ge=0)
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int | None = Field(None, ge=1)  # warmup included; None: the run's num_steps
    end_lr_factor: float = Field(0.1, ge=0, le=1)

    @model_validator(mode="after")
    def _order(self) -> "ScheduleConfig":
        if self.decay_steps is not None and self.decay_steps < self.warmup_steps:
            raise ValueError(f"decay_steps {self.decay_steps} counts the warmup too: it cannot be below warmup_steps {self.warmup_steps}")
        return self

    @property
    def depends_on_num_steps(self) -> bool:
        """Whether another `num_steps` would change the learning rate of steps already trained."""
        return self.kind != "constant" and self.decay_steps is None

    def build(self, *, num_steps: int) -> Callable[[Any], Any]:
        """The schedule as an optax function: index of the update, from 0 -> learning rate, float32 scalar."""
        import optax

        if self.kind == "constant":
            main = optax.constant_schedule(self.lr)
        else:
            length = max(1, (self.decay_steps or num_steps) - self.warmup_steps)
            if self.kind == "cosine":
                main = optax.cosine_decay_schedule(self.lr, length, alpha=self.end_lr_factor)
            else:
                main = optax.linear_schedule(self.lr, self.lr * self.end_lr_factor, length)
        if not self.warmup_steps:
            return main
        # The first update uses 1/warmup of lr, not 0: a step that changes nothing would be wasted.
        warmup = optax.linear_schedule(self.lr / self.warmup_steps, self.lr, max(1, self.warmup_steps - 1))
        return optax.join_schedules([warmup, main], [self.warmup_steps])
