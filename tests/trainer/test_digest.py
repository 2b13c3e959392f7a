"""Digests on the devices: of the values and their places, the same on every mesh, and blind to no single change."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.digest import SAMPLE, choose, digests

DTYPES = ("float32", "bfloat16", "int32", "uint8", "bool", "float16", "int8")


def reference(x):
    """The same two sums with numpy's 64-bit integers, one word at a time."""

    def mix(v):
        v = ((v ^ (v >> 16)) * 0x85EBCA6B) % 2**32
        v = ((v ^ (v >> 13)) * 0xC2B2AE35) % 2**32
        return v ^ (v >> 16)

    words = np.asarray(x).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[x.dtype.itemsize]).ravel().tolist()
    weights = [mix((i * 0x9E3779B9 + 1) % 2**32) | 1 for i in range(len(words))]
    first = sum(w * k for w, k in zip(words, weights, strict=True)) % 2**32
    second = sum(mix((w + k) % 2**32) for w, k in zip(words, weights, strict=True)) % 2**32
    return f"{first:08x}{second:08x}"


@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 5), max_size=3), st.integers(0, 2**32 - 1))
def test_a_digest_is_that_of_a_slow_reference(dtype, shape, seed):
    x = np.random.default_rng(seed).integers(0, 2, size=shape).astype(bool)
    if dtype != "bool":
        words = np.random.default_rng(seed).integers(0, 256, size=(*shape, jnp.dtype(dtype).itemsize), dtype=np.uint8)
        x = words.view(jnp.dtype(dtype)).reshape(shape)
    assert digests({"x": jnp.asarray(x)}) == {"x": reference(x)}


@given(st.integers(0, 99), st.integers(0, 31), st.integers(0, 2**32 - 1))
def test_any_one_bit_shows_and_so_do_two_values_that_changed_places(place, bit, seed):
    x = np.random.default_rng(seed).normal(size=(10, 10)).astype(np.float32)
    flipped = x.copy()
    flipped.view(np.uint32).reshape(-1)[place] ^= np.uint32(1 << bit)
    swapped = x.reshape(-1).copy()
    other = (place + 37) % 100
    swapped[[place, other]] = swapped[[other, place]]
    found = {digests({"x": jnp.asarray(y)})["x"] for y in (x, flipped, swapped.reshape(10, 10))}
    assert len(found) == 3


def test_an_array_cut_over_devices_has_the_digest_of_the_whole():
    ran = subprocess.run([sys.executable, "-c", ON_EIGHT_DEVICES], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


ON_EIGHT_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
from jax.sharding import NamedSharding, PartitionSpec as P
from trainer.digest import digests
mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
x = jax.random.normal(jax.random.key(0), (16, 12))
whole = digests({"x": x})
for spec in (P(), P("a"), P("b", "a"), P(None, "b")):
    assert digests({"x": jax.device_put(x, NamedSharding(mesh, spec))}) == whole, spec
"""


def test_a_sample_of_a_large_state_comes_to_every_array_in_some_step_and_stays_within_its_size():
    flat = {f"p{i}": jax.ShapeDtypeStruct((SAMPLE // 4,), jnp.float32) for i in range(16)}
    chosen = [choose(flat, step=step, how="sampled") for step in range(0, 5000, 50)]
    assert set().union(*chosen) == set(flat)
    assert all(sum(x.size for x in c.values()) <= SAMPLE for c in chosen)
    assert choose(flat, step=1, how="full") == flat and choose(flat, step=1, how="off") == {}
    assert choose(dict(list(flat.items())[:4]), step=3, how="sampled").keys() == {"p0", "p1", "p2", "p3"}


def test_of_arrays_larger_than_a_sample_every_commit_still_looks_at_one():
    flat = {f"p{i}": jax.ShapeDtypeStruct((SAMPLE * 8,), jnp.float32) for i in range(4)}
    chosen = [choose(flat, step=step, how="sampled") for step in range(0, 5000, 50)]
    assert all(len(c) == 1 for c in chosen) and set().union(*chosen) == set(flat)
    assert choose({}, step=1, how="sampled") == {}


def test_arrays_without_words_of_their_own_and_plain_numbers_are_left_to_the_checksums_of_files():
    odd = {"complex": jnp.ones(3, jnp.complex64), "nibbles": jnp.ones(4, jnp.int4), "number": 3}
    assert choose({**odd, "plain": jnp.ones(2)}, step=0, how="full").keys() == {"plain"}
