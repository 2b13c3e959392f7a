"""Settings of JAX that a run depends on, made before its backend starts."""

import os
import secrets
from pathlib import Path

from .paths import cache_dir

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

AUTOTUNING = "xla_gpu_per_fusion_autotune_cache_dir"  # XLA's name for the results, and JAX's for the folder beside the programs


def compiled_dir() -> Path:
    """Where compiled programs are kept."""
    return cache_dir() / "xla"


def autotuning_id() -> str:
    """The name of the collection of autotuning results on this machine, made with it.

    Results are added and never replaced, so under one name whatever was tuned stays so. A digest of them would change with every
    program that is compiled, other runs' too. Where the collection is lost the next one has another name.
    """
    path = compiled_dir() / AUTOTUNING / "id"
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with path.open("x") as file:
            file.write(secrets.token_hex(8))
    except FileExistsError:
        pass
    return path.read_text()


def numerics() -> str:
    """What this process was set up for: `exact` or `fast`. It is read off XLA's flags, which are part of the fingerprint."""
    return "exact" if DETERMINISTIC in os.environ.get("XLA_FLAGS", "").split() else "fast"


def set_up_jax(*, numerics: str) -> None:
    """Settings before the backend starts: deterministic operations, and compiled programs kept for the next process."""
    if numerics == "exact" and "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    import jax

    jax.config.update("jax_compilation_cache_dir", str(compiled_dir()))
    jax.config.update("jax_persistent_cache_enable_xla_caches", AUTOTUNING)  # on a GPU: tuned once, then the same kernels
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
