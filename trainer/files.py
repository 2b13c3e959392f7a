"""Files that are there whole or not at all: atomic writes, fsync of trees, checksums."""

import contextlib
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import google_crc32c


def fsync(path: Path) -> None:
    """Bring a file's bytes, or a directory's names, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(root: Path) -> None:
    """Bring everything under `root` to the disk, files before the directories that name them."""
    for folder, _, names in os.walk(root, topdown=False):
        for name in names:
            fsync(Path(folder, name))
        fsync(Path(folder))


def write_atomic(path: Path, data: bytes) -> None:
    """Replace `path` by `data`: after a crash at any moment the old or the new bytes are there, never a part."""
    part = path.with_name(path.name + ".part")
    with open(part, "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
    fsync(path.parent)


def crc32c(path: Path) -> str:
    """crc32c of a file's bytes, 8 hex digits."""
    checksum = google_crc32c.Checksum()
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            checksum.update(block)
    return checksum.hexdigest().decode()


def checksums(path: Path) -> dict[str, str]:
    """crc32c and crc32 of a file's bytes, read once, 8 hex digits each.

    All files that end with their own valid crc32c, as those of tensorstore's OCDBT do, have one crc32c; the other polynomial tells them
    apart.
    """
    checksum, other = google_crc32c.Checksum(), 0
    with open(path, "rb") as f:
        while block := f.read(1 << 20):
            checksum.update(block)
            other = zlib.crc32(block, other)
    return {"crc32c": checksum.hexdigest().decode(), "crc32": f"{other:08x}"}


def walk(root: Path) -> Iterator[Path]:
    """Every file, link or other thing under `root` that is no directory, in sorted order."""
    return (p for p in sorted(root.rglob("*")) if p.is_symlink() or not p.is_dir())


def seal(record: dict[str, Any]) -> bytes:
    """`record` as canonical JSON whose last key, crc32c, is the checksum of what it would be without it."""
    body = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
    own = google_crc32c.Checksum(body).hexdigest().decode()
    return body[:-1] + f',"crc32c":"{own}"}}'.encode()


def unseal(data: bytes) -> dict[str, Any]:
    """The record that `seal` wrote, written again and compared byte by byte. Raises ValueError if `data` is anything else."""
    record = json.loads(data)
    if not isinstance(record, dict) or "crc32c" not in record:
        raise ValueError("not a JSON object that ends with its crc32c")
    del record["crc32c"]
    if seal(record) != data:
        raise ValueError("it does not match its own crc32c")
    return record


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; of what is being removed meanwhile, what is still there."""
    total = 0
    for p in [path] if path.is_symlink() or not path.is_dir() else walk(path):
        with contextlib.suppress(OSError):
            total += p.lstat().st_size
    return total


def remove(path: Path) -> None:
    """Delete a file, a link or a directory with all in it; what is gone is fine."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
    else:
        shutil.rmtree(path, ignore_errors=True)
