"""Rows of shards that lie elsewhere: fetched when a row of theirs is asked for, into a bounded cache that processes share.

A shard in use is mapped, with a shared kernel lock on its file; who needs room deletes the least recently used of those
whose lock can be had. So a shard that any process reads stays, and a process that dies gives its own free. Where others
hold all there is room for, they are asked to let go, which they do when they next read a row.
"""

import contextlib
import fcntl
import json
import logging
import os
import posixpath
import shutil
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError, StorageError
from ..files import crc32c
from ..storage import file_system
from .packed import SOURCE, FileRecord, ShardedRows, ShardRecord

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger(__name__)

OF_STORES = ("aiohttp", "gcsfs", "asyncio", "fsspec", "botocore", "requests", "httpx", "httpx2")  # whose errors need not be OSErrors
WAIT = 60.0  # seconds for other processes to make room
WANTED = ".wanted"  # touched by who waits; whoever sees that it changed lets go of what it does not read at that moment
TRIES = 2  # of a fetch that brought other bytes than the manifest says

_mapped: "OrderedDict[Path, tuple[int, ShardedRows]]" = OrderedDict()  # by file: its open lock and its rows; the last used last
_guard = threading.RLock()
_seen: dict[Path, int] = {}  # when room was last wanted in a cache, as far as this process has seen


class RemoteRows:
    """Random access to the rows of shards named in the `source.json` of `folder`. Crosses process borders as that name.

    Raises DataError for a shard that is larger than the cache or not what the manifest says, StorageError if a store failed.
    """

    def __init__(self, folder: str | Path, shards: Sequence[ShardRecord]):
        self.folder, self.shards = Path(folder), tuple(shards)
        source = json.loads((self.folder / SOURCE).read_text())
        self._address, self._bound = source["address"], source["cache_bytes"]
        self._ends = list(accumulate(shard.rows for shard in self.shards))
        for shard in self.shards:
            if shard.size > self._bound:
                raise DataError(
                    f"shard {shard.file} of {self._address} has {shard.size} bytes, above data.cache_bytes {self._bound}; raise it"
                )

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> "dict[str, np.ndarray]":
        """Row `index`: each field as int32 of shape (seq,). Raises IndexError beyond the rows."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        at = bisect_right(self._ends, index)
        with _guard:
            rows = self._rows(self.shards[at])
            row = rows[index - (self._ends[at] - self.shards[at].rows)]
            return {field: values.copy() for field, values in row.items()}  # the shard may go as soon as another takes its place

    def __reduce__(self) -> Any:
        return RemoteRows, (self.folder, self.shards)

    def __repr__(self) -> str:
        return f"RemoteRows({len(self)} rows in {len(self.shards)} files of {self._address})"

    def _rows(self, shard: ShardRecord) -> ShardedRows:
        path = self.folder.parent / "shards" / f"{self.folder.name}-{shard.crc32c}-{posixpath.basename(shard.file)}"
        _let_go_if_wanted(path.parent)
        if path not in _mapped:
            while (fd := _hold(path)) is None:
                self._fetch(shard, path)
            rows = ShardedRows([path])
            if len(rows) != shard.rows:
                raise DataError(f"shard {shard.file} of {self._address} has {len(rows)} rows, its manifest says {shard.rows}")
            _mapped[path] = fd, rows
        _mapped.move_to_end(path)
        return _mapped[path][1]

    def _fetch(self, shard: ShardRecord, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + WAIT
        while True:
            with _alone(path.parent):
                if path.exists():
                    return  # another process was quicker
                try:
                    _make_room(path.parent, shard.size, bound=self._bound)
                except StorageError:
                    if time.monotonic() > deadline:
                        raise
                else:
                    fetch(self._address, shard, path)
                    log.info("fetched %s of %s, %d bytes", shard.file, self._address, shard.size)
                    return
            (path.parent / WANTED).touch()
            time.sleep(0.02)


def fetch(address: str, record: FileRecord, path: Path) -> None:
    """Bring a file of the folder at `address` to `path`, whole or not at all, and as its record says.

    Raises DataError if it is gone or other bytes, StorageError if the store failed.
    """
    fs, root = file_system(address)
    source = posixpath.normpath(posixpath.join(root, record.file))  # a mixture's shards lie beside it
    part = path.with_name(f".{path.name}.part")
    wrong = ""
    try:
        for _ in range(TRIES):
            with stored(f"{address}/{record.file}"), fs.open(source, "rb") as remote, open(part, "wb") as own:
                shutil.copyfileobj(remote, own, 1 << 22)
            size = part.stat().st_size
            wrong = f"{size} bytes instead of {record.size}" if size != record.size else "other bytes (crc32c)"
            if size == record.size and crc32c(part) == record.crc32c:
                os.replace(part, path)
                return
    finally:
        part.unlink(missing_ok=True)
    raise DataError(f"{record.file} of {address} is not what its manifest says: {wrong}; copy that folder there again")


@contextlib.contextmanager
def stored(what: str) -> Iterator[None]:
    """Errors of a store as ours."""
    try:
        yield
    except FileNotFoundError as e:
        raise DataError(f"there is no {what}; set data.path to a prepared folder that is whole") from e
    except PermissionError as e:
        raise DataError(f"{what} may not be read: {e}; change its permissions or the account") from e
    except Exception as e:
        if isinstance(e, OSError) or type(e).__module__.split(".")[0] in OF_STORES:
            raise StorageError(f"{what} could not be fetched: {type(e).__name__}: {e}") from e
        raise


def _hold(path: Path) -> int | None:
    """A descriptor with a shared lock on a file, which keeps it; None if it is not there (any more)."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    fcntl.flock(fd, fcntl.LOCK_SH)
    try:
        if os.stat(path).st_ino == os.fstat(fd).st_ino:  # it was not deleted between the two
            os.utime(path)
            return fd
    except FileNotFoundError:
        pass
    os.close(fd)
    return None


def _let_go_if_wanted(folder: Path) -> None:
    """Unmap all where another process waits for room."""
    try:
        wanted = os.stat(folder / WANTED).st_mtime_ns
    except FileNotFoundError:
        return
    if _seen.get(folder) != wanted:
        _seen[folder] = wanted
        for path in [path for path in _mapped if path.parent == folder]:
            os.close(_mapped.pop(path)[0])


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One fetch at a time, of all processes: the bound counts what is there and what is coming."""
    fd = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _make_room(folder: Path, size: int, *, bound: int) -> None:
    """Delete the least recently used shards until `size` bytes more are within the bound. Only inside of `_alone`."""
    for left in folder.glob(".*.part"):
        left.unlink()  # of one that was killed: nobody else fetches now
    files = sorted((path for path in folder.iterdir() if not path.name.startswith(".")), key=lambda p: p.stat().st_mtime_ns)
    have = sum(path.stat().st_size for path in files)
    ours = [path for path in _mapped if path in files]
    for path in [path for path in files if path not in ours] + ours:
        if have + size <= bound:
            return
        if path in _mapped:
            os.close(_mapped.pop(path)[0])
        own = path.stat().st_size
        if _delete(path):
            have -= own
    if have + size > bound:
        raise StorageError(
            f"{folder} holds {have} bytes of shards that other processes read, and {size} more are above data.cache_bytes {bound}; "
            "raise it, or wait until they are done"
        )


def _delete(path: Path) -> bool:
    """Delete a shard that nobody holds; whether it is gone."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
        return True
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
