"""A pre-norm decoder over packed rows; what `llama.py` configures.

Documents in a row are kept apart by `segment_ids` and by positions that start anew: attention looks back only within its
own document. Matrix products run in `dtype`; norms, rotary angles, attention scores and logits in float32.
"""

import math
from typing import TYPE_CHECKING, Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from .embedding import lookup, unembed
from .remat import rematerialised

if TYPE_CHECKING:
    from .llama import LlamaConfig

Array = jax.Array


def rotary(x: Array, positions: Array, *, theta: float) -> Array:
    """RoFormer (Su et al. 2021, arXiv 2104.09864, eq. 34): pairs of dims i and i + d/2 turned by position * theta^(-2i/d).

    `x` is (batch, seq, heads, head_dim), `positions` (batch, seq); the result has the dtype of `x`.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency  # (batch, seq, 1, half)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def document_mask(segment_ids: Array) -> Array:
    """Who may look at whom: (batch, 1, query, key), true for the same document and no later place."""
    seq = segment_ids.shape[1]
    same = segment_ids[:, :, None] == segment_ids[:, None, :]
    return (same & jnp.tril(jnp.ones((seq, seq), bool)))[:, None]


class RMSNorm(nn.Module):
    """Zhang and Sennrich 2019 (arXiv 1910.07467, eq. 4), computed in float32."""

    eps: float
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`x` (..., width) divided by its root mean square, times a learned scale."""
        scale = self.param("scale", _named(nn.initializers.ones, "norm"), (x.shape[-1],), self.param_dtype)
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32)).astype(self.dtype)


def _named(init: Any, *names: str | None) -> Any:
    return nn.with_logical_partitioning(init, names)


class Attention(nn.Module):
    """Causal attention with grouped queries (Ainslie et al. 2023, arXiv 2305.13245) and rotary positions."""

    config: "LlamaConfig"

    @nn.compact
    def __call__(self, x: Array, segment_ids: Array, positions: Array) -> Array:
        """`x` (batch, seq, width) -> the same shape."""
        c = self.config
        dim = c.head_size
        q = self._project(x, c.num_heads, "query", "heads")
        k = self._project(x, c.kv_heads, "key", "kv_heads")
        v = self._project(x, c.kv_heads, "value", "kv_heads")
        q = rotary(q, positions, theta=c.rope_theta)
        k = rotary(k, positions, theta=c.rope_theta)
        y = jax.nn.dot_product_attention(q, k, v, mask=document_mask(segment_ids), scale=1 / math.sqrt(dim))
        std = c.init_std / math.sqrt(2 * c.num_layers)
        out = self.param(
            "out", _named(nn.initializers.normal(std), "heads", "head_dim", "embed"), (c.num_heads, dim, c.width), c.param_dtype
        )
        return jnp.einsum("bshd,hdw->bsw", y, out.astype(c.dtype))

    def _project(self, x: Array, heads: int, name: str, axis: str) -> Array:
        c = self.config
        init = _named(nn.initializers.normal(c.init_std), "embed", axis, "head_dim")
        kernel = self.param(name, init, (c.width, heads, c.head_size), c.param_dtype)
        return jnp.einsum("bsw,whd->bshd", x, kernel.astype(c.dtype))


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202, eq. 6)."""

    config: "LlamaConfig"

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`x` (batch, seq, width) -> the same shape."""
        c = self.config
        init = _named(nn.initializers.normal(c.init_std), "embed", "mlp")
        gate = self.param("gate", init, (c.width, c.hidden), c.param_dtype)
        up = self.param("up", init, (c.width, c.hidden), c.param_dtype)
        std = c.init_std / math.sqrt(2 * c.num_layers)
        down = self.param("down", _named(nn.initializers.normal(std), "mlp", "embed"), (c.hidden, c.width), c.param_dtype)
        return (jax.nn.silu(x @ gate.astype(c.dtype)) * (x @ up.astype(c.dtype))) @ down.astype(c.dtype)


class Block(nn.Module):
    """Attention and MLP, each on the normed stream and added to it."""

    config: "LlamaConfig"

    @nn.compact
    def __call__(self, x: Array, segment_ids: Array, positions: Array) -> Array:
        """`x` (batch, seq, width) -> the same shape."""
        c = self.config
        attention, mlp = rematerialised(Attention, c.remat.attention), rematerialised(MLP, c.remat.mlp)
        x = x + attention(c, name="attention")(
            RMSNorm(c.norm_eps, c.dtype, c.param_dtype, name="attention_norm")(x), segment_ids, positions
        )
        return x + mlp(c, name="mlp")(RMSNorm(c.norm_eps, c.dtype, c.param_dtype, name="mlp_norm")(x))


class Transformer(nn.Module):
    """Tokens to logits."""

    config: "LlamaConfig"

    @nn.compact
    def __call__(self, inputs: dict[str, Array], *, train: bool = False) -> Array:
        """`inputs` holds `tokens`, `segment_ids`, `positions`, each (batch, seq) int32; logits (batch, seq, vocab) float32."""
        c = self.config
        std = nn.initializers.normal(c.init_std)
        table = self.param("embed", _named(std, "vocab", "embed"), (c.vocab_size, c.width), c.param_dtype)
        x = lookup(table.astype(c.dtype), inputs["tokens"])
        block = rematerialised(Block, c.remat.block)
        for i in range(c.num_layers):
            x = block(c, name=f"block_{i}")(x, inputs["segment_ids"], inputs["positions"])
        x = RMSNorm(c.norm_eps, c.dtype, c.param_dtype, name="final_norm")(x)
        head = table
        if not c.tie_embeddings:
            head = self.param("head", _named(std, "vocab", "embed"), (c.vocab_size, c.width), c.param_dtype)
        return unembed(x, head.astype(c.dtype))
