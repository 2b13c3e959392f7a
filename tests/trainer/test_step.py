"""Step and loop: the gradient of the whole batch, nothing poisoned, windows independent of where a life began."""

import functools
import itertools
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.toy import make_data, make_trainer
from trainer import evaluate as evaluation_pass
from trainer import loop, metrics
from trainer.config import LoggerConfig, TrainerConfig
from trainer.errors import DataError, DivergedError
from trainer.models import LlamaConfig
from trainer.objectives import LMObjectiveConfig
from trainer.optimizers import AdamWConfig, ScheduleConfig
from trainer.state import TrainState, make_init, model_rngs
from trainer.step import empty_window, make_eval_step, make_train_step

MODEL = LlamaConfig(vocab_size=17, width=16, num_layers=1, num_heads=2).build()
LOSS = LMObjectiveConfig().build().loss
OPTIMIZER = AdamWConfig(schedule=ScheduleConfig(lr=1e-2, warmup_steps=4)).build(num_steps=40)


def batch_of(step, *, rows=8, seq=6):
    """Rows of a counting language with more padding the lower the row, so that microbatches hold unequal numbers of tokens."""
    rng = np.random.default_rng(step)
    first = rng.integers(0, 17, (rows, 1))
    inputs = (first + np.arange(seq)) % 17
    real = np.arange(seq) < rng.integers(1, seq + 1, (rows, 1))
    return {
        "inputs": jnp.asarray(inputs, jnp.int32),
        "targets": jnp.asarray((inputs + 1) % 17, jnp.int32),
        "segment_ids": jnp.asarray(real, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(seq, dtype=jnp.int32), (rows, seq)),
    }


def evaluate(step, state, batches, *, empty):
    return metrics.compute(jax.device_get(evaluation_pass.run(step, (state.params, state.mutable), batches, empty=empty)))


@functools.cache
def initial() -> TrainState:
    inputs = {k: jax.ShapeDtypeStruct((8, 6), jnp.int32) for k in ("tokens", "segment_ids", "positions")}
    return jax.jit(make_init(lambda x, key: MODEL.init(model_rngs(key), x), OPTIMIZER, inputs, seed=0))()


def fresh() -> TrainState:
    """The state of step 0; nothing here donates it."""
    return initial()


@functools.cache
def stepper(loss=LOSS, **config):
    step = make_train_step(loss, MODEL.apply, OPTIMIZER, TrainerConfig(**config))
    return jax.jit(step), empty_window(step, fresh(), batch=batch_of(0))


def rows_of(*borders, log_every=4, last=14):
    """Train through `borders`, one life each, the open window handed on; all rows and the last state."""
    step, window = stepper()
    state, rows, start_window = fresh(), [], window
    for start, until in itertools.pairwise(borders):
        batches = (batch_of(i) for i in range(start, until))
        closes = lambda s: s % log_every == 0 or s == last  # noqa: E731
        for record in loop.train(
            step, state, window, batches, start=start, until=until, empty=lambda: metrics.identity(start_window), closes=closes
        ):
            state, window = record.state, record.window
            rows += [(at, metrics.compute(w)) for at, w in record.closed]
    return rows, state


@pytest.mark.fault(3)
@pytest.mark.fault(4)
@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("num", [2, 4])
def test_microbatches_with_unequal_tokens_give_the_update_of_the_whole_batch(num, scan):
    whole, window = stepper()
    parts, _ = stepper(gradient_accumulate_steps=num, gradient_accumulate_scan=scan)
    a, wa, _ = whole(fresh(), window, batch_of(5))
    b, wb, _ = parts(fresh(), window, batch_of(5))
    for x, y in zip(jax.tree.leaves(a.params), jax.tree.leaves(b.params), strict=True):
        np.testing.assert_allclose(x, y, atol=2e-4)  # Adam's first update divides by the gradient's own size
    va, vb = metrics.compute(jax.device_get(wa)), metrics.compute(jax.device_get(wb))
    assert va.keys() == vb.keys()
    for key in va:
        assert va[key] == pytest.approx(vb[key], rel=1e-4), key


@pytest.mark.fault(9)
def test_a_step_that_is_not_finite_changes_nothing_and_is_named():
    def poisoned(params, apply_fn, batch, rng, train):
        (total, weight), aux = LOSS(params, apply_fn, batch, rng, train)
        return (jnp.where(batch["inputs"][0, 0] == 99, jnp.inf, 1.0) * total, weight), aux

    step, window = stepper(poisoned)
    bad = batch_of(0)
    bad["inputs"] = bad["inputs"].at[0, 0].set(99)
    state, _, ok = step(fresh(), window, bad)
    assert not ok and state.step == 0
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(fresh()), strict=True):
        np.testing.assert_array_equal(x, y)
    batches = iter([batch_of(0), batch_of(1), bad, batch_of(3), batch_of(4)])
    with pytest.raises(DivergedError) as caught:
        list(loop.train(step, fresh(), window, batches, start=0, until=5, empty=lambda: window, closes=lambda s: s % 2 == 0))
    assert caught.value.step == 3
    assert caught.value.state.step == 2  # what was in flight behind the bad step changed nothing either


@pytest.mark.fault(13)
def test_the_learning_rate_in_a_row_is_that_of_its_step():
    rows, _ = rows_of(0, 3, log_every=1)
    assert [values["lr_single"] for _, values in rows] == pytest.approx([float(OPTIMIZER.schedule(i)) for i in range(3)])


@pytest.mark.fault(21)
def test_rows_and_weights_do_not_depend_on_where_lives_began_and_the_last_window_counts():
    whole, state = rows_of(0, 14)
    pieces, other = rows_of(0, 1, 6, 8, 13, 14)
    assert [step for step, _ in whole] == [4, 8, 12, 14]
    assert whole == pieces
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_row_holds_the_mean_over_all_tokens_of_its_window():
    (row,), _ = rows_of(0, 3, log_every=3)
    each, _ = rows_of(0, 3, log_every=1)
    tokens = [values["tokens_sum"] for _, values in each]
    assert row[1]["tokens_sum"] == sum(tokens) == sum(int((batch_of(i)["segment_ids"] != 0).sum()) for i in range(3))
    assert row[1]["loss_mean"] == pytest.approx(np.average([v["loss_mean"] for _, v in each], weights=tokens), rel=1e-5)


def test_training_learns_and_evaluation_weighs_by_tokens():
    step, window = stepper()
    evaluation = make_eval_step(LOSS, MODEL.apply, TrainerConfig())
    start = fresh()
    empty = empty_window(evaluation, start.params, start.mutable, batch=batch_of(0))
    held_out = [batch_of(1000), batch_of(1001)]
    before = evaluate(evaluation, start, held_out, empty=empty)
    one_by_one = [evaluate(evaluation, start, [b], empty=empty) for b in held_out]
    weights = [v["tokens_sum"] for v in one_by_one]
    assert before["loss"] == pytest.approx(np.average([v["loss"] for v in one_by_one], weights=weights), rel=1e-5)
    for record in loop.train(
        step, start, window, map(batch_of, range(40)), start=0, until=40, empty=lambda: window, closes=lambda s: s == 40
    ):
        state = record.state
    assert evaluate(evaluation, state, held_out, empty=empty)["loss"] < before["loss"] / 2


@pytest.mark.fault(7)
def test_an_evaluation_of_nothing_is_an_error():
    with pytest.raises(DataError, match="no batch"):
        evaluate(lambda *_: None, fresh(), [], empty={})


def test_metrics_that_are_mappings_of_another_kind_than_dictionaries_are_evaluated_as_those_are():
    def frozen(params, apply_fn, batch, rng, train):
        loss, (found, mutable) = LOSS(params, apply_fn, batch, rng, train)
        return loss, (MappingProxyType({k: MappingProxyType(v) if isinstance(v, dict) else v for k, v in found.items()}), mutable)

    state = fresh()
    found = []
    for loss in (LOSS, frozen):
        step = make_eval_step(loss, MODEL.apply, TrainerConfig())
        found.append(evaluate(step, state, [batch_of(0)], empty=empty_window(step, state.params, state.mutable, batch=batch_of(0))))
    assert found[0] == found[1] and "tokens_sum" in found[0]


def test_norms_of_each_parameter_are_those_of_the_row_s_own_step_and_cost_nothing_at_the_others():
    data, config = make_data(), {"log_grad_norm_per_param": True, "log_param_norm_per_param": True}

    def rows_every(steps):
        trainer = make_trainer(logger=LoggerConfig(log_every_n_steps=steps), **config)
        found = []
        for record in trainer.train_until(8, data, closes=lambda step: step % steps == 0, pause=lambda step: True):
            found += [(step, metrics.compute(window), record.state) for step, window in record.closed]
        return {step: (values, state) for step, values, state in found}, trainer

    often, _ = rows_every(1)
    seldom, trainer = rows_every(4)
    assert sorted(seldom) == [4, 8]
    for step, (values, _) in seldom.items():
        mine = {k: v for k, v in values.items() if k.startswith(("grad_norm.", "param_norm."))}
        assert len(mine) == 8 and mine == {k: often[step][0][k] for k in mine}
        for kind in ("grad", "param"):
            squares = sum(v**2 for k, v in mine.items() if k.startswith(f"{kind}_norm."))
            assert squares == pytest.approx(often[step][0][f"{kind}_norm_mean"] ** 2, rel=1e-5)
    text = jax.jit(trainer.create_training_step_function()).lower(trainer.shapes, trainer.window_shapes, trainer.exmp_batch).as_text()
    assert text.count("stablehlo.case") + text.count("stablehlo.if") == 2, "they stand in a branch that is taken when a row is due"
