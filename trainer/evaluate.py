"""A pass over the batches of one split: weights and batches in, a window out."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

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


def check_like(batch: Any, example: Any) -> None:
    """See that a training batch has the shapes of the example. Raises DataError: another shape would compile another step."""
    have, want = (jax.tree.map(lambda x: tuple(x.shape), tree) for tree in (batch, example))
    if have != want:
        raise DataError(
            f"a training batch has the shapes {have}, but the trainer was made for {want}; drop or pad a last batch that is smaller"
        )
