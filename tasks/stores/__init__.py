"""The index of stores that runs are published to: one line each."""

from configs.publish import PublishConfig
from trainer.rundir import RunDir

from .base import Store
from .local import LocalStore

__all__ = ["LocalStore", "Store", "make_store"]


def make_store(config: PublishConfig, run_dir: RunDir, *, run_name: str, run_id: str) -> Store | None:
    """The store that `config.kind` names; None where nothing is published."""
    if config.kind == "none":
        return None
    from pathlib import Path

    return LocalStore(Path(config.url, f"{run_name}-{run_id}") if config.url else run_dir.published)
