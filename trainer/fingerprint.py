"""The fingerprint of an environment: bits are promised where it is equal, and only there."""

import os
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Any

from .backend import autotuning_id

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def fingerprint(mesh: Any) -> dict[str, Any]:
    """What the bits of a run depend on besides its config: software, device kind, mesh, visible cores. JSON types."""
    devices = mesh.devices.ravel()
    return {
        "versions": {name: version(name) for name in PACKAGES},
        "xla_flags": " ".join(sorted(os.environ.get("XLA_FLAGS", "").split())),
        "platform": devices[0].client.platform_version,
        "device_kind": devices[0].device_kind,
        "mesh": dict(mesh.shape),
        "cores": len(os.sched_getaffinity(0)),
        **({"gpu": _of_a_gpu()} if devices[0].platform in ("gpu", "cuda") else {}),
    }


def _of_a_gpu() -> dict[str, Any]:
    """What chooses the kernels on an NVIDIA card: driver, libraries and plugins as installed, and the kept autotuning results."""
    installed = {d.name.lower(): d.version for d in distributions() if d.name}
    libraries = {k: v for k, v in sorted(installed.items()) if k.startswith(("jax-cuda", "nvidia-cudnn", "nvidia-cublas"))}
    return {"driver": _driver(), "libraries": libraries, "autotuning": autotuning_id()}


def _driver() -> str:
    path = Path("/sys/module/nvidia/version")
    return path.read_text().strip() if path.exists() else "unknown"


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line, `what: old -> new`, for each entry in which two fingerprints differ."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += [f"{key}.{line}" for line in differences(a, b)]
        elif a != b:
            out.append(f"{key}: {a} -> {b}")
    return out
