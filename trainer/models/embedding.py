"""Tokens to vectors and vectors to logits, each with a gradient of its own.

The gradient of a lookup is a sum of rows by token: a scatter, whose order of additions is not fixed on a GPU. Where a run is
to be exact there, the sum is a product with a one-hot matrix instead, made in chunks so that it never stands whole in memory.
A CPU adds one after the other and keeps the scatter.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ..backend import numerics

Array = jax.Array

ONE_HOT_VALUES = 2**26  # of the one-hot matrix that stand in memory at a time


def lookup(table: Array, tokens: Array) -> Array:
    """`table` (vocab, width), `tokens` (batch, seq) int -> rows (batch, seq, width) of the table's dtype."""
    return _lookup(table.shape[0], table, tokens)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _lookup(vocab: int, table: Array, tokens: Array) -> Array:
    return table[tokens]


def _lookup_backward(vocab: int, tokens: Array, grad: Array) -> tuple[Array, None]:
    add = functools.partial(add_by_scatter, vocab=vocab)
    if numerics() == "exact":
        total = jax.lax.platform_dependent(tokens, grad, cpu=add, default=functools.partial(add_by_product, vocab=vocab))
    else:
        total = add(tokens, grad)
    return total.astype(grad.dtype), None


_lookup.defvjp(lambda vocab, table, tokens: (table[tokens], tokens), _lookup_backward)


def add_by_scatter(tokens: Array, grad: Array, *, vocab: int) -> Array:
    """`grad` (batch, seq, width) added up by token: (vocab, width) float32."""
    return jnp.zeros((vocab, grad.shape[-1]), jnp.float32).at[tokens].add(grad.astype(jnp.float32))


def add_by_product(tokens: Array, grad: Array, *, vocab: int) -> Array:
    """The same as a sum over chunks of the sequence of one-hot(tokens) x grad, in an order that does not change."""
    batch, seq, width = grad.shape
    length = max(1, min(seq, ONE_HOT_VALUES // (batch * vocab)))
    num = -(-seq // length)
    pad = num * length - seq
    tokens = jnp.pad(tokens, ((0, 0), (0, pad)), constant_values=-1)  # the row of no token
    grad = jnp.pad(grad, ((0, 0), (0, pad), (0, 0)))
    # The sequence is cut, not the batch: that one is cut over devices already.
    chunks = (jnp.moveaxis(x.reshape(batch, num, length, *x.shape[2:]), 1, 0) for x in (tokens, grad))

    def body(total: Array, chunk: Any) -> tuple[Array, None]:
        token, g = chunk
        one_hot = token[..., None] == jax.lax.broadcasted_iota(token.dtype, (*token.shape, vocab), 2)
        # Highest precision, or float32 would be cut to 10 bits on a GPU; of bfloat16 it loses nothing either way.
        product = jnp.einsum("bsv,bsw->vw", one_hot.astype(g.dtype), g, precision="highest", preferred_element_type=jnp.float32)
        return total + product, None

    return jax.lax.scan(body, jnp.zeros((vocab, width), jnp.float32), tuple(chunks))[0]


@jax.custom_vjp
def unembed(x: Array, table: Array) -> Array:
    """`x` (batch, seq, width) and `table` (vocab, width) of one dtype -> logits (batch, seq, vocab), summed and kept in float32."""
    return jnp.einsum("bsw,vw->bsv", x, table, preferred_element_type=jnp.float32)


def _unembed_backward(kept: tuple[Array, Array], grad: Array) -> tuple[Array, Array]:
    x, table = kept
    grad = grad.astype(x.dtype)  # operands of one dtype: a product of float32 and bfloat16 runs as one of float32
    of_x = jnp.einsum("bsv,vw->bsw", grad, table, preferred_element_type=jnp.float32)
    of_table = jnp.einsum("bsw,bsv->wv", x, grad, preferred_element_type=jnp.float32)
    # Turned behind a barrier, or XLA makes one product of it for which a CPU first turns `grad`: twice the time.
    return of_x.astype(x.dtype), jax.lax.optimization_barrier(of_table).T.astype(table.dtype)


unembed.defvjp(lambda x, table: (unembed(x, table), (x, table)), _unembed_backward)
