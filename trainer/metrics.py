"""Metrics as small pytrees with three operations: make, merge, compute.

A step gives per key a scalar or `{value, count, log_modes}`. `merge` is associative, so a metric may be merged over
microbatches or steps in any grouping. Sums are kept as pairs (high, low) of float32, so that a count of tokens stays
exact far beyond 2^31 and a small addend is not lost in a large sum. Outside of these functions a window is one vector.
"""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .params import flatten

Array = jax.Array
NO_STEP = float(np.finfo(np.float32).min)  # the last value of a window that holds no step: no mean comes to it
POSTFIX = {"mean": "_mean", "mean_nopostfix": "", "single": "_single", "max": "_max", "min": "_min", "std": "_std", "sum": "_sum"}


@jax.tree_util.register_static
class Modes(tuple):
    """The log modes of one metric: static under jit."""


@jax.tree_util.register_pytree_with_keys_class
class Window:
    """What was found in some steps, as one vector: to hand on, fetch and save one array is cheap, and dozens of scalars are not.

    `values` is (n,) float32, of the device or of NumPy; `layout` is the static structure of the tree {key: {part: scalar or
    pair}} of which they are the leaves. In a checkpoint the vector's name tells of the keys, so that others are not mistaken for it.
    """

    def __init__(self, values: Any, layout: Any):
        self.values, self.layout = values, layout

    @classmethod
    def of(cls, tree: Mapping[str, Any]) -> "Window":
        """The window of a tree of scalars."""
        leaves, layout = jax.tree.flatten(dict(tree))
        return cls(np.array(leaves) if _numpy_of(leaves[0]) is np else jnp.stack(leaves), layout)

    def tree(self) -> dict[str, Any]:
        """The scalars by their names."""
        return jax.tree.unflatten(self.layout, list(self.values))

    def on_host(self) -> "Window":
        """The window with a vector of NumPy; waits for it."""
        return Window(np.asarray(self.values), self.layout)

    def tree_flatten_with_keys(self) -> tuple[tuple, Any]:
        """The vector under its name, and the layout."""
        return ((jax.tree_util.GetAttrKey(_name(self.layout)), self.values),), self.layout

    def tree_flatten(self) -> tuple[tuple, Any]:
        """The same without the name."""
        return (self.values,), self.layout

    @classmethod
    def tree_unflatten(cls, layout: Any, children: tuple) -> "Window":
        """The inverse."""
        return cls(children[0], layout)


def _name(layout: Any) -> str:
    names = ",".join(flatten(jax.tree.unflatten(layout, range(layout.num_leaves))))
    return f"values_{zlib.crc32(names.encode()):08x}"


def _numpy_of(x: Any) -> Any:
    """The module whose functions fit `x`: the same formulas serve on the device and, in the same float32, on the host."""
    return np if isinstance(x, np.generic | np.ndarray) else jnp


def zero_sum() -> tuple[Array, Array]:
    """The empty sum."""
    return jnp.zeros((), jnp.float32), jnp.zeros((), jnp.float32)


def add(a: tuple[Array, Array], b: tuple[Array, Array]) -> tuple[Array, Array]:
    """The sum of two pairs; error-free addition of the high parts (Knuth, TAOCP 2, section 4.2.2, theorem B)."""
    s = a[0] + b[0]
    t = s - a[0]
    error = (a[0] - (s - t)) + (b[0] - t)
    low = error + a[1] + b[1]
    high = s + low
    return high, low - (high - s)


def lift(x: Any) -> tuple[Array, Array]:
    """A scalar as a pair; integers up to 2^48 exactly."""
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.integer):
        coarse = (x >> 16) << 16
        return add((coarse.astype(jnp.float32), jnp.zeros((), jnp.float32)), ((x - coarse).astype(jnp.float32), jnp.zeros((), jnp.float32)))
    return x.astype(jnp.float32), jnp.zeros((), jnp.float32)


def parse(metrics: Mapping[str, Any], default_modes: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What a loss function returned, as `{key: {value, count, modes}}` with pairs for value and count.

    What asks for nothing but its maximum (or minimum) and gives no count is one already, of what it was made from; it has none.
    Raises ValueError for a value or count that is no scalar, or an unknown mode.
    """
    out = {}
    for key, entry in metrics.items():
        given: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {"value": entry}
        modes = Modes(given.get("log_modes") or default_modes)
        if unknown := [m for m in modes if m not in POSTFIX]:
            raise ValueError(f"metric {key!r}: log mode {unknown[0]!r} is none of {', '.join(POSTFIX)}")
        if "value" not in given:
            raise ValueError(f"metric {key!r} has no 'value'; a metric is a scalar or a dictionary of value, count and log_modes")
        for name in ("value", "count"):
            x = given.get(name, 1)
            if not isinstance(x, int | float | np.generic | np.ndarray | Array) or jnp.ndim(x):
                what = f"shape {jnp.shape(x)}" if hasattr(x, "shape") else f"type {type(x).__name__}"
                raise ValueError(f"the {name} of metric {key!r} has {what}; a metric is a scalar")
        if "/" in key:
            raise ValueError(f"metric name {key!r} has a '/' in it; use '_'")
        out[key] = {"value": lift(given["value"]), "modes": modes}
        if "count" in given or tuple(given.get("log_modes") or ()) not in (("max",), ("min",)):
            out[key]["count"] = lift(given.get("count", 1))
    return out


def merge_batch(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of two microbatches as those of their union: values and counts add, of what has no count the extreme stays."""

    def one(x: Mapping[str, Any], y: Mapping[str, Any]) -> dict[str, Any]:
        if "count" in x:
            return {"value": add(x["value"], y["value"]), "count": add(x["count"], y["count"]), "modes": x["modes"]}
        extreme = jnp.maximum if x["modes"] == ("max",) else jnp.minimum
        return {"value": jax.tree.map(extreme, x["value"], y["value"]), "modes": x["modes"]}

    return {k: one(a[k], b[k]) for k in a}


def window_of(step: Mapping[str, Any]) -> Window:
    """A logging window that holds one step."""
    one = (jnp.ones((), jnp.float32), jnp.zeros((), jnp.float32))
    out: dict[str, Any] = {}
    for key, m in step.items():
        mean = m["value"][0] / m["count"][0] if "count" in m else m["value"][0]
        w: dict[str, Any] = {"modes": m["modes"]}
        if {"mean", "mean_nopostfix", "sum"} & set(m["modes"]):
            w |= {"value": m["value"], "count": m["count"]}
        if "single" in m["modes"]:
            w["single"] = mean
        if "max" in m["modes"]:
            w["max"] = mean
        if "min" in m["modes"]:
            w["min"] = mean
        if "std" in m["modes"]:
            w |= {"steps": one, "center": mean, "spread": jnp.zeros((), jnp.float32)}
        out[key] = w
    return Window.of(out)


def identity(like: Window) -> Window:
    """The window that holds no step, with the metrics of `like` (of arrays or shapes)."""
    start = {"max": -np.inf, "min": np.inf, "single": NO_STEP}
    names = jax.tree.unflatten(like.layout, range(like.layout.num_leaves))
    filled = {
        k: {part: jax.tree.map(lambda _, p=part: np.float32(start.get(p, 0.0)), v) for part, v in w.items()} for k, w in names.items()
    }
    return jax.device_put(Window.of(filled))


def merge(a: Window | None, b: Window) -> Window:
    """Two windows, `a` the earlier, as one; None is no window. Variances by Chan, Golub and LeVeque 1983, eq. 2.1."""
    if a is None:
        return b
    out: dict[str, Any] = {}
    for (key, x), y in zip(a.tree().items(), b.tree().values(), strict=True):
        w = {"modes": x["modes"]}
        for sums in ("value", "count"):
            if sums in x:
                w[sums] = add(x[sums], y[sums])
        if "single" in x:
            # Not NaN, which a last value may well be, and which should then be seen.
            w["single"] = _numpy_of(x["single"]).where(y["single"] == NO_STEP, x["single"], y["single"])
        if "max" in x:
            w["max"] = _numpy_of(x["max"]).maximum(x["max"], y["max"])
        if "min" in x:
            w["min"] = _numpy_of(x["min"]).minimum(x["min"], y["min"])
        if "steps" in x:
            n, m = x["steps"][0], y["steps"][0]
            delta = y["center"] - x["center"]
            w["steps"] = add(x["steps"], y["steps"])
            share = m / _numpy_of(n).maximum(n + m, 1)  # two windows of no step make one more
            w["center"] = x["center"] + delta * share
            w["spread"] = x["spread"] + y["spread"] + delta * delta * n * share
        out[key] = w
    return Window.of(out)


def _number(pair: Any) -> float:
    return float(np.float64(pair[0]) + np.float64(pair[1]))


def compute(window: Window) -> dict[str, float]:
    """Host values of a window of the host. A mean over nothing is NaN: it should be seen, not hidden."""
    out = {}
    for key, w in window.tree().items():
        for mode in w["modes"]:
            if mode in ("mean", "mean_nopostfix"):
                count = _number(w["count"])
                value = _number(w["value"]) / count if count else float("nan")
            elif mode == "sum":
                value = _number(w["value"])
            elif mode == "std":
                steps = _number(w["steps"])
                value = float(np.sqrt(np.float64(w["spread"]) / steps)) if steps else float("nan")
            else:
                value = float(w[mode]) if w[mode] != NO_STEP else float("nan")
            out[key + POSTFIX[mode]] = value
    return out
