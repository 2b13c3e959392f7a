"""A run in its directory: however it is cut into lives, the same bits and rows; what does not belong together is refused."""

import math

import jax
import numpy as np
import pytest

from configs.load import to_json
from tasks.session import training_config
from tests.trainer.lives import digests, stable_rows
from trainer import manifest, rows
from trainer.assemble import TrainingConfig, assemble
from trainer.errors import CheckpointError, ConfigError, DataError, StoppedError
from trainer.module import TrainerModule
from trainer.progress import Progress
from trainer.run import add_bits_per_byte
from trainer.rundir import RunDir


@pytest.fixture
def whole(life, tmp_path):
    """A run of one life, for comparison."""
    run = life(tmp_path / "whole")
    assert run.open().step == 0
    for step in (2, 4, 6):
        run.train_until(step)
        run.evaluate(step, "val")
    run.close()
    return tmp_path / "whole"


def test_a_run_of_many_lives_has_the_state_and_rows_of_a_run_of_one(life, whole, tmp_path):
    place = tmp_path / "pieces"
    run = life(place)
    run.open()
    for step in (2, 4, 6):
        run.close()
        run = life(place)  # whatever was in memory is gone
        run.open()
        run.train_until(step)
        run.evaluate(step, "val")
    run.close()
    assert digests(place) == digests(whole)
    assert stable_rows(place) == stable_rows(whole)
    assert {("train", 3), ("train", 6), ("val", 6)} < stable_rows(whole).keys()


@pytest.mark.fault(21)
def test_the_last_window_of_a_run_is_a_row_however_short_it_is(life, tmp_path):
    run = life(tmp_path / "five", "num_steps=5", "chunk_steps=5")
    run.open()
    run.train_until(5)
    run.close()
    found = stable_rows(tmp_path / "five")
    assert found.keys() == {("train", 3), ("train", 5)}
    assert found["train", 5]["tokens_sum"] < found["train", 3]["tokens_sum"]


@pytest.mark.parametrize("logger", ["trainer.logger.parts=[{kind: csv}]", "trainer.logger=null"])
def test_a_run_whose_end_is_moved_has_the_rows_and_bits_of_one_that_had_the_later_end_from_the_start(life, tmp_path, logger):
    schedule = "optimizer.schedule.decay_steps=6"  # which does not depend on the end
    callbacks = "trainer.callbacks=[{kind: gradient_watcher}]"
    for place, ends in (("moved", (5, 8)), ("whole", (8,))):
        for end in ends:
            run = life(tmp_path / place, schedule, callbacks, logger, f"num_steps={end}")
            run.open()
            for step in (5, end):
                run.train_until(step)
            run.close()
            if end == 5:
                assert rows.find(run.run_dir.metrics, "train", 5), "at the end there is a row, however short its window is"
    assert stable_rows(tmp_path / "moved") == stable_rows(tmp_path / "whole")
    assert digests(tmp_path / "moved") == digests(tmp_path / "whole")
    if "csv" in logger:
        table = (tmp_path / "moved" / "metrics-train.csv").read_text().splitlines()[1:]
        assert [line.split(",")[0] for line in table] == ["3", "6", "8"], "and a logger takes back what it was given of the old end"


def test_what_was_trained_after_the_last_commit_leaves_no_row_behind(life, whole, tmp_path):
    place = tmp_path / "cut"
    run = life(place)
    run.open()
    run.train_until(2)
    run.rows.append("train", 3, {"loss_mean": 1.0})  # as if killed between this row and the commit
    run.close()
    run = life(place)
    run.open()
    run.train_until(6)
    run.close()
    assert {k: v for k, v in stable_rows(place).items() if k[0] == "train"} == {
        k: v for k, v in stable_rows(whole).items() if k[0] == "train"
    }


def test_a_stop_is_obeyed_after_the_step_with_a_commit_and_costs_no_bits(life, whole, tmp_path):
    asked = []
    run = life(
        tmp_path / "stopped",
        should_stop=lambda: bool(asked),
        progress=Progress(on_step=lambda step: asked.append(1) if step == 2 else None),
    )
    run.open()
    with pytest.raises(StoppedError) as stopped:
        run.train_until(6)
    assert stopped.value.step == 3 and stopped.value.exit_code == 75
    run.close()
    run = life(tmp_path / "stopped")
    assert run.open().step == 3
    run.train_until(6)
    run.close()
    assert digests(tmp_path / "stopped")[6] == digests(whole)[6]


def test_commits_within_a_chunk_change_no_bits_and_few_of_them_are_kept(life, whole, tmp_path):
    run = life(tmp_path / "often", "checkpoint.every=1", "checkpoint.keep_latest=2")
    run.open()
    run.train_until(6)
    run.close()
    found = digests(tmp_path / "often")
    assert sorted(found) == [0, 3, 4, 5, 6] or sorted(found) == [0, 4, 5, 6]
    assert {s: found[s] for s in (0, 4, 6)} == {s: digests(whole)[s] for s in (0, 4, 6)}
    committed = [e["step"] for e in RunDir(tmp_path / "often").read_events() if e["event"] == "committed"]
    assert committed == [0, 1, 2, 3, 4, 5, 6]


def test_a_commit_that_fails_beside_the_training_ends_it_and_the_one_before_stands(life, tmp_path, monkeypatch):
    run = life(tmp_path / "run", "checkpoint.every=1")
    run.open()
    finish = run.store.finish

    def failing():
        if run.store._saving == 2:
            raise OSError(28, "No space left on device")
        return finish()

    monkeypatch.setattr(run.store, "finish", failing)
    with pytest.raises(OSError, match="No space"):
        run.train_until(6)
    run.close()
    run = life(tmp_path / "run")
    assert run.open().step == 1
    run.close()


PAIRS = ("trainer.steps_per_dispatch=2", "trainer.logger.log_every_n_steps=2")


def test_two_steps_per_dispatch_train_the_bits_of_single_steps_and_stop_at_a_border(life, tmp_path):
    single = life(tmp_path / "single", PAIRS[1])
    single.open()
    single.train_until(6)
    single.close()
    asked = []
    run = life(tmp_path / "pairs", *PAIRS, should_stop=lambda: bool(asked), progress=Progress(on_step=asked.append))
    run.open()
    with pytest.raises(StoppedError) as stopped:
        run.train_until(6)
    run.close()
    assert stopped.value.step == asked[-1] == 4 and 3 not in asked
    run = life(tmp_path / "pairs", *PAIRS)
    run.open()
    run.train_until(6)
    run.close()
    assert digests(tmp_path / "pairs")[6] == digests(tmp_path / "single")[6]
    assert stable_rows(tmp_path / "pairs") == stable_rows(tmp_path / "single")


@pytest.mark.parametrize("overrides", [(), PAIRS], ids=["single steps", "two steps per dispatch"])
def test_once_warm_chunks_with_their_commits_and_evaluations_compile_nothing(life, tmp_path, overrides):
    compiled = []

    def listen(event, duration, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs)

    run = life(tmp_path / "run", *overrides)
    run.open()
    run.train_until(2)
    run.evaluate(2, "val")
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        jax.jit(lambda x: x + len(overrides))(1.0)
        assert len(compiled) >= 1, "the listener hears nothing"
        compiled.clear()
        for step in (4, 6):
            run.train_until(step)
            run.evaluate(step, "val")
        assert compiled == []
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
        run.close()


def test_a_chunk_that_is_committed_returns_at_once_with_its_own_commit(life, whole):
    run = life(whole)
    run.open()
    first = run.train_until(4)
    run.close()
    assert first.manifest_crc32c == manifest.own_crc(whole / "checkpoints" / manifest.name_of(4))


def test_a_damaged_newest_checkpoint_is_set_aside_and_trained_again_to_the_same_state(life, whole, tmp_path):
    before, table = digests(whole), stable_rows(whole)
    folder = whole / "checkpoints" / manifest.name_of(6)
    victim = max(folder.rglob("*"), key=lambda p: p.stat().st_size if p.is_file() else 0)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 4
    victim.write_bytes(bytes(data))
    run = life(whole)
    assert run.open().step == 4
    run.train_until(6)
    run.evaluate(6, "val")
    run.close()
    assert digests(whole) == before and stable_rows(whole) == table
    assert (whole / "damaged" / "6-1").is_dir()


def test_other_data_is_refused_on_resume(life, whole, tmp_path, micro, texts):
    other = tmp_path / "other"
    other.mkdir()
    for file in texts.iterdir():
        (other / file.name).write_text(file.read_text() + " 49")
    run = life(whole, f"data.path={other}")
    with pytest.raises(DataError, match="was trained on data"):
        run.open()
    run.close()


def test_another_environment_is_told_and_on_request_refused(life, whole, monkeypatch):
    monkeypatch.setattr("trainer.run.fingerprint", lambda mesh: {"cores": 512})
    run = life(whole)
    run.open()
    run.close()
    (event,) = [e for e in RunDir(whole).read_events() if e["event"] == "environment_changed"]
    assert any("cores: " in line and "-> 512" in line for line in event["changes"])
    run = life(whole, require_exact=True)
    with pytest.raises(ConfigError, match="require-exact"):
        run.open()
    run.close()


@pytest.mark.fault(32)
def test_a_monitor_that_no_evaluation_gives_is_refused_before_anything_is_trained(life, tmp_path):
    with pytest.raises(ConfigError, match=r"'losss' is no value of an evaluation; choose one of .*bits_per_byte"):
        life(tmp_path / "run", "checkpoint.monitor=losss")


@pytest.mark.fault(25)
def test_evaluating_an_older_step_leaves_the_trained_state_alone(life, whole):
    run = life(whole)
    run.open()
    before = jax.device_get(run.trainer.state.params)
    old = run.evaluate(2, "val")
    assert old["loss"] == pytest.approx(rows.find(whole / "metrics.jsonl", "val", 2)["loss"])
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(run.trainer.state.params), strict=True):
        np.testing.assert_array_equal(a, b)
    run.close()


def test_a_step_behind_the_run_without_a_checkpoint_is_an_error(life, whole):
    run = life(whole)
    run.open()
    with pytest.raises(CheckpointError, match="step 3 has no checkpoint"):
        run.train_until(3)
    run.close()


def test_bits_per_byte_is_the_code_length_of_the_text_over_its_bytes(life, whole):
    run = life(whole)
    split = run.manifest.split("val")
    values = add_bits_per_byte({"loss": 2.0}, run.manifest, "val")
    assert values["bits_per_byte"] == pytest.approx(2.0 / np.log(2) * split.tokens / split.bytes)
    run.close()


def test_every_row_of_a_run_has_the_perplexity_of_its_loss(whole):
    seen = set()
    for (split, _), values in stable_rows(whole).items():
        key = "perplexity_mean" if split == "train" else "perplexity"
        assert values[key] == math.exp(values[key.replace("perplexity", "loss")])
        seen.add(split)
    assert seen == {"train", "val"}


def test_a_trainer_made_from_a_run_s_directory_is_of_the_class_and_computes_as_the_run_s(life, micro, tmp_path):
    overrides = ("trainer.kind=tests.trainer.test_onlookers:Listening", "mesh.fsdp_gather_dtype=bfloat16", "mesh.fsdp_min_size=5")
    run = life(tmp_path / "run", *overrides)
    run.open()
    run.close()
    (tmp_path / "run" / "config.json").write_text(to_json(micro(*overrides)))
    trainer = TrainerModule.load_from_checkpoint(tmp_path / "run")
    assert type(trainer).__name__ == "Listening" and trainer.mesh_config == run.trainer.mesh_config
    assert type(Plain.load_from_checkpoint(tmp_path / "run")) is Plain, "who names a class gets it"


class Plain(TrainerModule):
    """A class of the caller's own."""


@pytest.mark.fault(5)
def test_a_batch_that_the_microbatches_do_not_divide_is_refused_with_the_number_that_fits(micro):
    config = micro()
    training = training_config(config)
    training["trainer"]["gradient_accumulate_steps"] = 3
    with pytest.raises(ConfigError, match="multiple of 3"):
        assemble(TrainingConfig.model_validate(training))


def test_a_mesh_that_the_devices_do_not_fill_is_refused(micro):
    with pytest.raises(ConfigError, match=r"fsdp=3 needs .*3 devices"):
        assemble(TrainingConfig.model_validate(training_config(micro("mesh.fsdp=3"))))
