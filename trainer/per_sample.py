"""Metrics of each sample by itself, gathered in order instead of reduced: for a closer look than a mean allows.

A sample is a row that is evaluated as a batch of its own, so any loss function gives them without being written for it.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from .contract import read_loss
from .errors import DataError
from .mesh import replicated
from .step import LossFunction, bind

if TYPE_CHECKING:
    from .module import TrainerModule


def make_step(loss: LossFunction, apply: Callable, *, seed: int) -> Callable:
    """`(params, mutable, batch) -> ({metric: (rows,)}, (rows,))`: values over counts, and the weights of the rows' losses."""

    def one(params: Any, mutable: Any, row: Any) -> tuple[dict[str, Any], Any]:
        batch = jax.tree.map(lambda x: x[None], row)
        returned = loss(params, bind(apply, mutable), batch, jax.random.key(seed), False)
        _, weight, metrics, _ = read_loss(returned, of=loss)
        return {k: e["value"] / e.get("count", 1) if isinstance(e, Mapping) else e for k, e in metrics.items()}, weight

    return jax.vmap(one, in_axes=(None, None, 0))


def evaluate(trainer: "TrainerModule", batches: Iterable[Any]) -> dict[str, np.ndarray]:
    """{metric: (samples,) float32} with the trainer's weights. A row whose loss has no weight is padding and left out.

    Compiles a step at each call. Raises DataError where there is no batch.
    """
    c = trainer.trainer_config
    step = make_step(trainer.loss_function, trainer.model.apply, seed=c.seed_eval)
    if not c.debug:
        step = jax.jit(step, out_shardings=replicated(trainer.mesh))
    weights = trainer.weights(trainer.state)
    parts = [jax.device_get(step(*weights, trainer.put(batch))) for batch in batches]
    if not parts:
        raise DataError("there is nothing to evaluate on: the loader has no batch")
    real = np.concatenate([weight for _, weight in parts]) > 0
    return {key: np.concatenate([np.asarray(found[key], np.float32) for found, _ in parts])[real] for key in parts[0][0]}
