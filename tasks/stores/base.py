"""Where verified copies of checkpoints are kept."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Protocol

from trainer.errors import StorageError

IDENTITY = "run.json"  # of the run that a store belongs to


class Store(Protocol):
    """A place for the copies of one run; a copy is there whole or not at all. Every call raises StorageError where the place failed."""

    @property
    def address(self) -> str:
        """Where it is, in words for people and as it is given to `everstep resume`."""

    def published(self) -> dict[int, str]:
        """Steps with a whole copy, ascending, and the crc32c that the copy's manifest ends with."""

    def check(self) -> dict[int, list[str]]:
        """Every step that has a copy or what may once have been one, ascending, and what is wrong with it.

        Files are read again; in a bucket its own checksums of what lies there are taken.
        """

    def publish(self, step: int, checkpoint: Path, others: Mapping[str, bytes | Path]) -> str:
        """Copy a committed checkpoint and the run's `others` (name -> content or file), verified; returns its address.

        A repeat goes on or begins anew. An older copy of the step is replaced. Raises StorageError, not to be tried again, where
        the place is another run's, and DamagedError where the checkpoint itself is not whole.
        """

    def fetch(self, step: int, target: Path) -> None:
        """Bring a copy back as the folder `target`, which must not exist. Raises StorageError where the copy is not whole."""

    def delete(self, step: int) -> None:
        """Remove a copy, if it is there."""

    def clear(self, keep: Collection[int], *, dry: bool = False) -> dict[str, int]:
        """Remove what uploads and deletions that were cut off left behind, `dry`: only look; what it is, and its bytes.

        An upload of a step in `keep` that can go on where it was is left. Only for who publishes this run, and between uploads.
        """


def refused(message: str) -> StorageError:
    """An error that trying again does not mend: somebody has to do something."""
    error = StorageError(message)
    error.retryable = False
    return error


def check_owner(identity: bytes | None, run_id: str, address: str) -> None:
    """See that a place, by the content of its run.json, is this run's or nobody's. Raises StorageError."""
    if identity is None:
        return
    try:
        found = json.loads(identity)["run_id"]
    except (ValueError, KeyError, TypeError) as e:
        raise refused(f"{address}/{IDENTITY} cannot be read, so whose copies these are is not known; move them away") from e
    if found != run_id:
        raise refused(f"{address} holds copies of run {found}, and this is run {run_id}; set publish.url to another place")
