"""AdamW (Loshchilov and Hutter, arXiv 1711.05101) with clipping by global norm."""

import re
from typing import Literal

from pydantic import Field, field_validator

from ..params import dotted_paths
from .base import Optimizer, OptimizerConfig
from .schedule import ScheduleConfig


class AdamWConfig(OptimizerConfig):
    """AdamW; decay acts on parameters with two or more dims whose dotted path does not match `no_decay`."""

    kind: Literal["adamw"] = "adamw"
    schedule: ScheduleConfig = ScheduleConfig()
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    no_decay: str | None = None  # regular expression searched in dotted paths, e.g. "embed|norm"
    clip_norm: float | None = Field(1.0, gt=0)  # of the global gradient norm; None: off

    @field_validator("no_decay")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as e:
                raise ValueError(f"no_decay {value!r} is not a regular expression: {e}") from e
        return value

    def build(self, *, num_steps: int) -> Optimizer:
        """The chain clip -> adam -> decay -> -lr. The mask of decay is made when the parameters are seen."""
        import jax
        import optax

        def decays(params):
            paths = dotted_paths(params)
            return jax.tree.map(lambda p, x: x.ndim >= 2 and not (self.no_decay and re.search(self.no_decay, p)), paths, params)

        schedule = self.schedule.build(num_steps=num_steps)
        parts = [optax.clip_by_global_norm(self.clip_norm)] if self.clip_norm is not None else []
        parts.append(optax.adamw(schedule, b1=self.beta1, b2=self.beta2, eps=self.eps, weight_decay=self.weight_decay, mask=decays))
        return Optimizer(optax.chain(*parts), schedule)
