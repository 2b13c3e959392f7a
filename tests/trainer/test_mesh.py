"""On eight devices: however they are arranged, the same losses; what is cut takes the smaller share of memory."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

LANGUAGE = """
import json, math
import jax
jax.config.update("jax_num_cpu_devices", 8)
import numpy as np
from trainer import MeshConfig, TrainerConfig, TrainerModule
from trainer.models import LlamaConfig
from trainer.objectives import LMObjectiveConfig
from trainer.optimizers import AdamWConfig, ScheduleConfig

def batch(step, rows=8, seq=16):
    rng = np.random.default_rng(step)
    tokens = (rng.integers(0, 64, (rows, 1)) + np.arange(seq + 1)) % 64
    segments = (np.arange(seq) < rng.integers(1, seq + 1, (rows, 1))).astype(np.int32)
    positions = np.broadcast_to(np.arange(seq, dtype=np.int32), (rows, seq))
    inputs, targets = tokens[:, :-1].astype(np.int32), tokens[:, 1:].astype(np.int32)
    return {"inputs": inputs, "targets": targets, "segment_ids": segments, "positions": positions}

out = {}
for data, fsdp, model in [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 2, 2)]:
    trainer = TrainerModule(
        TrainerConfig(enable_progress_bar=False, check_val_every_n_steps=1, check_val_every_n_epoch=-1),
        LlamaConfig(vocab_size=64, width=64, num_layers=2, num_heads=8, num_kv_heads=8),
        AdamWConfig(schedule=ScheduleConfig(kind="constant", lr=3e-3)),
        batch(0),
        objective=LMObjectiveConfig().build(),
        mesh_config=MeshConfig(data=data, fsdp=fsdp, model=model, fsdp_min_size=0),
    )
    result = trainer.train_model([batch(step) for step in range(10)], [batch(1000)], num_train_steps=10)
    losses = [values["loss"] for values in result.values()]
    share = sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(trainer.state))
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trainer.state))
    out[f"{data}x{fsdp}x{model}"] = {"losses": losses, "share": share / whole}
print(json.dumps(out))
"""


def on_eight_devices(code):
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_language_model_has_the_same_losses_on_every_mesh_and_the_smaller_share_where_it_is_cut():
    found = on_eight_devices(LANGUAGE)
    reference = found["8x1x1"]["losses"]
    assert reference[-1] < reference[0] - 0.3, "nothing was learnt: this shows nothing"
    for mesh, one in found.items():
        assert max(abs(a - b) for a, b in zip(one["losses"], reference, strict=True)) < 1e-4, mesh
    shares = {mesh: one["share"] for mesh, one in found.items()}
    assert shares["8x1x1"] == 1.0
    assert shares["1x8x1"] < 0.14 and shares["1x1x8"] < 0.14 and shares["2x4x1"] < 0.27 and shares["2x2x2"] < 0.27
