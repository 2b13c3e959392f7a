"""Step times, throughput and MFU by a clock that the test turns: of the loop alone, whatever else is done in between."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.toy import make_data, make_trainer
from trainer import LoggerConfig, params
from trainer.models import LlamaConfig
from trainer.throughput import Stopwatch, peak_flops, step_seconds, stopwatch


@dataclass
class Record:
    """As the loop gives it."""

    step: int
    settled: bool = False


class Machine:
    """A clock, and a device that takes `seconds` for a step behind it; the loop over it has two steps in flight at most."""

    def __init__(self, seconds, compile_seconds=0.0):
        self.now, self.free, self.seconds, self.compile_seconds = 100.0, 100.0, seconds, compile_seconds

    def clock(self):
        """The time."""
        return self.now

    def loop(self, start, until, settles=lambda step: False):
        """Records of steps, as `trainer.loop.train` times them."""
        before = self.free
        for step in range(start + 1, until + 1):
            self.now += self.compile_seconds
            self.compile_seconds = 0
            last, before = before, max(self.free, self.now) + self.seconds
            self.free = before
            settled = step == until or settles(step)
            self.now = max(self.now, before if settled else last)
            yield Record(step, settled)


def rows(machine, watch, start, until, *, log_every, between, tokens=10.0, settles=lambda step: False):
    """{step: row} of a loop with `between(record)` seconds of other work after each record."""
    found, closed = {}, start - start % log_every
    for record in watch.watch(machine.loop(start, until, settles)):
        done = record.step if record.settled else record.step - 1
        for step in range(closed + 1, done + 1):
            if step % log_every == 0:
                found[step] = watch.row(step, {"tokens_sum": tokens * log_every})
        closed = max(closed, done)
        machine.now += between(record)
    return found


@given(
    seconds=st.floats(0.01, 10),
    callbacks=st.floats(0, 100),
    validation=st.floats(0, 1000),
    compiling=st.floats(0, 100),
    log_every=st.integers(4, 12),
)
def test_neither_compiling_nor_validations_commits_or_slow_callbacks_count_as_step_time(
    seconds, callbacks, validation, compiling, log_every
):
    machine = Machine(seconds, compiling)
    watch = Stopwatch(step=0, clock=machine.clock)

    def between(record):
        return validation if record.settled else callbacks if record.step % log_every == 1 else 0.0

    found = rows(machine, watch, 0, 40, log_every=log_every, between=between, settles=lambda s: s % 10 == 0)
    assert set(found) == {s for s in range(1, 41) if s % log_every == 0}
    for row in found.values():
        assert row["time_step_s"] == pytest.approx(seconds, rel=1e-3, abs=2e-6)
        assert row["throughput_tokens_per_s"] == pytest.approx(10 / seconds, rel=1e-3, abs=0.1)


@pytest.mark.parametrize("busy", [0.0, 0.3, 0.9])
def test_work_on_the_host_that_the_device_hides_makes_no_step_quicker(busy):
    machine = Machine(1.0)
    watch = Stopwatch(step=0, clock=machine.clock)
    found = rows(machine, watch, 0, 9, log_every=1, between=lambda record: 0.0 if record.settled else busy)
    assert [row["time_step_s"] for row in found.values()] == pytest.approx([1.0] * 9)


def test_a_host_that_is_slower_than_the_device_at_every_step_is_what_a_step_takes():
    machine = Machine(1.0)
    watch = Stopwatch(step=0, clock=machine.clock)
    found = rows(machine, watch, 0, 15, log_every=4, between=lambda record: 3.0)
    assert [row["time_step_s"] for row in found.values()] == [3.0] * 3


@given(st.lists(st.floats(0, 5), max_size=12), st.floats(0.01, 20), st.integers(1, 12))
def test_a_step_takes_its_share_of_the_loop_and_of_pauses_none_of_which_counts_for_more_than_a_step(between, loop, steps):
    between = between[:steps]
    found = step_seconds(loop, between, steps)
    assert found <= (loop + sum(between)) / steps + 1e-9
    counted = sum(min(b, found) for b in between)
    if len(between) < steps:
        assert found * steps == pytest.approx(loop + counted)


def test_rows_far_apart_keep_no_list_of_every_step():
    machine = Machine(0.5)
    watch = Stopwatch(step=0, clock=machine.clock)
    found = rows(machine, watch, 0, 5000, log_every=5000, between=lambda record: 0.1)
    assert found[5000]["time_step_s"] == pytest.approx(0.5, rel=1e-3)
    assert len(watch._between) < 1000


def test_a_window_of_two_lives_counts_the_steps_and_tokens_of_this_one_alone():
    machine = Machine(2.0)
    watch = Stopwatch(step=3, tokens=3 * 1000.0, clock=machine.clock)  # an earlier life had other batches
    row, later = rows_of_two(machine, watch)
    assert row["time_step_s"] == later["time_step_s"] == 2.0
    assert row["throughput_tokens_per_s"] == later["throughput_tokens_per_s"] == 5.0


def rows_of_two(machine, watch):
    """The rows of steps 5 and 10 of a life that began after step 3; each of its steps has 10 tokens."""
    for record in watch.watch(machine.loop(3, 10)):
        if record.step - (not record.settled) == 5:
            yield watch.row(5, {"tokens_sum": 3000.0 + 2 * 10})
    yield watch.row(10, {"tokens_sum": 50.0})


def test_a_window_of_several_chunks_counts_all_their_steps_and_nothing_between_them():
    machine = Machine(1.0)
    watch = Stopwatch(step=0, clock=machine.clock)
    for start in (0, 2, 4):
        for record in watch.watch(machine.loop(start, start + 2)):
            machine.now += 50.0 if record.settled else 0.0
        machine.now += 1000.0
    assert watch.row(6, {"tokens_sum": 60.0}) == {"time_step_s": 1.0, "throughput_tokens_per_s": 10.0}


def test_two_rows_that_come_with_one_record_share_its_time():
    machine = Machine(1.0)
    watch = Stopwatch(step=0, clock=machine.clock)
    found = rows(machine, watch, 0, 4, log_every=1, between=lambda record: 0.0, settles=lambda s: s % 2 == 0)
    assert [row["time_step_s"] for row in found.values()] == [1.0] * 4


def test_mfu_is_the_share_of_the_peak_that_the_models_own_flops_take():
    machine = Machine(0.5)
    watch = Stopwatch(step=0, flops_per_token=6e9, peak=2 * 989.4e12, clock=machine.clock)
    (row,) = rows(machine, watch, 0, 4, log_every=4, between=lambda record: 0.0, tokens=65536).values()
    assert row["mfu"] == pytest.approx(65536 / 0.5 * 6e9 / (2 * 989.4e12), abs=1e-4)
    for unknown in ({"flops_per_token": 6e9}, {"peak": 1e12}):
        (row,) = rows(machine, Stopwatch(step=0, clock=machine.clock, **unknown), 0, 4, log_every=4, between=lambda record: 0.0).values()
        assert row.keys() == {"time_step_s", "throughput_tokens_per_s"}


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA T4", None),
        ("TPU v4", 275e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5e", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("TPU v6 lite", 918e12),
        ("TPU v6e", 918e12),
        ("cpu", None),
    ],
)
def test_the_peak_is_that_of_the_kind_of_device_in_bfloat16(kind, peak):
    assert peak_flops(kind, dtype="bfloat16") == peak
    assert peak_flops(kind, dtype="float32") is None


@pytest.mark.parametrize("tied", [True, False])
def test_the_flops_of_a_llama_are_those_of_palms_appendix_over_the_parameters_that_are_multiplied(tied):
    shape = {"vocab_size": 997, "width": 480, "num_layers": 3, "num_heads": 8, "num_kv_heads": 2, "head_dim": 50, "mlp_width": 800}
    config = LlamaConfig(**shape, tie_embeddings=tied)
    inputs = {k: jax.ShapeDtypeStruct((2, 8), jnp.int32) for k in ("tokens", "segment_ids", "positions")}
    shapes = params.flatten(jax.eval_shape(lambda x: config.build().init({"params": jax.random.key(0)}, x), inputs)["params"])
    looked_up = {"embed"} if not tied else set()
    multiplied = sum(x.size for path, x in shapes.items() if path not in looked_up and not path.endswith("scale"))
    assert config.flops_per_token(512) == 6 * multiplied + 12 * 3 * 8 * 50 * 512
    assert config.flops_per_token(512) == pytest.approx(counted_flops(config), rel=0.03)


def counted_flops(config, seq=512):
    """What XLA counts for a training step of two rows, per token and row; its attention does not skip what is masked either."""

    def loss(variables, inputs):
        return jnp.sum(config.build().apply(variables, inputs))

    inputs = {k: jax.ShapeDtypeStruct((2, seq), jnp.int32) for k in ("tokens", "segment_ids", "positions")}
    variables = jax.eval_shape(lambda x: config.build().init({"params": jax.random.key(0)}, x), inputs)
    return jax.jit(jax.grad(loss)).lower(variables, inputs).cost_analysis()["flops"] / (2 * seq)


def test_rows_of_train_model_have_step_times_and_on_a_cpu_no_mfu(tmp_path):
    import json

    logger = LoggerConfig(log_every_n_steps=2, path=str(tmp_path), parts=({"kind": "jsonl"},))
    trainer = make_trainer(logger=logger)
    trainer.train_model(make_data(), None, num_train_steps=5)
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in found if row["split"] == "train"] == [2, 4, 5]
    for row in found:
        assert ("time_step_s" in row) == (row["split"] == "train") and "mfu" not in row and "throughput_tokens_per_s" not in row
    assert stopwatch(trainer, [trainer.desk.window], step=5)._flops_share is None
