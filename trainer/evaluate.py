"""A pass over the batches of one split: weights and batches in, a window out."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from .errors import DataError


def run(eval_step: Callable, weights: tuple[Any, dict[str, Any]], batches: Iterable[Any], *, empty: Any) -> Any:
    """The window over all batches, each row weighted by what it holds; `weights` are (params, mutable).

    Raises DataError where there is no batch at all.
    """
    window, before = empty, None
    for batch in batches:
        window, before = eval_step(*weights, window, batch), window
        jax.block_until_ready(before)  # two batches are in flight at most, however many there are
    if before is None:
        raise DataError("there is nothing to evaluate on: the split has no batch; prepare the data with a larger fraction for it")
    return window
