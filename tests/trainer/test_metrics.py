"""Metrics against numpy in float64, over any grouping of steps and microbatches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer import metrics

ALL = ("mean", "mean_nopostfix", "single", "max", "min", "std", "sum")
finite = st.floats(-1e3, 1e3, width=32)


def window(values, counts, modes=ALL):
    return [
        metrics.window_of(metrics.parse({"x": {"value": jnp.float32(v), "count": c, "log_modes": modes}}, ()))
        for v, c in zip(values, counts, strict=True)
    ]


def fold(windows, rng):
    """Merge neighbours in a random order until one is left."""
    windows = list(windows)
    while len(windows) > 1:
        i = rng.integers(len(windows) - 1)
        windows[i : i + 2] = [metrics.merge(windows[i], windows[i + 1])]
    return metrics.compute(jax.device_get(windows[0]))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(finite, st.integers(1, 50)), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_any_grouping_of_steps_gives_what_numpy_gives(steps, seed):
    values = np.array([v for v, _ in steps], np.float64)
    counts = np.array([c for _, c in steps], np.float64)
    got = fold(window(values, [int(c) for c in counts]), np.random.default_rng(seed))
    each = values / counts
    expected = {
        "x_mean": values.sum() / counts.sum(),
        "x": values.sum() / counts.sum(),
        "x_single": each[-1],
        "x_max": each.max(),
        "x_min": each.min(),
        "x_std": each.std(),
        "x_sum": values.sum(),
    }
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-5, abs=1e-3), key


@pytest.mark.fault(1)
def test_the_maximum_of_negative_values_is_negative():
    assert fold(window([-3, -2, -5], [1, 1, 1]), np.random.default_rng(0))["x_max"] == -2


@pytest.mark.fault(2)
def test_a_maximum_over_microbatches_is_that_of_the_whole_batch():
    a, b = (metrics.parse({"x": {"value": jnp.float32(v), "count": c, "log_modes": ("max",)}}, ()) for v, c in [(10, 1), (2, 3)])
    step = metrics.window_of(metrics.merge_batch(a, b))
    assert metrics.compute(jax.device_get(step))["x_max"] == 3.0  # (10 + 2) / (1 + 3)


@pytest.mark.fault(6)
def test_token_counts_stay_exact_beyond_int32():
    tokens = metrics.lift(jnp.int32(2**31 - 1))
    total = tokens
    for _ in range(40):
        total = metrics.add(total, tokens)
    assert metrics._number(jax.device_get(total)) == 41 * (2**31 - 1)


@pytest.mark.fault(7)
def test_a_mean_over_nothing_is_nan():
    assert np.isnan(fold(window([0.0], [0], ("mean",)), np.random.default_rng(0))["x_mean"])


def test_small_addends_are_not_lost_in_a_large_sum():
    total = jax.lax.fori_loop(0, 10_000, lambda _, s: metrics.add(s, metrics.lift(jnp.float32(0.25))), metrics.lift(jnp.float32(2**26)))
    assert metrics._number(jax.device_get(total)) == 2**26 + 2_500


def test_a_vector_and_an_unknown_mode_are_refused_by_name():
    with pytest.raises(ValueError, match=r"'x' has shape \(2,\)"):
        metrics.parse({"x": jnp.zeros(2)}, ("mean",))
    with pytest.raises(ValueError, match="'median' is none of"):
        metrics.parse({"x": {"value": 1.0, "log_modes": ("median",)}}, ())
