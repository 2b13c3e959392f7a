"""The index of stores that runs are published to: one line each."""

from collections.abc import Callable
from pathlib import Path

from configs.publish import PublishConfig
from trainer.rundir import RunDir

from .base import Store
from .gcs import GcsStore
from .local import LocalStore

__all__ = ["GcsStore", "LocalStore", "Store", "make_store"]


def make_store(
    config: PublishConfig,
    run_dir: RunDir,
    *,
    run_name: str,
    run_id: str,
    cut_off: Callable[[], bool] = lambda: False,
    stall: float | None = None,
) -> Store | None:
    """The store that `config.kind` names; None where nothing is published.

    Calls on a store that is far away end with an error as soon as `cut_off` says so, or nothing moved for `stall` seconds.
    """
    if config.kind == "none":
        return None
    if config.kind == "gcs":
        assert config.url is not None, "the config has seen to it"
        return GcsStore(f"{config.url.rstrip('/')}/{run_name}-{run_id}", run_id=run_id, cut_off=cut_off, stall=stall)
    return LocalStore(Path(config.url, f"{run_name}-{run_id}") if config.url else run_dir.published, run_id=run_id)
