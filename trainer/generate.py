"""Continuing a text, token by token, with the weights of a checkpoint.

The model is run over a window of fixed length for every token, so one program serves all prompts; what slides out of the
window is forgotten.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def make_next_token(apply: Callable, *, temperature: float, top_k: int | None) -> Callable:
    """`(params, tokens, last, key) -> token`: the token after place `last` of `tokens` (1, window) int32; jitted.

    `temperature` 0 is greedy; otherwise it divides the logits, of which the `top_k` highest are kept.
    """

    @jax.jit
    def next_token(params: Any, tokens: jax.Array, last: jax.Array, key: jax.Array) -> jax.Array:
        places = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
        inputs = {"tokens": tokens, "segment_ids": (places <= last).astype(jnp.int32), "positions": places}
        logits = apply({"params": params}, inputs)[0, last].astype(jnp.float32)
        if temperature == 0:
            return jnp.argmax(logits)
        if top_k is not None:
            logits = jnp.where(logits < jax.lax.top_k(logits, top_k)[0][-1], -jnp.inf, logits)
        return jax.random.categorical(key, logits / temperature)

    return next_token


def generate(
    apply: Callable,
    params: Any,
    prompt: Sequence[int],
    *,
    eos_id: int,
    window: int,
    max_tokens: int = 200,
    temperature: float = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
) -> Iterator[int]:
    """The tokens that follow `prompt`, until the end of the document or `max_tokens`. The document begins with the prompt."""
    next_token = make_next_token(apply, temperature=temperature, top_k=top_k)
    tokens = [eos_id, *prompt]
    for i in range(max_tokens):
        seen = tokens[-window:]
        padded = np.zeros((1, window), np.int32)
        padded[0, : len(seen)] = seen
        token = int(next_token(params, padded, len(seen) - 1, jax.random.fold_in(jax.random.key(seed), i)))
        if token == eos_id:
            return
        tokens.append(token)
        yield token
