"""What a loss function must give and a batch must be, seen on shapes alone: a mistake shows before a step is spent on it."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .errors import ConfigError, DataError

SHAPE = "(loss, (metrics, mutable)), the loss a scalar mean or a pair (sum, weight) of scalars"


def read_loss(returned: Any, *, of: Any) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """`(sum, weight, metrics, mutable)` of what the loss function `of` returned. Raises ConfigError where it is something else."""

    def refuse(why: str) -> ConfigError:
        name = getattr(of, "__qualname__", type(of).__qualname__)
        return ConfigError(f"{name} returned {why}; it must return {SHAPE}")

    if not (isinstance(returned, tuple) and len(returned) == 2 and isinstance(returned[1], tuple) and len(returned[1]) == 2):
        raise refuse(_describe(returned))
    loss, (metrics, mutable) = returned
    if not (isinstance(metrics, Mapping) and isinstance(mutable, Mapping)):
        raise refuse(f"metrics of type {type(metrics).__name__} and mutable of type {type(mutable).__name__}, not two dictionaries")
    if isinstance(loss, tuple) and len(loss) != 2:
        raise refuse(f"a loss of {len(loss)} parts")
    value, weight = loss if isinstance(loss, tuple) else (loss, 1.0)
    for name, x in (("loss", value), ("weight of the loss", weight)):
        if not _is_number(x) or jnp.ndim(x):
            raise refuse(f"a {name} that is {_describe(x)}")
    if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
        raise refuse(f"a loss of dtype {jnp.result_type(value)}, which has no gradient")
    return value, weight, dict(metrics), dict(mutable)


def _is_number(x: Any) -> bool:
    return isinstance(x, int | float | np.generic | np.ndarray | jax.Array)


def _describe(x: Any) -> str:
    if isinstance(x, tuple | list):
        return f"a {type(x).__name__} of {len(x)}: ({', '.join(type(one).__name__ for one in x)})"
    return f"{jnp.result_type(x)}{list(jnp.shape(x))}" if _is_number(x) else f"a {type(x).__name__}"


def check_batch_like(batch: Any, example: Any, *, rows: bool, what: str) -> None:
    """See that a batch has the structure, dtypes and shapes of the example; the number of rows may differ unless `rows`.

    Raises DataError, for another shape would compile another step, and another dtype would change what is computed.
    """
    made: Any
    meant: Any
    (leaves, made), (known, meant) = (jax.tree.flatten(tree) for tree in (batch, example))
    if made == meant and all(getattr(x, "shape", None) == y.shape and x.dtype == y.dtype for x, y in zip(leaves, known, strict=True)):
        return  # every batch of an evaluation comes here: nothing is put into words before something is wrong
    have, want = (jax.tree.map(lambda x: _leaf(x, rows=rows), tree) for tree in (batch, example))
    if have != want:
        way_out = "drop or pad a last batch that is smaller" if rows else "give the model the same inputs as in training"
        raise DataError(f"{what} has {have}, but the trainer was made for {want}; {way_out}")


def _leaf(x: Any, *, rows: bool) -> str:
    shape = np.shape(x)
    dims = list(shape) if rows or not shape else ["rows", *shape[1:]]
    # As it will be on the device, where there are no 64 bits unless asked for
    dtype = jax.dtypes.canonicalize_dtype(x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype)
    return f"{dtype}[{', '.join(map(str, dims))}]"


def first_of(loader: Any) -> Any | None:
    """The first batch of a loader that is a sequence; None of any other, which might not give it a second time."""
    return loader[0] if isinstance(loader, Sequence) and len(loader) else None
