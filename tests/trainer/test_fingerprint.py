"""The fingerprint: what bits depend on besides the config, and nothing that changes without them."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from trainer import MeshConfig, backend
from trainer import fingerprint as module
from trainer.fingerprint import differences, fingerprint


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVERSTEP_CACHE", str(tmp_path))
    return tmp_path


def mesh_of(platform):
    """A mesh as far as a fingerprint looks at it."""
    device = SimpleNamespace(platform=platform, device_kind="a card", client=SimpleNamespace(platform_version="1"))
    return SimpleNamespace(devices=np.array([device], object), shape={"data": 1})


def test_on_a_cpu_there_is_nothing_of_a_gpu_in_it_nor_in_the_cache(cache):
    assert "gpu" not in fingerprint(jax.sharding.Mesh(np.array(jax.devices()[:1]), "data"))
    assert list(cache.iterdir()) == []


def test_on_a_gpu_kept_autotuning_has_one_name_until_it_is_lost(cache):
    first = fingerprint(mesh_of("gpu"))
    folder = cache / "xla" / backend.AUTOTUNING
    (folder / "of_a_fusion.textproto").write_text("tuned later, by any run")
    assert differences(first, fingerprint(mesh_of("gpu"))) == []
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    (changed,) = differences(first, fingerprint(mesh_of("gpu")))
    assert changed.startswith("gpu.autotuning: ")


def test_on_a_gpu_driver_and_libraries_are_told_where_they_are_known(cache, monkeypatch):
    packages = [
        SimpleNamespace(name=n, version=v) for n, v in [("nvidia-cudnn-cu13", "9.1"), ("jax-cuda13-plugin", "0.10"), ("numpy", "2")]
    ]
    old = fingerprint(mesh_of("cuda"))
    monkeypatch.setattr(module, "distributions", lambda: packages)
    monkeypatch.setattr(module, "_driver", lambda: "580.1")
    new = fingerprint(mesh_of("cuda"))
    assert new["gpu"]["libraries"] == {"jax-cuda13-plugin": "0.10", "nvidia-cudnn-cu13": "9.1"}
    assert f"gpu.driver: {old['gpu']['driver']} -> 580.1" in differences(old, new)


def test_dtypes_of_fsdp_belong_to_it_only_where_they_are_set():
    assert MeshConfig().dtypes() == {}
    assert MeshConfig(fsdp_scatter_dtype="bfloat16").dtypes() == {"fsdp_scatter_dtype": "bfloat16"}


SET_UP = """
import sys
from trainer import backend
assert backend.numerics() == "fast"
backend.set_up_jax(numerics=sys.argv[1])
assert backend.numerics() == sys.argv[1]
import jax
from jax._src.compiler import get_compile_options
options = get_compile_options(1, 1)  # kept: what it gives does not keep it
text = options.SerializeAsString()
print(sys.argv[2].encode() in text)
"""


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_autotuning_results_are_kept_beside_the_compiled_programs(numerics, cache):
    env = {"PATH": "/usr/bin:/bin", "EVERSTEP_CACHE": str(cache)}
    command = [sys.executable, "-c", SET_UP, numerics, str(cache / "xla" / backend.AUTOTUNING)]
    run = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert run.stdout.strip() == "True", run.stderr
