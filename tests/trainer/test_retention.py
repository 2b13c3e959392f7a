"""Retention: what may never be deleted is not, and the best step is a pure function of the rows."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from trainer.retention import CheckpointConfig, best_step, steps_to_delete

STEPS = st.lists(st.integers(0, 60), unique=True)
CONFIGS = st.builds(CheckpointConfig, keep_latest=st.integers(1, 5), keep_every=st.none() | st.integers(1, 20))
VALUES = st.sampled_from([0.5, 1.0, 2.0, math.nan, math.inf, -math.inf])
ROWS = st.lists(st.tuples(st.integers(0, 9), VALUES), unique_by=lambda row: row[0])


@pytest.mark.fault(26)
@given(steps=STEPS, config=CONFIGS, best=st.none() | st.integers(0, 60), unpublished=st.sets(st.integers(0, 60)))
def test_newest_best_unpublished_and_every_nth_are_never_deleted_and_all_others_are(steps, config, best, unpublished):
    deleted = steps_to_delete(steps, best=best, unpublished=unpublished, config=config)
    newer = {s: sum(other > s for other in steps) for s in steps}
    protected = [
        s
        for s in steps
        if newer[s] < config.keep_latest or s == best or s in unpublished or (config.keep_every and s % config.keep_every == 0)
    ]
    assert deleted == sorted(set(steps) - set(protected))
    assert not steps or max(steps) not in deleted


@given(steps=STEPS, config=CONFIGS, reach=st.integers(0, 30))
def test_what_a_rollback_may_have_to_go_to_is_kept(steps, config, reach):
    deleted = steps_to_delete(steps, best=None, unpublished=(), config=config, reach=reach)
    behind = [s for s in steps if s <= max(steps) - reach]
    assert not behind or max(behind) not in deleted
    assert set(deleted) <= set(steps_to_delete(steps, best=None, unpublished=(), config=config))


@given(steps=STEPS, config=CONFIGS, best=st.none() | st.integers(0, 60), unpublished=st.sets(st.integers(0, 60)))
def test_deleting_twice_deletes_nothing_more(steps, config, best, unpublished):
    left = set(steps) - set(steps_to_delete(steps, best=best, unpublished=unpublished, config=config))
    assert steps_to_delete(sorted(left), best=best, unpublished=unpublished, config=config) == []


@given(rows=ROWS, mode=st.sampled_from(["min", "max"]), order=st.randoms())
def test_the_best_step_is_the_earliest_of_the_finite_extremes_in_whatever_order_rows_come(rows, mode, order):
    finite = {step: value for step, value in sorted(rows) if math.isfinite(value)}
    extreme = (min if mode == "min" else max)(finite.values(), default=None)
    expected = next((step for step, value in finite.items() if value == extreme), None)
    shuffled = order.sample(rows, len(rows))
    config = CheckpointConfig(monitor="bleu", monitor_mode=mode)
    assert best_step([(step, {"bleu": value, "loss": -step}) for step, value in shuffled], config) == expected


def test_rows_without_the_monitored_value_are_never_best():
    assert best_step([(1, {"accuracy": 0.5}), (2, {})], CheckpointConfig()) is None
    assert best_step([(1, {}), (2, {"loss": 3.0})], CheckpointConfig()) == 2


def test_a_root_elsewhere_is_refused_with_the_way_out():
    with pytest.raises(ValidationError, match=r"gs://bucket/x.*leave root null"):
        CheckpointConfig(root="gs://bucket/x")
