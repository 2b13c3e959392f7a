"""Commits are due at multiples of steps, after some time, or as often as it pays."""

import math

import numpy as np
import pytest

from trainer.retention import CheckpointConfig
from trainer.spacing import LEAST, PRIOR, Spacing, between_failures, optimal


def wasted(interval, cost, mtbf, rng):
    """The share of a long time that is lost to commits of `cost` and to failures, by simulation."""
    useful = at = 0.0
    failure = rng.exponential(mtbf)
    while at < 2000 * mtbf:
        if at + interval + cost <= failure:
            useful, at = useful + interval, at + interval + cost
        else:
            at, failure = failure, failure + rng.exponential(mtbf)
    return 1 - useful / at


def test_the_optimal_spacing_loses_less_than_half_and_twice_of_it():
    cost, mtbf = 1.0, 300.0
    best = optimal(cost, mtbf)
    lost = [wasted(best * k, cost, mtbf, np.random.default_rng(0)) for k in (0.4, 1.0, 2.5)]
    assert lost[1] < lost[0] and lost[1] < lost[2]


@pytest.mark.parametrize(("every", "seconds"), [("90s", 90), ("2.5m", 150), ("1h", 3600)])
def test_a_time_between_commits_is_kept(every, seconds):
    now = [0.0]
    spacing = Spacing(CheckpointConfig(every=every).every, list, clock=lambda: now[0])
    now[0] = seconds - 1
    assert not spacing.due(7)
    now[0] = seconds
    assert spacing.due(7)
    spacing.committed(0.1)
    assert not spacing.due(8)


@pytest.mark.parametrize("every", ["10", "soon", "5 m", "-1m", "0.5d", 0])
def test_what_is_no_spacing_is_refused(every):
    with pytest.raises(ValueError, match="every"):
        CheckpointConfig(every=every)


def test_failures_are_counted_over_the_time_that_a_run_was_alive():
    def event(time, kind):
        return {"time": time, "event": kind}

    assert between_failures([], now=0) == PRIOR
    quiet = [event(0, "started"), event(1000, "stopped")]
    assert between_failures(quiet, now=10**6) == PRIOR + 1000  # it lay still after that
    killed = [event(0, "started"), event(50, "killed"), event(100, "committed")]
    assert between_failures(killed, now=200) == (PRIOR + 200) / 2
    gone = [event(0, "started"), event(100, "committed"), event(5000, "started"), event(5100, "finished")]
    assert between_failures(gone, now=10**6) == (PRIOR + 200) / 2


def test_auto_follows_cost_and_failures_and_says_so(caplog):
    caplog.set_level("INFO", logger="trainer.spacing")
    now, events = [0.0], [{"time": 0.0, "event": "started"}]
    spacing = Spacing("auto", lambda: events, clock=lambda: now[0], now=lambda: now[0])
    assert not spacing.due(1)
    spacing.committed(0.5)
    assert "commits every" in caplog.text
    now[0] = math.sqrt(2 * 0.5 * PRIOR) - 1
    assert not spacing.due(2)
    now[0] += 2
    assert spacing.due(2)
    events += [{"time": now[0], "event": "killed"}] * 100
    spacing.committed(0.0001)
    for _ in range(10):
        spacing.committed(0.0001)
    now[0] += LEAST
    assert spacing.due(3)
