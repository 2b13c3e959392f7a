"""Configs: frozen, strict, exact through JSON; meshes and schedules say what does not fit."""

import json
import subprocess
import sys
from typing import Annotated, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from trainer.callbacks import (
    CheckpointCallbackConfig,
    EarlyStoppingConfig,
    EMAConfig,
    GradientWatcherConfig,
    LRMonitorConfig,
    ProfilerConfig,
    SummaryConfig,
    ThroughputConfig,
)
from trainer.config import LoggerConfig, SpikeConfig, TrainerConfig
from trainer.errors import ConfigError, DivergedError, describe, revive
from trainer.loggers import ConsoleLoggerConfig, CsvLoggerConfig, JsonlLoggerConfig, TensorBoardLoggerConfig, WandbLoggerConfig
from trainer.mesh import MeshConfig
from trainer.models import AnyModelConfig, LlamaConfig
from trainer.optimizers import ScheduleConfig
from trainer.retention import CheckpointConfig


@pytest.mark.fault(35)
def test_a_misspelt_key_is_refused():
    with pytest.raises(ValidationError, match="sed"):
        TrainerConfig.model_validate({"sed": 1})


@pytest.mark.fault(35)
def test_from_dict_inverts_to_dict_through_json():
    config = TrainerConfig(seed=3, logger=LoggerConfig(log_every_n_steps=7), default_train_log_modes=("mean", "max"))
    data = json.loads(json.dumps(config.to_dict()))
    assert TrainerConfig.from_dict(TrainerConfig, data) == config
    assert TrainerConfig.from_dict(bool, "False") is False


def configs_of(cls, **given):
    """Any config of a class: each field any value of its type and bounds, save for those that are given."""

    def value(name, field):
        if name in given or not field.metadata:
            return given.get(name) or st.from_type(field.annotation)
        kinds = [a for a in get_args(field.annotation) if a is not type(None)] or [field.annotation]  # bounds are not for None
        some = st.one_of([st.from_type(Annotated[kind, *field.metadata]) for kind in kinds])
        return some if kinds == [field.annotation] else st.none() | some

    fields = {name: value(name, field) for name, field in cls.model_fields.items()}
    return st.fixed_dictionaries(fields).map(cls.model_validate)


EVERY = st.none() | st.integers(1, 1000) | st.sampled_from(["auto", "90s", "2h"])
CALLBACKS = [
    configs_of(CheckpointCallbackConfig, keep=configs_of(CheckpointConfig, root=st.none(), every=EVERY), after_validation=st.just(True)),
    configs_of(EarlyStoppingConfig, min_delta=st.floats(0, 1e300)),
    *map(
        configs_of,
        (EMAConfig, GradientWatcherConfig, LRMonitorConfig, ProfilerConfig, SummaryConfig, ThroughputConfig),
    ),
]
LOGGERS = list(map(configs_of, (ConsoleLoggerConfig, CsvLoggerConfig, JsonlLoggerConfig, TensorBoardLoggerConfig, WandbLoggerConfig)))
TRAINERS = configs_of(
    TrainerConfig,
    logger=st.none() | configs_of(LoggerConfig, parts=st.lists(st.one_of(LOGGERS), max_size=3).map(tuple)),
    callbacks=st.lists(st.one_of(CALLBACKS), max_size=4, unique_by=lambda callback: callback.kind).map(tuple),
    spike=configs_of(SpikeConfig, least_losses=st.integers(2, 32), num_losses=st.integers(32, 1000)),
    check_for_nan=st.just(True),  # with on_spike not every other value goes
    on_nonfinite=st.just("stop"),
)


@pytest.mark.fault(35)
@settings(max_examples=200, deadline=None)
@given(TRAINERS)
def test_any_trainer_config_with_any_parts_comes_back_from_json_as_it_was(config):
    data = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    again = TrainerConfig.from_dict(TrainerConfig, data)
    assert again == config and again.to_dict() == config.to_dict()
    assert [type(c) for c in again.callbacks] == [type(c) for c in config.callbacks]
    for name in TrainerConfig.model_fields:
        assert config.get(name) == getattr(config, name)
    assert config.get("no such field") is None and config.get("no such field", 7) == 7


@pytest.mark.parametrize("value", [float("inf"), 1e308, 1.1])
def test_numbers_that_json_has_not_come_back_all_the_same(value):
    config = TrainerConfig(callbacks=(GradientWatcherConfig(factor=value),))
    data = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    assert TrainerConfig.from_dict(TrainerConfig, data) == config


def dictionaries(data, path=()):
    """The path of every dictionary in nested data."""
    if isinstance(data, dict):
        yield path
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        yield from dictionaries(value, (*path, key))


@pytest.mark.fault(35)
@settings(max_examples=50, deadline=None)
@given(TRAINERS, st.data())
def test_an_unknown_key_is_refused_at_any_depth_unless_it_is_to_be_dropped(config, draw):
    data = config.to_dict()
    place = data
    for key in draw.draw(st.sampled_from(list(dictionaries(data)))):
        place = place[key]
    place["no_such_key"] = 1
    with pytest.raises(ValidationError, match="no_such_key"):
        TrainerConfig.from_dict(TrainerConfig, data)
    if place is data or place is data["logger"]:
        assert TrainerConfig.from_dict(TrainerConfig, data, ignore_extensive_attributes=True) == config


def test_replace_validates_and_leaves_the_original():
    config = TrainerConfig()
    assert config.replace(seed=5).seed == 5 and config.seed == 0
    with pytest.raises(ValidationError):
        config.replace(gradient_accumulate_steps=0)


def test_a_kind_may_be_an_import_path_and_a_bad_one_is_named():
    parse = TypeAdapter(AnyModelConfig).validate_python
    assert parse({"kind": "llama", "width": 64}) == LlamaConfig(width=64)
    with pytest.raises(ConfigError, match="no_such_package:Model"):
        parse({"kind": "no_such_package:Model"})


@pytest.mark.parametrize("change", [{"width": 100, "num_heads": 3}, {"num_heads": 4, "num_kv_heads": 3}, {"head_dim": 7}])
def test_head_shapes_that_cannot_be_are_refused(change):
    with pytest.raises(ValidationError):
        LlamaConfig(**change)


def test_a_mesh_takes_what_is_left_and_says_what_does_not_fit():
    assert MeshConfig(fsdp=2, model=2).sizes(8) == {"data": 2, "fsdp": 2, "pipeline": 1, "model": 2}
    with pytest.raises(ConfigError, match=r"fsdp=3.*8 are present"):
        MeshConfig(fsdp=3).sizes(8)
    with pytest.raises(ConfigError, match="at most one"):
        MeshConfig(fsdp=-1).sizes(8)


def test_the_schedule_warms_up_peaks_and_ends_where_it_says():
    lr = ScheduleConfig(lr=1.0, warmup_steps=4, end_lr_factor=0.1).build(num_steps=100)
    values = np.array([float(lr(i)) for i in range(120)])
    assert values[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert values.argmax() in (3, 4) and (np.diff(values[4:100]) < 0).all()
    assert values[100:] == pytest.approx(np.full(20, 0.1))


def test_an_error_keeps_its_type_step_and_retryability_across_a_process_border():
    error = revive(json.loads(json.dumps(describe(DivergedError("loss is nan", step=7)))))
    assert isinstance(error, DivergedError) and error.step == 7 and not error.retryable
    assert revive(describe(OSError("disk"))).args == ("OSError: disk",)


def test_configs_import_no_jax():
    code = "import sys, trainer.models, trainer.optimizers, trainer.objectives, trainer.mesh; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
