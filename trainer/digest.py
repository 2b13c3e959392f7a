"""Digests of arrays, taken on the devices that hold them: what a checkpoint gives back is what was on the devices.

Checksums of files begin when the bytes are written; what went wrong on the way there, or on the way back, they call right.
A digest here is a pair of sums modulo 2^32 over the words of an array, each word weighted by its place. Integer sums do not
depend on their order, so they are equal on every mesh, and nothing but these two numbers leaves the device.
"""

import zlib
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

SAMPLE = 2**24  # values
WORDS = {"bool", "float16", "bfloat16", "float32", "float64", *(f"{u}int{n}" for u in ("", "u") for n in (8, 16, 32, 64))}
GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: consecutive places get weights that look unrelated


def _mix(x: jax.Array) -> jax.Array:
    """A bijection of uint32 in which each bit of the result depends on each of `x` (finalizer of MurmurHash3, public domain)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _words(x: jax.Array) -> jax.Array:
    """The bits of `x` as uint32, one word per value, or two for 8 bytes, along a new last dim."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)[..., None]
    size = x.dtype.itemsize
    if size >= 4:
        words = jax.lax.bitcast_convert_type(x, jnp.uint32)
        return words if size == 8 else words[..., None]
    return jax.lax.bitcast_convert_type(x, jnp.uint16 if size == 2 else jnp.uint8).astype(jnp.uint32)[..., None]


@jax.jit
def _pair(x: jax.Array) -> jax.Array:
    """The two sums, (2,) uint32.

    In the first the weights are odd, so a change of one word, however small, always shows. The second is not linear in the
    words, so changes that cancel each other in the first do not in it.
    """
    words = _words(x)
    place = jnp.zeros(words.shape, jnp.uint32)
    for dim in range(words.ndim):
        place = place * jnp.uint32(words.shape[dim] & 0xFFFFFFFF) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
    weight = _mix(place * jnp.uint32(GOLDEN) + jnp.uint32(1)) | jnp.uint32(1)
    return jnp.stack([jnp.sum(words * weight, dtype=jnp.uint32), jnp.sum(_mix(words + weight), dtype=jnp.uint32)])


def digests(flat: Mapping[str, Any]) -> dict[str, str]:
    """{path: 16 hex digits} for {path: array}; waits for the devices."""
    pairs = jax.device_get({path: _pair(x) for path, x in flat.items()})  # one small program per shape, not one large one per state
    return {path: "".join(f"{word:08x}" for word in pair.tolist()) for path, pair in pairs.items()}


def choose(flat: Mapping[str, Any], *, step: int, how: Literal["sampled", "full", "off"]) -> dict[str, Any]:
    """The arrays of which a commit keeps a digest.

    Sampled: all, or of a state beyond SAMPLE values every so many of them, others at another step. A pass over a value costs
    about 6 ns of one core; over 16 million about 0.1 s.
    """
    if how == "off":
        return {}
    flat = {path: x for path, x in flat.items() if _has_words(x)}
    paths, groups = sorted(flat), 1
    if how == "sampled":
        # At most one for each array: of arrays that are larger than a sample there would be steps without any.
        groups = min(-(-sum(x.size for x in flat.values()) // SAMPLE), len(paths)) or 1
    first = zlib.crc32(step.to_bytes(8, "little")) % groups
    return {path: flat[path] for path in paths[first::groups]}


def _has_words(x: Any) -> bool:
    """Whether the values can be read as integers of whole bytes: not so complex numbers, 4 bits, and what is no array."""
    return hasattr(x, "dtype") and jnp.dtype(x.dtype).name in WORDS
