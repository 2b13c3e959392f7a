"""Learning-rate schedules: linear warmup, a main part, a linear cooldown, constant afterwards."""

import math
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from ..config import Config
from ..errors import ConfigError

FALLING = ("linear", "cosine", "exponential")  # kinds whose main part has an end value, reached at its last step
DEFAULT_END_LR_FACTOR = 0.1


class ScheduleConfig(Config):
    """The learning rate of the update with index i, counted from 0.

    Warmup, i < warmup_steps: lr (i + 1) / warmup_steps; an update by 0 would be wasted. Main part, up to decay_steps -
    cooldown_steps: from lr to the end value; inverse_sqrt: lr sqrt(w / max(i, w)), w = max(warmup_steps, 1) (Vaswani et al.
    2017, arXiv 1706.03762, eq. 3); constant and wsd (warmup, stable, decay; Hu et al. 2024, arXiv 2404.06395, section 4) stay
    at lr. Cooldown: in a line to cooldown_lr at decay_steps. Constant from there on.
    """

    kind: Literal["constant", "linear", "cosine", "exponential", "inverse_sqrt", "wsd"] = "cosine"
    lr: float = Field(1e-3, ge=0)  # the highest
    warmup_steps: int = Field(0, ge=0)
    decay_steps: int | None = Field(None, ge=1)  # all steps, warmup and cooldown included; None: the run's num_steps
    end_lr: float | None = Field(None, ge=0)  # end value of linear, cosine, exponential
    end_lr_factor: float | None = Field(None, ge=0, le=1)  # the same as a share of lr; linear and cosine: 0.1 where neither is set
    cooldown_steps: int = Field(0, ge=0)
    cooldown_lr: float = Field(0.0, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> "ScheduleConfig":
        self._check_end()
        if self.kind == "wsd" and not self.cooldown_steps:
            raise ValueError("kind wsd needs cooldown_steps; a tenth to a fifth of all steps is usual, or set kind=constant")
        if self.cooldown_lr and not self.cooldown_steps:
            raise ValueError(f"cooldown_lr {self.cooldown_lr} is not reached without a cooldown; set cooldown_steps, or end_lr instead")
        if self.cooldown_lr > self.lr:
            raise ValueError(f"cooldown_lr {self.cooldown_lr} is above lr {self.lr}; a cooldown goes down")
        if self.decay_steps is not None and (problem := self._no_room(self.decay_steps)):
            raise ValueError(f"decay_steps {self.decay_steps} {problem}")
        return self

    def _check_end(self) -> None:
        if self.end_lr is not None and self.end_lr_factor is not None:
            raise ValueError(
                f"end_lr {self.end_lr} and end_lr_factor {self.end_lr_factor} exclude each other; set one of them to null, "
                "such as end_lr_factor=null"
            )
        if self.end_lr is not None and self.kind not in FALLING:
            raise ValueError(f"kind {self.kind} does not go to end_lr {self.end_lr}; set cooldown_steps and cooldown_lr instead")
        if self.end_lr is not None and self.end_lr > self.lr:
            raise ValueError(f"end_lr {self.end_lr} is above lr {self.lr}; the main part goes down")
        if self.kind == "exponential" and not (self.end_lr or self.end_lr_factor):
            given = "without an end value would stay at lr" if self.end_lr is None and self.end_lr_factor is None else "never reaches 0"
            raise ValueError(f"kind exponential {given}; set end_lr_factor, such as end_lr_factor=0.01, or end_lr")
        if self.kind in ("linear", "cosine") and self.end_lr is None and self.end_lr_factor is None:
            object.__setattr__(self, "end_lr_factor", DEFAULT_END_LR_FACTOR)  # still the making: a validated config is complete
            self.__pydantic_fields_set__.add("end_lr_factor")

    def _no_room(self, total: int) -> str:
        """What keeps the parts from fitting into `total` steps; empty where they fit."""
        main = total - self.warmup_steps - self.cooldown_steps
        if main >= (1 if self.kind in FALLING else 0):
            return ""
        return (
            f"counts warmup_steps {self.warmup_steps} and cooldown_steps {self.cooldown_steps} too, which leaves {main} for the "
            f"{self.kind} part; shorten them or set decay_steps to more than {self.warmup_steps + self.cooldown_steps}"
        )

    @property
    def depends_on_num_steps(self) -> bool:
        """Whether another `num_steps` would change the learning rate of some step."""
        return self.decay_steps is None and (self.kind in FALLING or self.cooldown_steps > 0)

    def build(self, *, num_steps: int) -> Callable[[Any], Any]:
        """The schedule as an optax function: index of the update, from 0 -> learning rate, float32 scalar.

        Raises ConfigError where `num_steps` is asked for and leaves no room.
        """
        import jax.numpy as jnp
        import optax

        if self.depends_on_num_steps and (problem := self._no_room(num_steps)):
            raise ConfigError(f"num_steps {num_steps}, in place of decay_steps, {problem}")
        warmup = self.warmup_steps
        length = (self.decay_steps or num_steps) - self.cooldown_steps - warmup  # of the main part
        main, end = self._main(length)
        parts, borders = [main], []
        if warmup:
            parts.insert(0, optax.linear_schedule(self.lr / warmup, self.lr, max(1, warmup - 1)))
            borders.append(warmup)
        if self.cooldown_steps:
            parts.append(optax.linear_schedule(end, self.cooldown_lr, self.cooldown_steps))
            borders.append(warmup + length)
        joined = optax.join_schedules(parts, borders)
        # compiled, a line to 0 may end a rounding error below it, and a rate below 0 climbs
        return lambda index: jnp.maximum(jnp.asarray(joined(index), jnp.float32), 0)

    def _main(self, length: int) -> tuple[Callable[[Any], Any], float]:
        """The main part as a function of the index within it, and its value after `length` steps."""
        import jax.numpy as jnp
        import optax

        lr, warmup = self.lr, max(self.warmup_steps, 1)
        if self.kind in ("constant", "wsd"):
            return optax.constant_schedule(lr), lr
        if self.kind == "inverse_sqrt":
            last = length if self.decay_steps is not None or self.cooldown_steps else None  # None: it has no end

            def inverse_sqrt(index: Any) -> Any:
                index = index if last is None else jnp.minimum(index, last)
                return lr * jnp.sqrt(warmup / jnp.maximum(index + self.warmup_steps, warmup))

            return inverse_sqrt, lr * math.sqrt(warmup / max(length + self.warmup_steps, warmup))
        share = self.end_lr_factor if self.end_lr is None else self.end_lr / lr if lr else 1.0
        assert share is not None
        end = lr * share if self.end_lr is None else self.end_lr
        if self.kind == "linear":
            return optax.linear_schedule(lr, end, length), end
        if self.kind == "cosine":
            return optax.cosine_decay_schedule(lr, length, alpha=share), end
        return optax.exponential_decay(lr, length, share, end_value=end), end
