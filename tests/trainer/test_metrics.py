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


def test_the_last_value_stays_where_nothing_follows_it_and_one_that_is_nan_is_seen():
    first, spoilt = window([2.0, np.nan], [1, 1], ("single",))
    nothing = metrics.identity(first)
    for parts, found in [((first, nothing), 2.0), ((nothing, first), 2.0), ((first, spoilt), np.nan), ((nothing, nothing), np.nan)]:
        for host in (lambda w: w, metrics.Window.on_host):
            merged = metrics.merge(*map(host, parts))
            np.testing.assert_equal(metrics.compute(merged.on_host()), {"x_single": found})


@pytest.mark.fault(1)
def test_the_maximum_of_negative_values_is_negative():
    assert fold(window([-3, -2, -5], [1, 1, 1]), np.random.default_rng(0))["x_max"] == -2


@pytest.mark.fault(2)
@pytest.mark.parametrize(("mode", "found"), [("max", 10), ("min", 2)])
def test_the_maximum_of_microbatches_with_maxima_10_and_2_is_10(mode, found):
    a, b = (metrics.parse({"x": {"value": jnp.float32(v), "log_modes": (mode,)}}, ()) for v in (10, 2))
    for step in (metrics.merge_batch(a, b), metrics.merge_batch(b, a)):
        assert metrics.compute(jax.device_get(metrics.window_of(step))) == {f"x_{mode}": found}


def test_the_maximum_of_a_mean_is_that_of_whole_batches_however_they_are_cut():
    a, b = (metrics.parse({"x": {"value": jnp.float32(v), "count": c, "log_modes": ("max",)}}, ()) for v, c in [(10, 1), (2, 3)])
    step = metrics.window_of(metrics.merge_batch(a, b))
    assert metrics.compute(jax.device_get(step))["x_max"] == 3.0  # (10 + 2) / (1 + 3)
    a, b = (metrics.parse({"x": jnp.float32(v)}, ("max",)) for v in (10, 2))  # a mean whose mode is but the default
    assert metrics.compute(jax.device_get(metrics.window_of(metrics.merge_batch(a, b))))["x_max"] == 6.0


microbatches = st.lists(st.tuples(finite, st.integers(0, 50), finite), min_size=1, max_size=4).filter(lambda m: any(c for _, c, _ in m))


@settings(max_examples=40, deadline=None)
@given(st.lists(microbatches, min_size=1, max_size=5), st.integers(0, 2**32 - 1))
def test_any_cut_into_microbatches_steps_and_lives_gives_what_numpy_gives_for_the_whole(steps, seed):
    rng = np.random.default_rng(seed)

    def join(parts, merge):
        parts = list(parts)
        while len(parts) > 1:
            i = rng.integers(len(parts) - 1)
            parts[i : i + 2] = [merge(parts[i], parts[i + 1])]
        return parts[0]

    def parsed(value, count, peak):
        found = {"x": {"value": jnp.float32(value), "count": count, "log_modes": ALL}, "n": {"value": count, "log_modes": ("sum",)}}
        found |= {"top": {"value": jnp.float32(peak), "log_modes": ("max",)}, "low": {"value": jnp.float32(peak), "log_modes": ("min",)}}
        return metrics.parse(found, ())

    windows = [metrics.window_of(join((parsed(*m) for m in step), metrics.merge_batch)) for step in steps]
    for _ in range(rng.integers(3)):  # a life that began or ended here
        windows.insert(rng.integers(len(windows) + 1), metrics.identity(windows[0]))
    got = metrics.compute(jax.device_get(join(windows, metrics.merge)))
    values, counts = (np.array([sum(m[i] for m in step) for step in steps], np.float64) for i in (0, 1))
    peaks = [m[2] for step in steps for m in step]
    each = values / counts
    expected = {"x_mean": values.sum() / counts.sum(), "x": values.sum() / counts.sum(), "x_single": each[-1]}
    expected |= {"x_max": each.max(), "x_min": each.min(), "x_std": each.std(), "x_sum": values.sum()}
    expected |= {"n_sum": counts.sum(), "top_max": max(peaks), "low_min": min(peaks)}
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-5, abs=2e-3), key
    assert (got["n_sum"], got["top_max"], got["low_min"]) == (counts.sum(), max(peaks), min(peaks))  # to the last bit


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=30), st.integers(0, 2**32 - 1))
def test_sums_of_integers_are_exact_far_beyond_32_bits_in_any_grouping(counts, seed):
    windows = [metrics.window_of(metrics.parse({"n": {"value": jnp.int32(c), "log_modes": ("sum",)}}, ())) for c in counts]
    assert fold(windows, np.random.default_rng(seed))["n_sum"] == sum(counts)


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
    with pytest.raises(ValueError, match=r"value of metric 'x' has shape \(2,\)"):
        metrics.parse({"x": jnp.zeros(2)}, ("mean",))
    with pytest.raises(ValueError, match=r"count of metric 'x' has shape \(2,\)"):
        metrics.parse({"x": {"value": 1.0, "count": jnp.ones(2)}}, ("mean",))
    with pytest.raises(ValueError, match=r"'x' has no 'value'"):
        metrics.parse({"x": {"count": 1.0}}, ("mean",))
    with pytest.raises(ValueError, match=r"value of metric 'x' has type str"):
        metrics.parse({"x": "sum"}, ("mean",))
    with pytest.raises(ValueError, match="'median' is none of"):
        metrics.parse({"x": {"value": 1.0, "log_modes": ("median",)}}, ())
