"""A pass over the batches of one split: state and batches in, values out."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from . import metrics
from .errors import DataError
from .state import TrainState


def evaluate(eval_step: Callable, state: TrainState, batches: Iterable[Any], *, empty: Any) -> dict[str, float]:
    """Values over all batches, each row weighted by what it holds. Raises DataError where there is no batch at all."""
    window, seen = empty, 0
    for batch in batches:
        window = eval_step(state.params, state.mutable, window, batch)
        seen += 1
    if not seen:
        raise DataError("there is nothing to evaluate on: the split has no batch; prepare the data with a larger fraction for it")
    return metrics.compute(jax.device_get(window))
