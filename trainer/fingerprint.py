"""The fingerprint of an environment: bits are promised where it is equal, and only there."""

import os
from importlib.metadata import version
from typing import Any

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
    }


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
