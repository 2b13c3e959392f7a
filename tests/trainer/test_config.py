"""Configs: frozen, strict, exact through JSON; meshes and schedules say what does not fit."""

import json
import subprocess
import sys

import numpy as np
import pytest
from pydantic import TypeAdapter, ValidationError

from trainer.config import LoggerConfig, TrainerConfig
from trainer.errors import ConfigError, DivergedError, describe, revive
from trainer.mesh import MeshConfig
from trainer.models import AnyModelConfig, LlamaConfig
from trainer.optimizers import ScheduleConfig


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
