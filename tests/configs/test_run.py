"""RunConfig: what follows from other keys is filled in once, what does not fit is said, and only harmless changes resume."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.execution import ExecutionConfig
from configs.publish import PublishConfig
from configs.run import RunConfig, chunk_ends, config_digest, differences, resume_conflicts, validates
from trainer.config import LoggerConfig, TrainerConfig
from trainer.mesh import MeshConfig
from trainer.models import LlamaConfig
from trainer.optimizers import AdamWConfig, ScheduleConfig

DECAY = "optimizer.schedule.decay_steps"


def parse(**data) -> RunConfig:
    return RunConfig.model_validate(data)


def changed(config: RunConfig, path: str, value) -> RunConfig:
    data = config.to_dict()
    *parents, key = path.split(".")
    place = data
    for parent in parents:
        place = place[parent]
    place[key] = value
    return RunConfig.model_validate(data)


@given(
    seed=st.integers(0, 2**32 - 1),
    num_steps=st.integers(1, 10**6),
    lr=st.floats(0, 10),
    kind=st.sampled_from(["cosine", "linear", "constant"]),
    decay=st.none() | st.integers(1, 10**6),
)
def test_a_resolved_config_read_back_from_its_own_json_is_the_same_config(seed, num_steps, lr, kind, decay):
    schedule = {"lr": lr, "kind": kind, "decay_steps": decay}
    config = parse(seed=seed, num_steps=num_steps, optimizer={"schedule": schedule})
    again = RunConfig.model_validate(json.loads(json.dumps(config.to_dict())))
    assert again == config and again.to_dict() == config.to_dict()
    assert config.trainer.seed == seed
    expected = decay if decay is not None or kind == "constant" else num_steps
    assert config.optimizer.schedule.decay_steps == expected


def test_the_seed_fills_the_trainers_and_the_other_way_round():
    assert parse(seed=3).trainer.seed == 3
    assert parse(trainer={"seed": 4}).seed == 4
    assert parse(seed=5, trainer={"seed": 5}).seed == 5
    assert RunConfig(seed=6, trainer=TrainerConfig(debug=True)).trainer == TrainerConfig(debug=True, seed=6, logger=LoggerConfig())
    for trainer in (0, 2):  # a seed that equals the default counts too when it was written down
        with pytest.raises(ValidationError, match=f"seed 1 and trainer.seed {trainer} differ; set one"):
            parse(seed=1, trainer={"seed": trainer})


def test_rows_are_written_unless_the_logger_is_null():
    assert parse(trainer={"debug": True}).trainer.logger == LoggerConfig()
    config = parse(trainer={"logger": None})
    assert config.trainer.logger is None and RunConfig.model_validate(config.to_dict()).trainer.logger is None


@pytest.mark.parametrize(
    "data, message",
    [
        ({"data": {"tokenizer": {"vocab_size": 5000}}}, r"5000 is above model.vocab_size 4096.*set model.vocab_size=5000 or"),
        ({"model": {"max_positions": 64}}, r"seq_len 128 is above model.max_positions 64; set model.max_positions=128"),
        ({"trainer": {"gradient_accumulate_steps": 3}}, r"batch_size 16 cannot be cut.*gradient_accumulate_steps 3.*batch_size=15"),
        ({"num_steps": 50, "optimizer": {"schedule": {"warmup_steps": 50}}}, r"num_steps 50 .*warmup_steps 50; set .*warmup_steps=5"),
        (
            {"num_steps": 50, "optimizer": {"schedule": {"kind": "wsd", "warmup_steps": 30, "cooldown_steps": 20}}},
            r"num_steps 50 .*warmup_steps 30 and cooldown_steps 20; shorten them or raise num_steps",
        ),
        ({"init": "runs/other"}, r"leave init null"),
        (
            {"trainer": {"steps_per_dispatch": 3}},
            r"num_steps 1000 is no multiple of trainer.steps_per_dispatch 3, .*999 or 1002, or .* to 1",
        ),
        ({"trainer": {"steps_per_dispatch": 4}, "chunk_steps": 250}, r"chunk_steps 250 .*248 or 252, or trainer.steps_per_dispatch to 2"),
        ({"trainer": {"steps_per_dispatch": 10}, "checkpoint": {"every": 25}}, r"checkpoint.every 25 .*20 or 30, or .* to 5"),
        (
            {"trainer": {"steps_per_dispatch": 10, "logger": {"log_every_n_steps": 5}}},
            r"trainer.logger.log_every_n_steps 5 .*set it to 10, or .* to 5",
        ),
        ({"publish": {"kind": "gcs"}}, r"None is no bucket.*publish.url=gs://"),
        ({"publish": {"kind": "gcs", "url": "gs://My Bucket/x"}}, r"gs://My Bucket/x.*lower-case"),
        ({"publish": {"url": "gs://b/x"}}, r"gs://b/x.*is not a folder"),
        ({"publish": {"kind": "none", "url": "/x"}}, r"nothing is published"),
        ({"checkpoint": {"keep_latest": 0}}, r"greater than or equal to 1"),
        ({"name": "../up"}, r"pattern"),
        ({"name": ".hidden"}, r"pattern"),
    ],
)
def test_what_does_not_fit_together_is_named_with_the_way_out(data, message):
    with pytest.raises(ValidationError, match=message):
        RunConfig.model_validate(data)


def test_a_run_may_stop_within_a_warmup_whose_decay_is_given():
    schedule = ScheduleConfig(warmup_steps=100, decay_steps=1000)
    assert RunConfig(num_steps=50, optimizer=AdamWConfig(schedule=schedule)).optimizer.schedule == schedule


def test_a_cooldown_ends_with_the_run_that_it_was_started_for():
    config = parse(num_steps=50, optimizer={"schedule": {"kind": "wsd", "cooldown_steps": 10}})
    assert config.optimizer.schedule.decay_steps == 50
    assert parse(num_steps=50, optimizer={"schedule": {"kind": "inverse_sqrt"}}).optimizer.schedule.decay_steps is None


@given(num_steps=st.integers(1, 500), chunk_steps=st.integers(1, 700))
def test_chunk_ends_are_the_multiples_and_the_last_step(num_steps, chunk_steps):
    expected = [s for s in range(1, num_steps + 1) if s % chunk_steps == 0 or s == num_steps]
    assert chunk_ends(RunConfig(num_steps=num_steps, chunk_steps=chunk_steps)) == expected


def test_the_digest_sees_what_shapes_the_training_and_nothing_else():
    base = RunConfig()
    digest = config_digest(base)
    assert len(digest) == 64 and digest == config_digest(RunConfig.model_validate(base.to_dict()))
    for path, value in [
        ("mesh", MeshConfig(fsdp=2).to_dict()),
        ("execution", ExecutionConfig(mode="inline").to_dict()),
        ("publish", PublishConfig(kind="none").to_dict()),
        ("trainer.logger", None),
    ]:
        assert config_digest(changed(base, path, value)) == digest, path
    for path, value in [("model.width", 64), ("trainer.log_grad_norm", False), ("data.path", "other"), ("num_steps", 7)]:
        assert config_digest(changed(base, path, value)) != digest, path


def test_what_changes_no_bits_may_change_on_resume():
    base = RunConfig()
    for path, value in [
        ("name", "other"),
        ("mesh.fsdp", 4),
        ("execution.numerics", "fast"),
        ("publish.kind", "none"),
        ("trainer.logger.log_every_n_steps", 7),
        ("trainer.logger", None),
    ]:
        assert resume_conflicts(base, changed(base, path, value)) == [], path


def test_conflicts_are_listed_field_by_field_in_order():
    base = RunConfig(model=LlamaConfig(width=64))
    new = changed(changed(base, "trainer.log_grad_norm", False), "model.width", 128)
    assert resume_conflicts(base, new) == ["model.width: 64 -> 128", "trainer.log_grad_norm: true -> false"]
    assert differences(base, base) == []


def test_more_steps_are_a_conflict_exactly_where_the_schedule_follows_them():
    def run(num_steps, **schedule):
        return parse(num_steps=num_steps, optimizer={"schedule": schedule})

    assert resume_conflicts(run(100, kind="constant"), run(200, kind="constant")) == []
    assert resume_conflicts(run(100, decay_steps=150), run(200, decay_steps=150)) == []
    assert resume_conflicts(run(100), run(200, decay_steps=100)) == []
    steps, decay = resume_conflicts(run(100), run(200))
    assert steps == "num_steps: 100 -> 200"
    assert decay.startswith(f"{DECAY}: 100 -> 200") and f"set {DECAY}=100" in decay and "fork" in decay


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_so_many_chunks_are_validated_and_the_last(every):
    config = RunConfig(num_steps=11, chunk_steps=2, validate_every=every)
    by_count = [end for chunk, end in enumerate(chunk_ends(config), 1) if chunk % every == 0 or end == 11]
    assert [end for end in chunk_ends(config) if validates(config, end)] == by_count


ONLY_TRAIN_MODEL = [{"callbacks": [{"kind": "checkpoint"}]}, {"logger": {"path": "x"}}]


@pytest.mark.parametrize("trainer", ONLY_TRAIN_MODEL)
def test_what_only_train_model_has_is_refused_in_a_run_not_ignored(trainer):
    with pytest.raises(ValidationError, match="train_model"):
        RunConfig(trainer=trainer)
