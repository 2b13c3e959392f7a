"""A program: the toy on eight virtual devices, arranged in every way, cut off and resumed, also on another arrangement.

Prints JSON: for each mesh the curve of validation losses, and whether a life that went on from a checkpoint had the same bits
and rows in the end; for each pair of meshes the curve that began on one and ended on the other.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np

from tests.trainer.toy import make_data, make_trainer
from trainer import LoggerConfig, MeshConfig, rows
from trainer.callbacks import CheckpointCallbackConfig
from trainer.manifest import name_of
from trainer.retention import CheckpointConfig

# Where each is cut off: within a logging window (of 5 steps), within an epoch (of 8), at the end of one.
MESHES = {
    "data=1": (MeshConfig(data=1), 19),
    "data=2 model=2": (MeshConfig(data=2, model=2), 13),
    "data=2 fsdp=2": (MeshConfig(data=2, fsdp=2), 9),
    "model=8": (MeshConfig(data=1, model=8), 15),
    "fsdp=8": (MeshConfig(data=1, fsdp=8), 16),
    "data=8": (MeshConfig(data=8), 22),
}
PAIRS = [("data=8", "data=2 fsdp=2"), ("fsdp=8", "model=8")]
TOTAL = 32


def begin(path, mesh, noisy, saves):
    """A new trainer in a directory that commits at the steps that `saves` divides."""
    return make_trainer(
        noisy,
        mesh.replace(fsdp_min_size=0),
        check_val_every_n_steps=8,
        gradient_accumulate_steps=2,
        default_train_log_modes=("mean", "single", "max", "min", "std"),
        logger=LoggerConfig(log_every_n_steps=5, path=str(path), parts=({"kind": "jsonl"},)),
        callbacks=(CheckpointCallbackConfig(every_n_steps=saves, after_validation=False, keep=CheckpointConfig(keep_latest=100)),),
    )


def train(trainer):
    """To the end: the validation losses of this life, in order."""
    return [v["loss"] for v in trainer.train_model(make_data(), make_data(2, seed=1), num_train_steps=TOTAL).values()]


def resume(whole, path, mesh, noisy, step):
    """A new life after `step` in a copy of a directory, as if all had been cut off there; a trainer that was never trained."""
    shutil.copytree(whole, path)
    for folder in (path / "checkpoints").iterdir():
        if folder.name > name_of(step):
            shutil.rmtree(folder)
    trainer = begin(path, mesh, noisy, TOTAL)
    assert trainer.load_model() == step
    return trainer, train(trainer)


def table(path):
    """All rows, without what depends on the clock."""
    found = [(r["split"], r["step"], rows.stable(rows.values_of(r))) for r in rows.read(path / "metrics.jsonl")]
    assert len({row[:2] for row in found}) == len(found), "a row stands twice"
    return sorted(found, key=lambda row: row[:2])


def equal(a, b):
    """Whether two states have the same bits."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs)


def main(noisy):
    """All of it, for the plain toy or the one with batch norm and dropout."""
    root, out = Path(tempfile.mkdtemp()), {}
    for name, (mesh, stop) in MESHES.items():
        whole = begin(root / name, mesh, noisy, stop)
        curve = train(whole)
        again, rest = resume(root / name, root / f"{name} again", mesh, noisy, stop)
        same = {
            field: equal(getattr(whole.state, field), getattr(again.state, field)) for field in ("params", "opt_state", "mutable", "step")
        }
        same["rows"] = table(root / name) == table(root / f"{name} again") and len(table(root / name)) == 15
        out[name] = {"curve": curve, "same": same, "after": rest == curve[stop // 8 :]}
    for a, b in PAIRS:
        stop = MESHES[a][1]
        _, rest = resume(root / a, root / f"{a} {b}", MESHES[b][0], noisy, stop)
        out[f"{a} -> {b}"] = {"curve": out[a]["curve"][: stop // 8] + rest}
    shutil.rmtree(root)
    return out


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(json.dumps(main(sys.argv[1] == "noisy")))
