"""Several steps per dispatch: the same bits as one at a time, and borders that do not fit are refused. Steady runs compile nothing."""

import itertools

import jax
import numpy as np
import pytest

from tests.trainer.test_mesh import on_eight_devices
from tests.trainer.test_module import BAD, DATA, VAL, Told, _Failing, equal, poisoned, rows, saving
from tests.trainer.toy import make_trainer
from trainer import LoggerConfig, MeshConfig, loop, metrics
from trainer.callbacks import CheckpointCallbackConfig, EMAConfig
from trainer.checkpoint import verify
from trainer.errors import ConfigError, DataError, DivergedError
from trainer.feed import grouped
from trainer.rows import stable


def told(trainer):
    """The rows that a training of `trainer` will write."""
    one = Told()
    trainer.init_logger = lambda config: setattr(trainer, "loggers", [one])
    return one


def steps_of(per_dispatch, *, until=20, **config):
    """{step: (state, open window)} on the host at the multiples of 10, of a window that is never closed."""
    trainer = make_trainer(noisy=True, steps_per_dispatch=per_dispatch, default_train_log_modes=("mean", "max", "std"), **config)
    batches = map(trainer.put_train, grouped(itertools.cycle(DATA), per_dispatch))
    records = loop.train(
        trainer.train_step,
        trainer.state,
        trainer.init_train_metrics(),
        batches,
        start=0,
        until=until,
        empty=trainer.init_train_metrics,
        closes=lambda step: False,
        per_dispatch=per_dispatch,
    )
    return {r.step: jax.device_get((r.state, r.window)) for r in records if r.step % 10 == 0}


@pytest.mark.parametrize(
    "config",
    [{}, {"gradient_accumulate_steps": 4}, {"gradient_accumulate_steps": 4, "gradient_accumulate_scan": True}, {"on_nonfinite": "skip"}],
    ids=["whole", "microbatches", "scanned microbatches", "skip"],
)
def test_weights_statistics_and_open_windows_have_the_bits_of_one_step_at_a_time(config):
    single = steps_of(1, **config)
    assert len(jax.tree.leaves(single[20])) > 10 and not equal(single[10], single[20])
    for per_dispatch in (2, 5):
        several = steps_of(per_dispatch, **config)
        assert several.keys() == single.keys() == {10, 20}
        for step, found in several.items():
            assert equal(found, single[step]), f"{per_dispatch} steps per dispatch, step {step}"


def test_rows_epochs_and_validations_are_those_of_one_step_at_a_time():
    def run(per_dispatch):
        trainer = make_trainer(steps_per_dispatch=per_dispatch, check_val_every_n_steps=8, logger=LoggerConfig(log_every_n_steps=12))
        found = told(trainer)
        results = trainer.train_model(DATA, VAL, num_train_steps=24)
        return [(split, step, stable(values)) for split, step, values in found.rows], results, jax.device_get(trainer.state)

    single = run(1)
    assert {split for split, _, _ in single[0]} == {"train", "train_epoch", "val"}
    for per_dispatch in (2, 4):
        several = run(per_dispatch)
        assert several[:2] == single[:2] and equal(several[2], single[2])


def test_stopped_and_resumed_at_a_border_it_equals_a_run_of_single_steps(tmp_path):
    def trainer(name, per_dispatch):
        logger = LoggerConfig(log_every_n_steps=6, path=str(tmp_path / name), parts=({"kind": "jsonl"},))
        callbacks = (CheckpointCallbackConfig(every_n_steps=4, after_validation=False),)
        return make_trainer(noisy=True, logger=logger, callbacks=callbacks, steps_per_dispatch=per_dispatch)

    trainer("single", 1).train_model(DATA, None, num_train_steps=24)
    with pytest.raises(RuntimeError, match="power cut"):
        trainer("cut", 2).train_model(_Failing(DATA, after=15), None, num_train_steps=24)
    again = trainer("cut", 2)
    assert again.load_model() == 12
    again.train_model(DATA, None, num_train_steps=24)
    states = [{r["step"]: r["state_sha256"] for r in verify(tmp_path / name)} for name in ("single", "cut")]
    assert states[0] == states[1] and 24 in states[0]
    assert rows(tmp_path / "single") == rows(tmp_path / "cut")


@pytest.mark.parametrize("bad", [4, 5, 6, 10])
def test_a_step_that_is_not_finite_is_found_within_its_dispatch_and_the_state_before_it_kept(bad):
    trainer, good = poisoned(steps_per_dispatch=5), make_trainer()
    batches = list(itertools.islice(itertools.cycle(DATA), 20))
    batches[bad - 1] = BAD
    with pytest.raises(DivergedError, match=f"step {bad} ") as caught:
        trainer.train_model(batches, None, num_train_steps=20)
    good.train_model(itertools.cycle(DATA), None, num_train_steps=bad - 1)
    assert caught.value.step == bad and trainer.global_step == bad - 1 and equal(trainer.state, good.state)


def test_bad_batches_that_are_skipped_are_counted_within_a_dispatch():
    trainer = poisoned(on_nonfinite="skip", steps_per_dispatch=4, logger=LoggerConfig(log_every_n_steps=8))
    found = told(trainer)
    trainer.train_model([DATA[0], BAD, *DATA[2:6], BAD, BAD], None, num_train_steps=8)
    ((_, _, values),) = [row for row in found.rows if row[0] == "train"]
    assert values["skipped_sum"] == 3 and np.isfinite(values["loss_mean"]) and trainer.state.step == 8


@pytest.mark.parametrize(
    ("config", "call", "message"),
    [
        ({}, {"num_train_steps": 10}, r"num_train_steps 10 is no multiple of trainer.steps_per_dispatch 4.*set it to 8 or 12, or .* to 2$"),
        ({}, {"num_epochs": 2, "steps_per_epoch": 6}, r"steps_per_epoch 6 .*set it to 4 or 8"),
        ({"check_val_every_n_steps": 3}, {"num_train_steps": 8}, r"check_val_every_n_steps 3 .*set it to 4, or .* to 1$"),
        ({"logger": LoggerConfig(log_every_n_steps=50)}, {"num_train_steps": 8}, r"log_every_n_steps 50 .*48 or 52"),
    ],
)
def test_borders_within_a_dispatch_are_refused_before_anything_is_trained(config, call, message):
    trainer = make_trainer(steps_per_dispatch=4, **config)
    with pytest.raises(ConfigError, match=message):
        trainer.train_model(DATA, VAL, **call)
    assert trainer.first_step and trainer.global_step == 0


def test_to_go_on_from_within_a_dispatch_is_refused(tmp_path):
    first = saving(tmp_path)
    first.train_model(DATA, None, num_train_steps=6)
    config = first.trainer_config.replace(steps_per_dispatch=4, logger=LoggerConfig(log_every_n_steps=4, path=str(tmp_path)))
    again = type(first)(config, first.model_config, first.optimizer_config, first.exmp_batch)
    assert again.load_model() == 6
    with pytest.raises(ConfigError, match="the step to go on from 6 is no multiple"):
        again.train_model(DATA, None, num_train_steps=8)


def test_a_callback_that_has_to_see_steps_within_a_dispatch_is_refused_by_its_name():
    with pytest.raises(ConfigError, match=r"EMA has to be told of every step, .*steps_per_dispatch to 1"):
        make_trainer(steps_per_dispatch=5, callbacks=(EMAConfig(),))
    with pytest.raises(ConfigError, match=r"CheckpointCallback has to be told of the multiples of 8, .* to 4"):
        make_trainer(steps_per_dispatch=20, callbacks=(CheckpointCallbackConfig(every_n_steps=8),))


def test_an_average_over_the_borders_of_dispatches_is_that_of_single_steps():
    def average(per_dispatch):
        trainer = make_trainer(steps_per_dispatch=per_dispatch, callbacks=(EMAConfig(every_n_steps=4),))
        trainer.train_model(DATA, None, num_train_steps=16)
        return trainer.callbacks[0].get_state()

    assert average(1)["num_updates"] == 4 and equal(average(1), average(4))


def test_without_jit_the_steps_of_a_dispatch_are_done_one_by_one():
    plain, debugged = make_trainer(steps_per_dispatch=4), make_trainer(steps_per_dispatch=4, debug=True)
    for trainer in (plain, debugged):
        trainer.train_model(DATA, None, num_train_steps=4, steps_per_epoch=4)
    for a, b in zip(jax.tree.leaves(plain.state.params), jax.tree.leaves(debugged.state.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


CUT = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 8)
from tests.trainer.toy import make_data, make_trainer
from trainer import MeshConfig
from trainer.params import digest, flatten

out = {}
for data, model in [(8, 1), (4, 2)]:
    for per_dispatch in (1, 4):
        trainer = make_trainer(noisy=True, mesh=MeshConfig(data=data, model=model, fsdp_min_size=0), steps_per_dispatch=per_dispatch)
        trainer.train_model(make_data(), None, num_train_steps=16)
        out[f"{data}x{model}, {per_dispatch}"] = digest(flatten(jax.device_get(trainer.state)))
batches = trainer.put_train(make_data(4))
out["cut"] = [list(x.sharding.shard_shape(x.shape)) for x in jax.tree.leaves(batches)]
print(json.dumps(out))
"""


def test_on_eight_devices_stacked_batches_are_cut_by_their_rows_and_the_bits_are_those_of_single_steps():
    found = on_eight_devices(CUT)
    assert found["cut"] == [[4, 4, 2], [4, 4]]  # (steps, rows of 16 over data=4, ...)
    for mesh in ("8x1", "4x2"):
        assert found[f"{mesh}, 1"] == found[f"{mesh}, 4"]


class OneBuffer:
    """A loader that fills the same memory anew for each batch; where it is aligned to 64 bytes, a CPU would read it where it lies."""

    def __init__(self, offset):
        raw = np.zeros(DATA[0]["inputs"].nbytes + 128, np.uint8)
        start = -raw.ctypes.data % 64 + offset
        self.inputs = raw[start : start + DATA[0]["inputs"].nbytes].view(np.float32).reshape(DATA[0]["inputs"].shape)

    def __iter__(self):
        for batch in DATA:
            self.inputs[:] = batch["inputs"]
            yield {"inputs": self.inputs, "targets": batch["targets"]}
            self.inputs[:] = np.nan


@pytest.mark.parametrize("offset", [0, 4, 16])
@pytest.mark.parametrize("per_dispatch", [1, 2])
def test_a_loader_may_fill_its_buffers_anew_while_the_step_is_running(per_dispatch, offset):
    plain, reusing = (make_trainer(steps_per_dispatch=per_dispatch) for _ in range(2))
    plain.train_model(DATA, None, num_train_steps=40, steps_per_epoch=8)
    reusing.train_model(OneBuffer(offset), None, num_train_steps=40, steps_per_epoch=8)
    assert equal(plain.state, reusing.state)


@pytest.mark.parametrize("per_dispatch", [1, 2])
def test_batches_that_run_dry_or_steps_that_do_not_fit_are_refused_by_train_until_with_a_reason(per_dispatch):
    trainer = make_trainer(steps_per_dispatch=per_dispatch)
    with pytest.raises(DataError, match="no batch for step 3, and 6 is to be reached"):
        list(trainer.train_until(6, DATA[: 1 + per_dispatch]))
    assert trainer.global_step == 2
    if per_dispatch == 2:
        with pytest.raises(ConfigError, match="the step to reach 5 is no multiple"):
            list(trainer.train_until(5, DATA))


@pytest.mark.parametrize("offset", [0, 4])
def test_a_loader_may_fill_its_buffers_anew_while_an_evaluation_is_running(offset):
    trainer = make_trainer()
    many = OneBuffer(offset)
    wanted = trainer.run_evaluation(trainer.weights(trainer.state), DATA * 8)
    for _ in range(5):  # it is a race
        batches = (batch for _ in range(8) for batch in many)
        assert trainer.run_evaluation(trainer.weights(trainer.state), batches) == wanted


def test_batches_that_lie_on_the_device_as_they_should_are_used_as_they_are():
    trainer = make_trainer()
    there = trainer.put(DATA[0])
    found = trainer.put_train((there,))
    assert all(a is b for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(there), strict=True))


@pytest.fixture
def compilations():
    """The names of the programs compiled from here on."""
    found = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(kwargs.get("fun_name", "?"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield found
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("per_dispatch", [1, 2])
def test_asking_for_the_memory_of_a_step_compiles_it_in_place_of_the_first_one(compilations, per_dispatch):
    from trainer.memory import step_memory

    trainer = make_trainer(mesh=MeshConfig(data=1), steps_per_dispatch=per_dispatch)
    step_memory(trainer)
    trainer.train_model(DATA, None, num_train_steps=4)
    assert len([name for name in compilations if "step" in name]) == 1


@pytest.mark.parametrize("per_dispatch", [1, 4])
def test_once_warm_logging_validations_epochs_and_checkpoints_compile_nothing(tmp_path, compilations, per_dispatch):
    trainer = make_trainer(
        noisy=True,
        steps_per_dispatch=per_dispatch,
        check_val_every_n_steps=4,
        logger=LoggerConfig(log_every_n_steps=12, path=str(tmp_path), parts=({"kind": "jsonl"},)),
        callbacks=(CheckpointCallbackConfig(every_n_steps=4), EMAConfig(every_n_steps=4)),
    )
    trainer.train_model(DATA, VAL, num_train_steps=24)
    assert compilations, "the listener hears nothing"
    compilations.clear()
    trainer.train_model(DATA, VAL, num_train_steps=72)
    assert compilations == []


def test_windows_of_the_host_merge_as_those_of_the_device():
    parsed = [
        metrics.parse({"x": {"value": np.float32(v), "count": 3, "log_modes": ("mean", "max", "min", "single", "sum")}}, ())
        for v in (1.7, -4.1)
    ]
    a, b = (metrics.window_of(p) for p in parsed)
    on_device, on_host = metrics.merge(a, b), metrics.merge(jax.device_get(a), jax.device_get(b))
    assert isinstance(on_host.values, np.ndarray) and on_host.values.dtype == np.float32
    np.testing.assert_array_equal(on_device.values, on_host.values)


def test_a_window_of_other_metrics_has_another_name_in_a_checkpoint():
    from trainer.params import flatten

    a, b = (metrics.window_of(metrics.parse({name: 1.0}, ("mean",))) for name in ("loss", "accuracy"))
    assert a.values.shape == b.values.shape and flatten(a).keys() != flatten(b).keys()
