"""The toy, whole: it learns the same on every mesh of eight devices, and a life cut off anywhere changes nothing."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
MESHES = {"data=1", "data=2 model=2", "data=2 fsdp=2", "model=8", "fsdp=8", "data=8"}


def test_a_newcomers_regression_takes_fewer_than_forty_lines_and_learns():
    path = Path(__file__).with_name("example.py")
    assert len(path.read_text().splitlines()) < 40
    assert runpy.run_path(str(path))["result"]["val_epoch_12"]["loss"] < 0.1


@pytest.mark.parametrize("kind", ["plain", "noisy"])
def test_on_every_mesh_the_same_curve_and_from_any_stop_the_same_bits_and_on_another_mesh_the_same_curve(kind):
    run = subprocess.run([sys.executable, "-m", "tests.trainer.toy_on_meshes", kind], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = json.loads(run.stdout.splitlines()[-1])
    reference = found["data=1"]["curve"]
    assert len(reference) == 4 and reference[-1] < 0.1 < reference[0]
    for name, one in found.items():
        # Sums over devices are taken in another order; 4e-8 was seen
        assert max(abs(a - b) for a, b in zip(one["curve"], reference, strict=True)) < 1e-6, name
        if "->" not in name:
            assert all(one["same"].values()) and one["after"], (name, one["same"])
    assert {name for name in found if "->" not in name} == MESHES and len(found) == len(MESHES) + 2
