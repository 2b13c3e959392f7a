"""Callbacks: what they ask for and keep is a function of steps and rows, wherever lives began; numbers agree with plain NumPy."""

import functools
import logging
import math
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from trainer import metrics
from trainer.callbacks import (
    AnyCallbackConfig,
    CallbackPartConfig,
    CheckpointCallbackConfig,
    EarlyStoppingConfig,
    EMAConfig,
    GradientWatcherConfig,
    LRMonitorConfig,
    Moment,
    ProfilerConfig,
    SummaryConfig,
    ThroughputConfig,
)
from trainer.callbacks.summary import table
from trainer.callbacks.throughput import device_peak_bytes
from trainer.config import TrainerConfig
from trainer.errors import CheckpointError, ConfigError
from trainer.optimizers import AdamWConfig, ScheduleConfig
from trainer.state import TrainState
from trainer.step import empty_window, make_train_step

OPTIMIZER = AdamWConfig(schedule=ScheduleConfig(lr=0.1, warmup_steps=3)).build(num_steps=20)


def state_of(params, step=0):
    return TrainState(jnp.asarray(step, jnp.int32), params, (), {})


def at(step, params=None, **values):
    return Moment(step, 1, state=None if params is None else state_of(params, step), values=values)


def through_a_checkpoint(state):
    """`state` as a checkpoint may give it back: arrays that have been through JAX, so of 32 bits at most."""
    assert all(x.size for x in jax.tree.leaves(state)), "Orbax cannot save an array without values"
    return jax.tree.map(lambda x: jnp.asarray(np.array(x)), state)


class Warnings(logging.Handler):
    """Collects the messages of one logger while it is entered."""

    def __init__(self, name):
        super().__init__()
        self.logger, self.messages = logging.getLogger(name), []

    def emit(self, record):
        self.messages.append(record.getMessage())

    def __enter__(self):
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_):
        self.logger.removeHandler(self)


@functools.cache
def training():
    """A real training step of a linear model that donates its state, and its empty window."""

    def loss(params, apply_fn, batch, rng, train):
        return jnp.mean((batch["x"] @ params["w"] + params["b"] - batch["y"]) ** 2), ({}, {})

    step = make_train_step(loss, lambda *_, **__: None, OPTIMIZER, TrainerConfig())
    empty = jax.device_get(empty_window(step, first_state(), batch=batch_of(0)))
    return jax.jit(step, donate_argnums=(0, 1)), empty


def first_state():
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}
    return TrainState(jnp.zeros((), jnp.int32), params, OPTIMIZER.tx.init(params), {})


def batch_of(step):
    rng = np.random.default_rng(step)
    return {"x": jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), "y": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)}


def train(num_steps):
    """`(step, state, row of that step alone)` of each step."""
    step, empty = training()
    state = first_state()
    for i in range(num_steps):
        state, window, _ = step(state, jax.device_put(empty), batch_of(i))
        yield i + 1, state, metrics.compute(jax.device_get(window))


# The index.


@pytest.mark.parametrize("kind", ["checkpoint", "lr", "profiler", "early_stopping", "ema", "throughput", "summary", "gradient_watcher"])
def test_every_kind_is_found_by_its_name_and_goes_through_json(kind):
    adapter = TypeAdapter(AnyCallbackConfig)
    config = adapter.validate_python({"kind": kind})
    assert adapter.validate_json(config.model_dump_json()) == config
    assert config.build().get_state() is None
    with pytest.raises(ValidationError, match="extra"):
        adapter.validate_python({"kind": kind, "evry": 1})


class Mine(CallbackPartConfig):
    kind: str = f"{__name__}:Mine"


def test_a_callback_of_the_users_own_that_says_no_build_is_named():
    with pytest.raises(NotImplementedError, match="Mine"):
        Mine().build()


def test_reading_the_index_imports_neither_jax_nor_numpy():
    code = "import trainer.callbacks, sys; print([n for n in ('jax', 'numpy') if n in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


# Saving.


@pytest.mark.fault(32)
@pytest.mark.parametrize("every", [None, 1, 3])
@pytest.mark.parametrize("after_validation", [True, False])
def test_saves_are_asked_for_at_multiples_and_after_validations_and_nowhere_else(every, after_validation):
    if every is None and not after_validation:
        with pytest.raises(ValidationError, match="never saves"):
            CheckpointCallbackConfig(after_validation=False)
        return
    callback = CheckpointCallbackConfig(every_n_steps=every, after_validation=after_validation).build()
    asked = [s for s in range(1, 10) if callback.on_training_step(at(s)).save]
    assert asked == {None: [], 1: list(range(1, 10)), 3: [3, 6, 9]}[every]
    assert callback.on_validation_epoch_end(at(4, loss=1.0)).save is after_validation


# The learning rate.


@pytest.mark.fault(13)
def test_lr_is_the_rate_of_the_rows_own_step():
    callback = LRMonitorConfig().build()
    found = [callback.on_row(at(step, **row)).values["lr"] for step, _, row in train(5)]
    assert found[:3] == pytest.approx([0.1 / 3, 0.2 / 3, 0.1])  # warmup over 3 steps
    assert found == pytest.approx([float(OPTIMIZER.schedule(i)) for i in range(5)])
    assert callback.on_row(at(1, loss_mean=1.0)).values == {}


# Early stopping.

VALUES = st.sampled_from([0.1, 0.3, 0.5, 1.0, 1.25, 2.0, math.nan, math.inf, -math.inf])
STOPPING = st.builds(
    EarlyStoppingConfig, mode=st.sampled_from(["min", "max"]), patience=st.integers(1, 4), min_delta=st.sampled_from([0.0, 0.25, 0.6])
)


def stops_by_definition(values, config):
    """Whether the last `patience` of `values` hold no record; a record is finite and beats the record before it by over min_delta."""
    values = [float(np.float32(v)) for v in values]
    gain = (lambda old, new: old - new) if config.mode == "min" else (lambda old, new: new - old)
    records = [i for i, v in enumerate(values) if math.isfinite(v)][:1]
    while records:
        old = values[records[-1]]
        later = [i for i in range(records[-1] + 1, len(values)) if math.isfinite(values[i]) and gain(old, values[i]) > config.min_delta]
        if not later:
            break
        records.append(later[0])
    return len(values) >= config.patience and not any(i >= len(values) - config.patience for i in records)


@settings(deadline=None)
@given(values=st.lists(VALUES, min_size=1, max_size=12), config=STOPPING, stops=st.sets(st.integers(0, 11)), again=st.booleans())
def test_early_stopping_decides_as_defined_wherever_lives_begin(values, config, stops, again):
    callback = config.build()
    for i, value in enumerate(values):
        want = stops_by_definition(values[: i + 1], config)
        assert (callback.on_validation_epoch_end(at(10 * i, loss=value)).stop is not None) is want
        if i in stops:
            saved = through_a_checkpoint(callback.get_state())
            callback = config.build()
            callback.set_state(saved)
            assert (callback.on_training_start(at(10 * i)).stop is not None) is want
            if again:  # the newest step is validated anew after a restore
                assert (callback.on_validation_epoch_end(at(10 * i, loss=value)).stop is not None) is want
            np.testing.assert_array_equal(callback.get_state()["values"], saved["values"])


def test_early_stopping_says_why_and_forgets_what_came_after_a_step_gone_back_to():
    callback = EarlyStoppingConfig(patience=2).build()
    for step, value in [(10, 2.0), (20, 1.5), (30, 1.6)]:
        assert callback.on_validation_epoch_end(at(step, loss=value)).stop is None
    assert (
        callback.on_validation_epoch_end(at(40, loss=math.nan)).stop == "loss was not better in 2 validations; the best is 1.5 at step 20"
    )
    assert callback.on_validation_epoch_end(at(20, loss=1.8)).stop is None
    assert callback.get_state()["steps"].tolist() == [10, 20]
    callback.set_state(None)
    assert callback.get_state() is None and callback.on_training_start(at(0)).stop is None


@pytest.mark.fault(32)
def test_a_monitor_that_no_validation_has_is_refused_at_the_start_and_the_values_there_are_named():
    callback = EarlyStoppingConfig(monitor="los").build()
    with pytest.raises(ConfigError, match=r"'los'.*accuracy, loss"):
        callback.on_training_start(Moment(0, 0, info={"eval_metrics": ["loss", "accuracy"]}))
    with pytest.raises(ConfigError, match=r"'los'.*accuracy, loss"):
        callback.on_validation_epoch_end(at(1, loss=1.0, accuracy=0.5))


# The average of parameters.

CONFIGS = [
    EMAConfig(decay=0.9),
    EMAConfig(decay=0.9, bias_correction="none"),
    EMAConfig(decay=0.7, start_step=5, every_n_steps=2),
    EMAConfig(decay=0.7, start_step=4, every_n_steps=3, bias_correction="none"),
    EMAConfig(decay=0.0),
]


def params_at(step, dtype=jnp.float32):
    """Parameters as they might be after `step` steps."""
    rng = np.random.default_rng(step)
    return {"block": {"w": jnp.asarray(rng.normal(size=(5, 3)), dtype)}, "b": jnp.asarray(rng.normal(size=4), dtype)}


def average_in_float64(params, config):
    """The textbook recursion over the parameters of steps 1, 2, ...: Adam's first moment, or begun at the first parameters."""
    taken = [np.asarray(p, np.float64) for s, p in enumerate(params, 1) if s >= config.start_step and s % config.every_n_steps == 0]
    if not taken:
        return None
    if config.bias_correction == "none":
        return functools.reduce(lambda m, x: config.decay * m + (1 - config.decay) * x, taken)
    m = np.zeros_like(taken[0])
    for x in taken:
        m = config.decay * m + (1 - config.decay) * x
    return m / (1 - config.decay ** len(taken))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_average_is_that_of_the_textbook_at_every_step_of_a_training_that_donates_its_parameters(config):
    callback, seen = config.build(), []
    for step, state, _ in train(11):
        seen.append(jax.tree.map(np.array, state.params))
        callback.on_training_step(Moment(step, 1, state=state))
        found = callback.evaluation_params(state)
        for name in ("w", "b"):
            want = average_in_float64([p[name] for p in seen], config)
            if want is None:
                assert found is None and callback.get_state() is None
            else:
                np.testing.assert_allclose(found[name], want, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("config", [CONFIGS[0], CONFIGS[3]], ids=str)
def test_an_average_stopped_and_resumed_at_any_step_has_the_same_bits(config):
    whole = config.build()
    for step in range(1, 10):
        whole.on_training_step(at(step, params_at(step)))
    want = whole.get_state()
    for stop in range(9):
        callback = config.build()
        for step in range(1, 10):
            callback.on_training_step(at(step, params_at(step)))
            if step == stop:
                saved = through_a_checkpoint(callback.get_state())
                callback = config.build()
                callback.set_state(saved)
                if saved:
                    kept = jax.tree.map(np.array, saved)
                    assert jax.tree.all(jax.tree.map(np.array_equal, callback.get_state(), saved))  # asked for before it is used
                    given_again = callback.evaluation_params(state_of(params_at(step)))
                    assert jax.tree.all(jax.tree.map(np.array_equal, given_again, saved["average"]))
        assert jax.tree.all(jax.tree.map(np.array_equal, callback.get_state(), want)), stop
        if stop and saved:
            assert jax.tree.all(jax.tree.map(np.array_equal, saved, kept)), "what the caller keeps was given away"


def test_parameters_at_rest_are_their_own_average_exactly():
    for correction in ("adam", "none"):
        callback = EMAConfig(decay=0.9999, bias_correction=correction).build()
        params = params_at(0)
        for step in range(1, 400):
            callback.on_training_step(at(step, params))
        assert jax.tree.all(jax.tree.map(np.array_equal, callback.evaluation_params(state_of(params)), params))


def test_narrow_parameters_are_averaged_in_float32_and_given_back_narrow():
    callback = EMAConfig(decay=0.999, bias_correction="none").build()
    for step in range(1, 200):
        params = {"w": jnp.full(3, 1.0 if step == 1 else 2.0, jnp.bfloat16), "count": jnp.asarray(step)}
        callback.on_training_step(at(step, params))
    want = 2 - 0.999**198
    np.testing.assert_allclose(callback.get_state()["average"]["w"], want, rtol=1e-5)
    found = callback.evaluation_params(state_of(params))
    assert found["w"].dtype == jnp.bfloat16 and found["count"] == 199
    np.testing.assert_allclose(np.asarray(found["w"], np.float32), want, rtol=2**-8)


@pytest.mark.parametrize(
    "change", [lambda a: {"b": a["b"]}, lambda a: a | {"b": a["b"][:2]}, lambda a: a | {"b": a["b"].astype(np.float16)}]
)
def test_an_average_of_another_model_is_refused(change):
    callback = EMAConfig().build()
    callback.on_training_step(at(1, params_at(1)))
    saved = through_a_checkpoint(callback.get_state())
    callback.set_state(saved | {"average": change(saved["average"])})
    with pytest.raises(CheckpointError, match="the saved average holds"):
        callback.on_training_step(at(2, params_at(2)))


ON_EIGHT = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec as P
from trainer.callbacks import EMAConfig, Moment
from trainer.callbacks.summary import table
from trainer.mesh import MeshConfig
from trainer.state import TrainState
def layout(mesh):
    return {"w": NamedSharding(mesh, P("fsdp", "model")), "t": NamedSharding(mesh, P(("data", "fsdp"))), "b": NamedSharding(mesh, P())}
mesh, other = MeshConfig(data=2, fsdp=2, model=2).build(), MeshConfig(data=1, fsdp=4, model=2).build()
host = lambda s: {"w": np.full((8, 4), s, np.float32), "t": np.full((8, 2), s, np.float32), "b": np.full(3, s, np.float32)}
state = lambda s, mesh: TrainState(jnp.asarray(s), jax.device_put(host(s), layout(mesh)), (), {})
def follows(callback, mesh, want):
    for k, x in callback.get_state()["average"].items():
        assert x.sharding.is_equivalent_to(layout(mesh)[k], x.ndim), (k, x.sharding)
        np.testing.assert_allclose(x, np.full(x.shape, want), rtol=1e-6)
a = EMAConfig(decay=0.5, bias_correction="none").build()
a.on_training_step(Moment(1, 1, state=state(1, mesh)))
a.on_training_step(Moment(2, 1, state=state(2, mesh)))
follows(a, mesh, 1.5)
old = a.get_state()["average"]
a.on_training_step(Moment(3, 1, state=state(3, mesh)))
assert all(x.is_deleted() for x in old.values()), "the old average was not donated"
follows(a, mesh, 2.25)
for saved in (a.get_state(), jax.device_get(a.get_state())):
    b = EMAConfig(decay=0.5, bias_correction="none").build()
    b.set_state(saved)
    b.evaluation_params(state(3, other))
    follows(b, other, 2.25)
    b.on_training_step(Moment(4, 1, state=state(4, other)))
    follows(b, other, 3.125)
print(table(state(1, mesh)))
"""


def test_on_eight_devices_the_average_lies_as_the_parameters_do_and_follows_them_to_another_mesh_and_the_table_says_how():
    run = subprocess.run([sys.executable, "-c", ON_EIGHT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    cut = {line.split()[0]: line for line in run.stdout.splitlines()}
    assert "  fsdp, model  " in cut["w"] and "  data+fsdp, -  " in cut["t"] and "  whole  " in cut["b"]


# The table.


def counts_in(text):
    """{first column: last column} of a table."""
    return {line.split()[0]: int(line.split()[-1].replace(",", "")) for line in text.splitlines()[1:]}


def test_the_counts_of_the_table_are_those_of_the_parameters_also_of_mere_shapes():
    params = {"embed": jnp.zeros((40, 30)), "block_0": {"mlp": {"up": jnp.zeros((3, 5, 7), jnp.bfloat16)}, "scale": jnp.zeros(())}}
    text = table(state_of(params))
    counts = counts_in(text)
    assert counts.pop("total") == sum(counts.values()) == 40 * 30 + 3 * 5 * 7 + 1
    assert counts == {"block_0.mlp.up": 105, "block_0.scale": 1, "embed": 1200}
    assert "3 x 5 x 7  bfloat16" in text and len({len(line) for line in text.splitlines()}) == 1
    assert table(jax.eval_shape(lambda: state_of(params))) == text


def test_the_table_is_logged_at_the_start(caplog):
    with caplog.at_level(logging.INFO, logger="trainer.callbacks.summary"):
        SummaryConfig().build().on_training_start(at(0, params_at(0)))
    assert caplog.messages == [f"parameters:\n{table(state_of(params_at(0)))}"]


# Traces.


def steps_in_trace(folder):
    """The numbers of the steps in the one trace in `folder`."""
    (path,) = folder.glob("plugins/profile/*/*.xplane.pb")
    events = [e for plane in jax.profiler.ProfileData.from_file(str(path)).planes for line in plane.lines for e in line.events]
    return sorted(dict(e.stats)["step_num"] for e in events if e.name == "a step")


def profile(config, run_dir, *, start=0, until=12):
    """A life from `start` to `until`."""
    callback, x = config.build(), jnp.zeros(())
    callback.on_training_start(Moment(start, 1, state=state_of(x, start), info={"run_dir": str(run_dir)}))
    for step in range(start + 1, until + 1):
        with jax.profiler.StepTraceAnnotation("a step", step_num=step):
            x = x + 1
        callback.on_training_step(at(step, x))
    callback.finalize("success")


def test_the_trace_holds_the_steps_asked_for_and_is_made_once(tmp_path):
    config = ProfilerConfig(first_step=3, num_steps=4)
    profile(config, tmp_path)
    assert steps_in_trace(tmp_path / "profile") == [3, 4, 5, 6]
    profile(config, tmp_path)
    assert steps_in_trace(tmp_path / "profile") == [3, 4, 5, 6]


def test_a_trace_that_is_cut_off_is_kept_and_a_life_begun_in_its_range_traces_the_rest_if_there_is_none(tmp_path):
    config = ProfilerConfig(first_step=1, num_steps=5, path="p")
    profile(config, tmp_path, until=3)
    assert steps_in_trace(tmp_path / "p") == [1, 2, 3]
    profile(config, tmp_path, start=3)
    assert steps_in_trace(tmp_path / "p") == [1, 2, 3]
    profile(config, tmp_path / "killed before", start=3)
    assert steps_in_trace(tmp_path / "killed before" / "p") == [4, 5]
    profile(config, tmp_path / "late", start=5)
    assert not (tmp_path / "late").exists()


# Gradients.

NORMS = st.lists(st.sampled_from([0.1, 1.0, 1.1, 2.0, 3.5, 9.0, 40.0, math.inf, math.nan]), min_size=1, max_size=30)


def warned_by_definition(norms, *, factor, window):
    """Indices of the norms that are warned of."""
    warned = []
    for i, norm in enumerate(norms):
        before = [n for n in np.float32(norms[:i]) if np.isfinite(n)][-window:]
        if len(before) < window or (warned and i < warned[-1] + window):
            continue
        if not np.isfinite(norm) or np.float32(norm) > factor * np.median(np.float64(before)):
            warned.append(i)
    return warned


@settings(deadline=None)
@given(norms=NORMS, window=st.integers(2, 5), stops=st.sets(st.integers(0, 29)))
def test_large_gradients_are_warned_of_once_a_window_wherever_lives_begin(norms, window, stops):
    config = GradientWatcherConfig(factor=1.75, window=window)
    callback, warned = config.build(), []
    for i, norm in enumerate(norms):
        with Warnings("trainer.callbacks.gradient_watcher") as found:
            callback.on_row(at(i, grad_norm_single=norm))
        warned += [i] * len(found.messages)
        if i in stops:
            saved = through_a_checkpoint(callback.get_state())
            callback = config.build()
            callback.set_state(saved)
    assert warned == warned_by_definition(norms, factor=1.75, window=window)


def test_rows_of_a_real_step_can_be_watched_and_rows_without_a_norm_are_an_error():
    callback = GradientWatcherConfig().build()
    for step, _, row in train(2):
        callback.on_row(at(step, **row))
    assert len(callback.get_state()["norms"]) == 2
    with pytest.raises(ConfigError, match="log_grad_norm"):
        callback.on_row(at(3, loss_mean=1.0))


# Memory.


def test_memory_is_that_of_the_process_and_of_the_fullest_device_that_counts():
    values = ThroughputConfig().build().on_row(at(1)).values
    with open("/proc/self/status") as f:
        (peak,) = [int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM")]
    assert values["memory_host_bytes"] == pytest.approx(peak, rel=0.05)
    assert ("memory_device_bytes" in values) is (jax.devices()[0].memory_stats() is not None)
    stats = [{"peak_bytes_in_use": 7}, None, {"peak_bytes_in_use": 9}, {}]
    assert device_peak_bytes([SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]) == 9
    assert device_peak_bytes([SimpleNamespace(memory_stats=lambda: None)]) is None
