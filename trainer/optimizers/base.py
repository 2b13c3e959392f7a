"""An optimizer is an optax transformation and the schedule it reads; a config builds both.

All built-in optimizers are one chain, made here and nowhere else: clip, transform, decay, rate. A part of its own says only
what its `transform` is. Decay is added after the transform and before the sign is turned, so it never meets the statistics
and always makes weights smaller.
"""

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from ..config import PartConfig
from ..errors import ConfigError
from ..params import dotted_paths
from .schedule import ScheduleConfig

Parts = list[tuple[str, Any]]  # (name, optax transformation); names are part of the paths in a checkpoint


class Optimizer(NamedTuple):
    """What `build` gives.

    `tx` is an optax.GradientTransformation, `schedule` gives the learning rate by the index of the update, from 0. Where
    the parameters to evaluate are not the trained ones, `eval_params(opt_state, params)` gives them; None: they are.
    `decays(params)` is a tree of whether weight decay applies to each; None: it is not known.
    """

    tx: Any
    schedule: Callable[[Any], Any]
    eval_params: Callable[[Any, Any], Any] | None = None
    decays: Callable[[Any], Any] | None = None


class OptimizerConfig(PartConfig):
    """Base of optimizer configs: whatever builds an `Optimizer`."""

    def build(self, *, num_steps: int) -> Optimizer:
        """The optimizer for a run of `num_steps` steps."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build its optimizer")


class ChainConfig(OptimizerConfig):
    """What all built-in optimizers share: schedule, decoupled weight decay with its mask, clipping.

    x <- x - lr * (transform(clip(g)) + weight_decay * x). The decay is that of Loshchilov and Hutter (arXiv 1711.05101,
    algorithm 2, line 12), but times the whole learning rate, as is usual, where the paper has its schedule's multiplier alone.
    The two regular expressions are searched in dotted parameter paths ("block_0.mlp.up") and exclude each other; with
    neither, parameters of two and more dims decay.
    """

    schedule: ScheduleConfig = ScheduleConfig()
    weight_decay: float = Field(0.0, ge=0)  # share of a weight taken off per update and unit of lr
    weight_decay_include: str | None = None  # only these decay, whatever their dims
    weight_decay_exclude: str | None = None  # all but these decay, whatever their dims
    clip_value: float | None = Field(None, gt=0)  # of each value of the gradient, before clip_norm; None: off
    clip_norm: float | None = Field(1.0, gt=0)  # of the gradient's global norm; None: off

    @field_validator("weight_decay_include", "weight_decay_exclude")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        return None if value is None else check_pattern(value)

    @model_validator(mode="after")
    def _one_mask(self) -> "ChainConfig":
        if self.weight_decay_include is not None and self.weight_decay_exclude is not None:
            raise ValueError(
                f"weight_decay_include {self.weight_decay_include!r} and weight_decay_exclude {self.weight_decay_exclude!r} "
                "exclude each other; set one of them to null"
            )
        return self

    def transform(self) -> Any:
        """The optax transformation from a gradient to the direction that is stepped against, without decay and rate."""
        raise NotImplementedError(f"{type(self).__name__} does not say what its transform is")

    def rescale(self) -> Any | None:
        """A transformation of direction and decay together, before the rate; None: there is none."""
        return None

    def clipping(self) -> Parts:
        """The head of the chain."""
        import optax

        value = [("clip_value", optax.clip(self.clip_value))] if self.clip_value is not None else []
        return value + ([("clip_norm", optax.clip_by_global_norm(self.clip_norm))] if self.clip_norm is not None else [])

    def descent(self, schedule: Callable[[Any], Any]) -> Parts:
        """The rest of the chain."""
        import optax

        parts = [("transform", self.transform())]
        if self.weight_decay:
            parts.append(("decay", optax.add_decayed_weights(self.weight_decay, mask=self.mask)))
        if (rescale := self.rescale()) is not None:
            parts.append(("rescale", rescale))
        return [*parts, ("rate", optax.scale_by_learning_rate(schedule))]

    def build(self, *, num_steps: int) -> Optimizer:
        """The whole chain. Parameters are first seen, and masks made, by its `init`."""
        import optax

        schedule = self.schedule.build(num_steps=num_steps)
        return Optimizer(optax.named_chain(*self.clipping(), *self.descent(schedule)), schedule, decays=self.decays)

    def decays(self, params: Any) -> Any:
        """A tree like `params` of whether this config's decay makes each smaller: the mask, and none where there is no decay."""
        import jax

        return self.mask(params) if self.weight_decay else jax.tree.map(lambda _: False, params)

    def mask(self, params: Any) -> Any:
        """A tree like `params` (anything with `.ndim`) of whether each may decay. Raises ConfigError where the pattern fits none."""
        import jax

        pattern = self.weight_decay_include if self.weight_decay_include is not None else self.weight_decay_exclude
        if pattern is None:
            return jax.tree.map(lambda x: x.ndim >= 2, params)
        paths = dotted_paths(params)
        found = jax.tree.map(lambda path: re.search(pattern, path) is not None, paths)
        if not any(jax.tree.leaves(found)):
            name = "include" if self.weight_decay_include is not None else "exclude"
            raise ConfigError(
                f"optimizer.weight_decay_{name} {pattern!r} is found in no parameter; they are {', '.join(jax.tree.leaves(paths))}"
            )
        return found if self.weight_decay_include is not None else jax.tree.map(lambda x: not x, found)


def check_pattern(value: str) -> str:
    """`value`, if it is a regular expression. Raises ValueError."""
    try:
        re.compile(value)
    except re.error as e:
        raise ValueError(f"{value!r} is not a regular expression: {e}") from e
    return value


def spread(tx: Any, opt_state: Any, values: Any, *, params: Any, other: Any) -> Any:
    """`opt_state` with, for each statistic of a parameter, that parameter's leaf of `values`; `other` for all else.

    A statistic of another shape than its parameter (a factored moment: one row or column of it) is "all else": what cuts a
    matrix says nothing of how to cut its row means. `params` and `opt_state` may be shapes.
    """
    import optax

    def one(x: Any, param: Any, value: Any) -> Any:
        if isinstance(x, optax.MaskedNode):  # stands where another transformation holds the statistics
            return x
        return value if x.shape == param.shape else other

    return optax.tree_map_params(
        tx, one, opt_state, params, values, transform_non_params=lambda _: other, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
