"""The two numbers per token that a cross entropy needs, with a gradient of their own.

Left to itself, differentiation turns the picking of the target's logit into a scatter, which is slow, and on a GPU not even
the same from run to run. Here the gradient is written down: softmax times one cotangent, plus the other one where the
vocabulary's index is the target.
"""

from typing import Any

import jax
import jax.numpy as jnp

Array = jax.Array


@jax.custom_vjp
def log_z_and_chosen(logits: Array, targets: Array) -> tuple[Array, Array]:
    """`logits` (..., vocab) and `targets` (...) int -> log of the sum of exp(logits), and logits[target]; both (...) float32.

    The cross entropy is their difference. Differentiable by reverse mode in `logits` alone.
    """
    return _forward(logits, targets)[0]


def _forward(logits: Array, targets: Array) -> tuple[tuple[Array, Array], Any]:
    x = logits.astype(jnp.float32)  # kept is exp of it: a second exp would cost more than the memory of one
    highest = jnp.max(x, axis=-1)
    exps = jnp.exp(x - highest[..., None])
    total = jnp.sum(exps, axis=-1)
    chosen = jnp.take_along_axis(x, targets[..., None], axis=-1)[..., 0]
    return (highest + jnp.log(total), chosen), (exps, total, targets, jnp.zeros((), logits.dtype))


def _backward(kept: Any, cotangents: tuple[Array, Array]) -> tuple[Array, None]:
    exps, total, targets, like = kept
    of_log_z, of_chosen = cotangents
    is_target = jax.lax.broadcasted_iota(targets.dtype, exps.shape, exps.ndim - 1) == targets[..., None]
    grad = exps * (of_log_z / total)[..., None] + jnp.where(is_target, of_chosen[..., None], 0.0)
    return grad.astype(like.dtype), None


log_z_and_chosen.defvjp(_forward, _backward)
