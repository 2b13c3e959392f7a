"""Spikes: which loss is one, by a computation of its own; and what becomes of its step, wherever lives begin."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.trainer.toy import make_data, make_trainer
from trainer.config import SpikeConfig, TrainerConfig
from trainer.errors import ConfigError, DivergedError
from trainer.spikes import limit_of

DATA = make_data(24)
SPIKE = {"num_losses": 8, "least_losses": 4, "deviations": 6.0}
LOSSES = st.floats(-100, 100, width=32) | st.sampled_from([np.inf, -np.inf, np.nan])


def expected_limit(losses, config):
    """By the definition, over the losses that are finite."""
    known = np.array([x for x in losses if np.isfinite(x)], np.float64)
    if len(known) < config.least_losses:
        return np.inf
    median = np.median(known)
    return median + config.deviations * max(1.4826 * np.median(np.abs(known - median)), 0.01 * abs(median))


@settings(max_examples=60)
@given(losses=st.lists(LOSSES, min_size=8, max_size=8), least=st.integers(2, 8))
def test_the_limit_is_that_of_median_and_median_deviation_of_the_finite_losses(losses, least):
    config = SpikeConfig(**{**SPIKE, "least_losses": least})
    found = float(jax.jit(lambda x: limit_of(x, config))(np.array(losses, np.float32)))
    assert found == pytest.approx(expected_limit(np.array(losses, np.float32), config), rel=1e-4, abs=1e-3)


def poisoned(*steps, by=30.0):
    """The data with targets that no model could have foreseen in the batches of these steps."""
    return [{**batch, "targets": batch["targets"] + by} if i in steps else batch for i, batch in enumerate(DATA, 1)]


def trained(trainer, batches, *, begin=0):
    """Train step by step from step `begin` on; for each whether its update was made, and its loss, computed beside it."""
    before = jax.jit(lambda params, batch: trainer.loss_function(params, trainer.model.apply, batch, jax.random.key(0))[0])
    found = []
    for batch in batches[begin:]:
        state = jax.device_get(trainer.state)
        loss = float(before(state.params, batch))
        (record,) = trainer.train_until(trainer.global_step + 1, iter([batch]))
        found.append((not equal(state.params, record.state.params), loss))
    return found


def equal(a, b):
    a, b = jax.device_get((a, b))
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def test_a_step_is_skipped_exactly_where_its_loss_is_above_the_limit_of_those_before_it():
    config = SpikeConfig(**SPIKE)
    trainer, judged, history = make_trainer(on_spike="skip", spike=config), [], []
    for updated, loss in trained(trainer, poisoned(3, 9, 10, 20)):
        judged.append(loss <= expected_limit(history[-8:], config))
        history.append(loss)
        assert updated == judged[-1], f"step {len(history)}"
    assert [step for step, fine in enumerate(judged, 1) if not fine] == [9, 10, 20], "at step 3 too little is known"
    assert int(trainer.state.step) == 24


def test_what_is_judged_does_not_depend_on_where_lives_begin_or_on_dispatches():
    def make(**config):
        return make_trainer(on_spike="skip", spike=SpikeConfig(**SPIKE), **config)

    batches, whole, again, grouped = poisoned(9, 10, 20), make(), make(), make(steps_per_dispatch=4)
    list(whole.train_until(24, iter(batches)))
    for end in (7, 9, 15, 24):
        list(again.train_until(end, iter(batches[again.global_step :])))
        held = jax.device_get(again.state)
        again = make()
        again.state, again.global_step = jax.device_put(held, jax.tree.map(lambda x: x.sharding, again.shapes)), end
    list(grouped.train_until(24, iter(batches)))
    assert equal(again.state, whole.state) and equal(grouped.state, whole.state)
    blind = make_trainer()
    list(blind.train_until(24, iter(batches)))
    assert not equal(blind.state.params, whole.state.params), "nothing was skipped: this shows nothing"


@pytest.mark.parametrize("on_spike", ["stop", "rollback"])
@pytest.mark.parametrize(("by", "message"), [(30.0, r"of step 9, .*, is a spike: .* from the 8 losses"), (np.inf, "step 9 are not finite")])
def test_a_spike_that_is_not_skipped_is_an_error_with_the_state_before_it(on_spike, by, message):
    trainer, good = make_trainer(on_spike=on_spike, spike=SpikeConfig(**SPIKE)), make_trainer()
    with pytest.raises(DivergedError, match=message) as caught:
        list(trainer.train_until(24, iter(poisoned(9, by=by))))
    list(good.train_until(8, iter(DATA)))
    assert caught.value.step == 9 and equal(dataclasses.replace(caught.value.state, losses=None), good.state)


def test_weights_without_spikes_are_those_of_a_training_that_does_not_look_for_any():
    looking, plain = make_trainer(on_spike="stop", spike=SpikeConfig(**SPIKE)), make_trainer()
    for trainer in (looking, plain):
        list(trainer.train_until(24, iter(DATA)))
    assert equal(looking.state.params, plain.state.params)
    assert "losses" not in "".join(map(str, jax.tree_util.tree_flatten_with_path(plain.state)[0])), "and it keeps nothing for it"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"on_spike": "rollback", "on_nonfinite": "skip"}, "leave on_nonfinite out"),
        ({"on_spike": "stop", "check_for_nan": False}, "check_for_nan is off"),
        ({"spike": {"least_losses": 9, "num_losses": 8}}, "set num_losses=9"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(config, message):
    with pytest.raises(ValidationError, match=message):
        TrainerConfig(**config)


def test_a_training_without_commits_to_go_back_to_is_refused():
    with pytest.raises(ConfigError, match="can stop or skip"):
        make_trainer(on_spike="rollback").train_model(DATA, None, num_train_steps=8)
