"""Where verified copies of checkpoints are kept."""

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Store(Protocol):
    """A place for the copies of one run; a copy is there whole or not at all."""

    def published(self) -> dict[int, str]:
        """Steps with a whole copy, and the crc32c that the copy's manifest ends with."""

    def publish(self, step: int, checkpoint: Path, others: Mapping[str, bytes | Path]) -> str:
        """Copy a committed checkpoint and the run's `others` (name -> content or file), verified; returns its address.

        Raises StorageError where that failed; a repeat goes on or begins anew. An older copy of the step is replaced.
        """

    def fetch(self, step: int, target: Path) -> None:
        """Bring a copy back as the folder `target`, which must not exist. Raises StorageError where the copy is not whole."""

    def delete(self, step: int) -> None:
        """Remove a copy, if it is there."""
