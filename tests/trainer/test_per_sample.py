"""Metrics of each sample on eight devices, against a plain loop in NumPy over one row at a time."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.toy import make_data, make_trainer
from trainer.errors import DataError

ROOT = Path(__file__).resolve().parent.parent.parent

LANGUAGE = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from trainer import MeshConfig, TrainerConfig, TrainerModule
from trainer.models import LlamaConfig
from trainer.objectives import LMObjectiveConfig
from trainer.optimizers import AdamWConfig

def batch(seed, rows, padded):
    rng = np.random.default_rng(seed)
    inputs, targets = rng.integers(0, 32, (2, rows, 12)).astype(np.int32)
    segments = (np.arange(12) < rng.integers(1, 13, (rows, 1))).astype(np.int32)
    segments[rows - padded:] = 0
    positions = np.broadcast_to(np.arange(12, dtype=np.int32), (rows, 12))
    return {"inputs": inputs, "targets": targets, "segment_ids": segments, "positions": positions}

batches = [batch(0, 16, 0), batch(1, 16, 3), batch(2, 5, 1)]  # the last is divided by no number of devices
out = {}
for data, fsdp, model in [(8, 1, 1), (2, 2, 2)]:
    trainer = TrainerModule(
        TrainerConfig(),
        LlamaConfig(vocab_size=32, width=32, num_layers=1, num_heads=4, init_std=0.3),
        AdamWConfig(),
        batches[0],
        objective=LMObjectiveConfig(log_logit_stats=True).build(),
        mesh_config=MeshConfig(data=data, fsdp=fsdp, model=model, fsdp_min_size=0),
    )
    found = {k: v.tolist() for k, v in trainer.evaluate_per_sample({"a": batches, "b": batches[:1]}).items()}
    out[f"{data}x{fsdp}x{model}"] = {"found": found, "whole": trainer.eval_model(batches, "val", 1)}
loop = {"loss": [], "accuracy": [], "tokens": [], "logits_max": []}
params = jax.device_get(trainer.state.params)
for b in batches:
    for i in range(len(b["inputs"])):
        row = {k: v[i:i + 1] for k, v in b.items()}
        real = row["segment_ids"][0] != 0
        if not real.any():
            continue
        logits = np.asarray(trainer.model.apply({"params": params}, trainer.objective.inputs(row), train=False), np.float64)[0, real]
        targets = row["targets"][0, real]
        nll = np.log(np.exp(logits).sum(-1)) - logits[np.arange(real.sum()), targets]
        loop["loss"].append(nll.mean())
        loop["accuracy"].append(float((logits.argmax(-1) == targets).mean()))
        loop["tokens"].append(int(real.sum()))
        loop["logits_max"].append(logits.max())
print(json.dumps({"loop": loop, "meshes": out}))
"""


def test_values_of_sharded_and_padded_batches_are_those_of_a_loop_over_rows_in_their_order():
    run = subprocess.run([sys.executable, "-c", LANGUAGE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    loop = result["loop"]
    assert len(loop["loss"]) == 16 + 13 + 4 and len(set(loop["loss"])) == 33
    for mesh, one in result["meshes"].items():
        found = one["found"]
        for key, values in loop.items():
            np.testing.assert_allclose(found[f"a_{key}"], values, rtol=2e-5, err_msg=f"{mesh} {key}")
            assert found[f"b_{key}"] == pytest.approx(values[:16], rel=2e-5)
        assert np.average(found["a_loss"], weights=found["a_tokens"]) == pytest.approx(one["whole"]["loss"], rel=1e-5)


@pytest.mark.parametrize("debug", [False, True])
def test_a_mean_loss_without_weights_has_a_value_for_every_row_and_the_state_rests(debug):
    trainer, (batch,) = make_trainer(noisy=True, debug=debug), make_data(1)
    trainer.train_model(make_data(2), None, num_train_steps=2)
    found = trainer.evaluate_per_sample([batch])
    each = [trainer.eval_model([{k: v[i : i + 1] for k, v in batch.items()}], "val", 1)["loss"] for i in range(16)]
    np.testing.assert_allclose(found["loss"], each, rtol=1e-5)
    assert trainer.state.step == 2
    with pytest.raises(DataError, match="no batch"):
        trainer.evaluate_per_sample([])
