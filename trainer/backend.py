"""Settings of JAX that a run depends on, made before its backend starts."""

import os

from .paths import cache_dir

DETERMINISTIC = "--xla_gpu_deterministic_ops=true"


def numerics() -> str:
    """What this process was set up for: `exact` or `fast`. It is read off XLA's flags, which are part of the fingerprint."""
    return "exact" if DETERMINISTIC in os.environ.get("XLA_FLAGS", "").split() else "fast"


def set_up_jax(*, numerics: str) -> None:
    """Settings before the backend starts: deterministic operations, and compiled programs kept for the next process."""
    if numerics == "exact" and "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DETERMINISTIC}".strip()
    import jax

    jax.config.update("jax_compilation_cache_dir", str(cache_dir() / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
