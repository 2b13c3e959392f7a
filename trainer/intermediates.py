"""What a model sows into the collection "intermediates", as metrics."""

from typing import Any

import jax
import jax.numpy as jnp

from .params import dotted_name


def as_metrics(sown: Any) -> dict[str, Any]:
    """{name: scalar}: a scalar under its dotted path, a vector as one metric per element, anything larger as its mean."""
    out: dict[str, Any] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(sown):
        name = dotted_name(path).removesuffix(".0")  # linen keeps what is sown in a tuple
        if jnp.ndim(x) == 1:
            out |= {f"{name}.{i}": x[i] for i in range(x.shape[0])}
        else:
            out[name] = jnp.mean(x)
    return out
