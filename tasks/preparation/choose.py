"""From a config of data, of whatever kind, to its preparation."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.mixture import MixtureDataConfig
from configs.packed import PackedDataConfig
from configs.prepare import TextDataConfig

from ..refs import DataRef
from .build import Preparation
from .jobs import Runner, in_turn
from .mixture import MixturePreparation
from .packed import PackedPreparation
from .progress import Progress, Tell

DataConfig = TextDataConfig | MixtureDataConfig | PackedDataConfig


def preparation_of(config: DataConfig, **options: Any) -> Preparation | MixturePreparation | PackedPreparation:
    """The preparation of a config; see `Preparation` for the options."""
    if isinstance(config, PackedDataConfig):
        return PackedPreparation(config, **options)
    return MixturePreparation(config, **options) if isinstance(config, MixtureDataConfig) else Preparation(config, **options)


def prepare(
    config: DataConfig,
    *,
    cache: Path | None = None,
    on_progress: Tell | None = None,
    run: Runner = in_turn,
    on_advance: Callable[[Progress], None] | None = None,
) -> DataRef:
    """The prepared data of `config`, made now unless `cache` (default: `trainer.paths.cache_dir()`) holds it already.

    `run` runs the jobs; `on_progress` is told what is done in words, `on_advance` how far it is. Raises DataError if the
    documents or the settings leave a split empty or something is no text, StorageError if a store failed.
    """
    return preparation_of(config, cache=cache, on_progress=on_progress, run=run, on_advance=on_advance).make()
