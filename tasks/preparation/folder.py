"""The prepared folder in the cache: locked while it is made, made under another name, set aside where it is damaged."""

import fcntl
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.data.packed import load_manifest
from trainer.errors import DataError
from trainer.files import fsync

from .progress import Tell

log = logging.getLogger(__name__)


def is_whole(folder: Path, digest: str) -> bool:
    """Whether the data of `digest` is there."""
    try:
        return load_manifest(folder).digest == digest
    except DataError:
        return False


def set_aside(folder: Path) -> None:
    """What stands at `folder` and is not whole goes out of the way, but stays for whoever wants to know why."""
    if not folder.exists():
        return
    try:
        load_manifest(folder)
        reason = "its manifest is of other data"
    except DataError as e:
        reason = str(e)
    n = 1
    while (aside := folder.with_name(f"{folder.name}.damaged-{n}")).exists():
        n += 1
    os.rename(folder, aside)
    log.warning("prepared data was damaged and is made again: %s; moved to %s, which can be deleted", reason, aside)


def building(folder: Path) -> Path:
    """Where `folder` is made; what a killed preparation made of it is there still."""
    path = _building(folder)
    path.mkdir(exist_ok=True)
    return path


def publish(folder: Path) -> None:
    """Give what was built its name."""
    os.rename(_building(folder), folder)
    fsync(folder.parent)


def _building(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.building")


@contextmanager
def locked(folder: Path, tell: Tell) -> Iterator[None]:
    """Be the only one that prepares `folder`; waits for whoever does."""
    fd = os.open(folder.with_name(f".{folder.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(f"waiting for another process that prepares {folder}")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed preparations of other data left; a lock that can be had says that nobody works there."""
    for other in folder.parent.glob(".*.building"):
        if other == _building(folder):
            continue  # ours: what is whole in it is used
        fd = os.open(other.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)
