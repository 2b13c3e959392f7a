"""How training works: a jitted, mesh-sharded trainer on JAX, usable by itself and knowing nothing of Prefect.

Names are resolved when first used, so that reading a config imports no jax.
"""

import importlib
from typing import Any

_PUBLIC = {
    "TrainerConfig": ".config",
    "LoggerConfig": ".config",
    "CallbackConfig": ".config",
    "MeshConfig": ".mesh",
    "TrainState": ".state",
    "TrainerModule": ".module",
}
__all__ = ["CallbackConfig", "LoggerConfig", "MeshConfig", "TrainState", "TrainerConfig", "TrainerModule"]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"trainer has no {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_PUBLIC[name], __name__), name)
