"""Intermediate results: arrays and a few facts in one file, which is there whole or counts as not there.

A result is named by the digest of all that went in, so it is never out of date; its last bytes are the checksum of all
others, so a torn or damaged one is seen and made again. Nothing is waited for to reach the disk: what a crash of the machine
takes is made again too.
"""

import contextlib
import hashlib
import json
import mmap
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c
import numpy as np

MAGIC = b"everstep"
KEPT = 30 * 86400  # seconds that a result is kept without being used


class Result(NamedTuple):
    """What one step of the work found. The arrays lie in the file, which stays mapped as long as they are used."""

    facts: dict[str, Any]  # in JSON terms
    arrays: dict[str, np.ndarray]


def key_of(*parts: Any) -> str:
    """The digest, in hex, of JSON terms."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:40]


def write(path: Path, facts: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Put a result at `path`, in the place of what is there."""
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    shapes = {name: [array.dtype.str, array.shape] for name, array in arrays.items()}
    header = json.dumps({"facts": facts, "arrays": shapes}).encode()
    header += b" " * (-len(header) % 8)
    checksum = google_crc32c.Checksum()
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}-{time.monotonic_ns()}.part")
    try:
        with open(part, "wb") as f:
            for data in (MAGIC, len(header).to_bytes(8, "little"), header, *(array.tobytes() for array in arrays.values())):
                data += b"\0" * (-len(data) % 8)
                checksum.update(data)
                f.write(data)
            f.write(checksum.digest())
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise


def read(path: Path) -> Result | None:
    """The result at `path`, None if there is none or it is not whole."""
    try:
        with open(path, "rb") as f:
            data = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError):  # ValueError: empty
        return None
    if len(data) < 20 or bytes(data[:8]) != MAGIC:
        return None
    checksum = google_crc32c.Checksum()
    for start in range(0, len(data) - 4, 1 << 24):
        checksum.update(bytes(data[start : min(start + (1 << 24), len(data) - 4)]))
    if checksum.digest() != bytes(data[-4:]):
        return None
    end = 16 + int.from_bytes(data[8:16], "little")
    header = json.loads(bytes(data[16:end]))
    arrays = {}
    for name, (dtype, shape) in header["arrays"].items():
        arrays[name] = np.frombuffer(data, dtype, count=int(np.prod(shape)), offset=end).reshape(shape)
        size = arrays[name].nbytes
        end += size + -size % 8
    return Result(header["facts"], arrays)


def needed(path: Path) -> Result:
    """The result at `path`, made before. Raises StorageError where it has gone since."""
    found = read(path)
    if found is None:
        from trainer.errors import StorageError

        raise StorageError(f"{path}, made by this preparation, is gone or damaged; start again: what is whole is not done again")
    return found


def is_whole(path: Path) -> bool:
    """Whether a result is there to be used; then it is noted as used now."""
    if read(path) is None:
        return False
    with contextlib.suppress(OSError):
        os.utime(path)
    return True


def prune(folder: Path, *, seconds: float = KEPT) -> None:
    """Delete the results that nobody used for so long, and what killed writers left."""
    now = time.time()
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            age = now - path.stat().st_mtime
            if path.is_file() and (age > seconds or (path.suffix == ".part" and age > 3600)):
                path.unlink()
