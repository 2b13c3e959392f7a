"""On eight devices: however they are arranged, the same losses; what is cut takes the smaller share of memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import ConfigError
from trainer.mesh import MeshConfig

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


def on_eight_devices(code, *, quick=False):
    """What `code` prints, as JSON. `quick` compiles without optimizing, which takes two thirds of the time."""
    env = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"} if quick else None
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_language_model_has_the_same_losses_on_every_mesh_and_the_smaller_share_where_it_is_cut():
    found = on_eight_devices(LANGUAGE, quick=True)
    reference = found["8x1x1"]["losses"]
    assert reference[-1] < reference[0] - 0.3, "nothing was learnt: this shows nothing"
    for mesh, one in found.items():
        assert max(abs(a - b) for a, b in zip(one["losses"], reference, strict=True)) < 1e-5, mesh
    shares = {mesh: one["share"] for mesh, one in found.items()}
    assert shares["8x1x1"] == 1.0
    assert shares["1x8x1"] < 0.14 and shares["1x1x8"] < 0.14 and shares["2x4x1"] < 0.27 and shares["2x2x2"] < 0.27


PRELUDE = LANGUAGE[: LANGUAGE.index("out = {}")]

DTYPES = (
    PRELUDE
    + """
import re
from trainer import metrics
from trainer.fsdp import cut_dims

def kinds(lowered):
    # {collective: dtypes of what it sends}, of the program as it goes to the compiler; the one on a CPU widens bfloat16 later
    text, found = lowered.as_text(), {"all_gather": [], "reduce_scatter": [], "all_reduce": []}
    for name, types in re.findall(r'"stablehlo\\.(all_gather|reduce_scatter|all_reduce)"(?:.|\\n)*?\\}[>)] : \\((tensor<[^>]*>)', text):
        found[name].append(types[7:-1].split("x")[-1])
    return found

out = {}
both = {"fsdp_gather_dtype": "bfloat16", "fsdp_scatter_dtype": "float32"}
settings = [{}, {"fsdp_gather_dtype": "bfloat16"}, {"fsdp_scatter_dtype": "bfloat16"}, both]
for data, fsdp, model, parts, number in [(2, 4, 1, 1, 0), (1, 8, 1, 1, 1), (1, 8, 1, 2, 2), (1, 8, 1, 2, 3), (2, 2, 2, 1, 3)]:
    trainer = TrainerModule(
        TrainerConfig(enable_progress_bar=False, gradient_accumulate_steps=parts, gradient_accumulate_scan=True),
        LlamaConfig(vocab_size=64, width=64, num_layers=1, num_heads=8, num_kv_heads=8),
        AdamWConfig(schedule=ScheduleConfig(kind="constant", lr=3e-3)),
        batch(0, rows=16),
        objective=LMObjectiveConfig().build(),
        mesh_config=MeshConfig(data=data, fsdp=fsdp, model=model, fsdp_min_size=100, **settings[number]),
    )
    state, rows = trainer.state, []
    collectives = kinds(trainer.train_step.lower(state, trainer.init_train_metrics(), trainer.put_train([batch(0, rows=16)]), True))
    for step in range(4):
        state, window, alive = trainer.train_step(state, trainer.init_train_metrics(), trainer.put_train([batch(step, rows=16)]), True)
        rows.append(metrics.compute(jax.device_get(window)))
    out[f"{data}x{fsdp}x{model} {parts} {number}"] = {
        "rows": rows,
        "collectives": collectives,
        "cut": sum(d >= 0 for d in jax.tree.leaves(cut_dims(trainer.shapes.params))),
        "dtypes": sorted({str(x.dtype) for x in jax.tree.leaves((state.params, state.opt_state)) if x.ndim}),
        "kept": all(x.sharding == s.sharding for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(trainer.shapes))),
        "alive": bool(alive),
    }
print(json.dumps(out))
"""
)


def test_what_fsdp_cuts_is_gathered_and_scattered_in_the_dtypes_asked_for_and_kept_in_float32():
    found = on_eight_devices(DTYPES, quick=True)
    reference = found["2x4x1 1 0"]["rows"]
    assert reference[-1]["loss_mean"] < reference[0]["loss_mean"] - 0.3, "nothing was learnt: this shows nothing"
    wanted = {"2": ("f32", "bf16"), "1": ("bf16", "bf16"), "3": ("bf16", "f32")}  # a gradient comes in the dtype of what it is of
    for name, one in found.items():
        number, cut = name[-1], one["cut"]
        assert one["alive"] and one["kept"] and one["dtypes"] == ["float32"] and cut >= 7, name
        for a, b in zip(one["rows"], reference, strict=True):
            assert a["tokens_sum"] == b["tokens_sum"] and a["accuracy_mean"] == pytest.approx(b["accuracy_mean"], abs=0.02), name
            assert a["loss_mean"] == pytest.approx(b["loss_mean"], abs=1e-5 if number == "0" else 2e-3), name
            assert a["grad_norm_mean"] == pytest.approx(b["grad_norm_mean"], rel=5e-3), name
        if number == "0":
            assert one["collectives"] == {"all_gather": [], "reduce_scatter": [], "all_reduce": []}, "the partitioner's, not ours"
            continue
        gather, scatter = wanted[number]
        times = int(name[-3])  # the first microbatch and the scan's body
        assert one["collectives"]["all_gather"] == [gather] * cut * times, name
        assert one["collectives"]["reduce_scatter"] == [scatter] * cut * times, name
    assert found["1x8x1 1 1"]["rows"] != reference, "a dtype without effect"


NO_DTYPES = """
import json
import jax
jax.config.update("jax_num_cpu_devices", 8)
from tests.trainer.toy import Regression, make_trainer
from trainer import MeshConfig
from trainer.errors import ConfigError

base, said = make_trainer(True), []
for mesh in [MeshConfig(data=1, fsdp=2, model=4, fsdp_min_size=0), MeshConfig(data=4, fsdp=2, fsdp_min_size=0)]:
    try:
        mesh = mesh.replace(fsdp_gather_dtype="bfloat16")
        Regression(base.trainer_config, base.model_config, base.optimizer_config, base.exmp_batch, mesh_config=mesh)
    except ConfigError as e:
        said.append(str(e))
print(json.dumps(said))
"""


def test_dtypes_of_fsdp_are_refused_where_every_device_would_keep_statistics_of_its_own():
    said = on_eight_devices(NO_DTYPES)
    assert len(said) == 2 and all("batch_stats" in one for one in said)


MEMORY = (
    PRELUDE
    + """
import re

out = {}
for data, fsdp, model in [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 4, 1), (2, 2, 2)]:
    trainer = TrainerModule(
        TrainerConfig(enable_progress_bar=False),
        LlamaConfig(vocab_size=512, width=64, num_layers=1, num_heads=8, num_kv_heads=8, mlp_width=192),
        AdamWConfig(),
        batch(0),
        objective=LMObjectiveConfig().build(),
        mesh_config=MeshConfig(data=data, fsdp=fsdp, model=model, fsdp_min_size=0),
    )
    init = jax.jit(trainer._init, out_shardings=jax.tree.map(lambda x: x.sharding, trainer.shapes)).lower().compile()
    state = trainer.state
    held = {d.id: 0 for d in jax.devices()}
    largest = 0
    for x in jax.tree.leaves((state.params, state.opt_state)):
        for shard in x.addressable_shards:
            held[shard.device.id] += shard.data.nbytes
            largest = max(largest, shard.data.nbytes)
    arrays = re.findall(r"\\b[a-z]+[0-9]+\\[([0-9,]+)\\]", init.as_text())  # of the program that each device runs
    used = init.memory_analysis()
    out[f"{data}x{fsdp}x{model}"] = {
        "held": sorted(set(held.values())), "largest": largest, "output": used.output_size_in_bytes,
        "values": max(math.prod(map(int, dims.split(","))) for dims in arrays),
    }
print(json.dumps(out))
"""
)


def bytes_on_each_device(fsdp, model):
    """Of float32 parameters and Adam's two moments, by hand: which dims are cut, and by how much."""
    embed, attention, mlp = 512 * 64, 4 * 64 * 64, 3 * 64 * 192  # all cut by both axes: (vocab|heads|mlp) and embed
    norms = 3 * 64  # whole everywhere
    return 3 * 4 * ((embed + attention + mlp) // (fsdp * model) + norms)


def test_a_state_is_made_in_the_shares_that_each_device_holds_and_nowhere_whole():
    found = on_eight_devices(MEMORY)
    for name, one in found.items():
        _, fsdp, model = map(int, name.split("x"))
        wanted = bytes_on_each_device(fsdp, model)
        counters = 8  # int32 counts of the optimizer, on every device
        assert len(one["held"]) == 1 and wanted <= one["held"][0] <= wanted + counters, (name, one, wanted)
        assert one["output"] <= wanted + 1024, (name, "the compiled init gives more than its share")
        if fsdp * model > 1:
            assert one["largest"] == 512 * 64 * 4 // (fsdp * model), name
        # No array on the way is larger than the largest share: not one that is cut was ever whole, nor gathered.
        assert one["values"] <= 512 * 64 // (fsdp * model), (name, one)


def test_pipelines_are_refused_until_there_are_any():
    with pytest.raises(ConfigError, match="pipeline=2"):
        MeshConfig(pipeline=2).sizes(8)
    with pytest.raises(ConfigError, match="pipeline"):
        MeshConfig(data=1, pipeline=-1).sizes(8)
