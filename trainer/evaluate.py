"""A pass over the batches of one split: weights and batches in, a window out."""

from collections.abc import Callable, Iterable
from typing import Any

from .errors import DataError


def run(eval_step: Callable, weights: tuple[Any, dict[str, Any]], batches: Iterable[Any], *, empty: Any) -> Any:
    """The window over all batches, each row weighted by what it holds; `weights` are (params, mutable).

    Raises DataError where there is no batch at all.
    """
    window, seen = empty, 0
    for batch in batches:
        window = eval_step(*weights, window, batch)
        seen += 1
    if not seen:
        raise DataError("there is nothing to evaluate on: the split has no batch; prepare the data with a larger fraction for it")
    return window
