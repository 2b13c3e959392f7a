"""The state of a training: everything that a step reads and writes, and nothing else.

There is no random key in it: keys are functions of (seed, step), so there is no random state to lose.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from .mesh import param_shardings, replicated
from .models.base import Model
from .optimizers.base import Optimizer, spread


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """`step` counts completed updates (int32 scalar); `mutable` holds the model's other collections, if any."""

    step: jax.Array
    params: Any
    opt_state: Any
    mutable: dict[str, Any]
    losses: Any = None  # of the last steps, where spikes are looked for; see trainer.spikes

    def replace(self, **changes: Any) -> "TrainState":
        """A copy with `changes`."""
        return replace(self, **changes)


def step_key(seed: int, step: Any) -> jax.Array:
    """The key of everything random in the step after `step` completed ones."""
    return jax.random.fold_in(jax.random.key(seed), step)


def model_rngs(key: jax.Array) -> dict[str, jax.Array]:
    """One key each for parameters and dropout."""
    params, dropout = jax.random.split(key)
    return {"params": params, "dropout": dropout}


def make_init(model_init: Any, optimizer: Optimizer, inputs: Any, *, seed: int, losses: Callable[[], Any] = lambda: None) -> Any:
    """A function of nothing that makes the state of step 0; to be jitted with the state's shardings.

    `model_init(inputs, key)` gives the model's variables; `inputs` may be shapes; `losses()` is the history of no step.
    """

    def init() -> TrainState:
        blank = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), inputs)
        variables = dict(model_init(blank, jax.random.key(seed)))
        params = variables.pop("params")
        variables.pop("intermediates", None)
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.tx.init(params), variables, losses())

    return init


def state_shardings(mesh: Any, shapes: TrainState, model: Model, inputs: Any, *, optimizer: Optimizer, fsdp_min_size: int) -> Any:
    """The sharding of each array of a state: parameters by their logical axes, optimizer statistics like their parameters."""
    axes = model.logical_axes(inputs)
    whole = replicated(mesh)
    params = param_shardings(mesh, shapes.params, axes["params"], fsdp_min_size=fsdp_min_size)
    opt_state = spread(optimizer.tx, shapes.opt_state, params, params=shapes.params, other=whole)
    mutable, losses = jax.tree.map(lambda _: whole, (shapes.mutable, shapes.losses))
    return shapes.replace(step=whole, params=params, opt_state=opt_state, mutable=mutable, losses=losses)
