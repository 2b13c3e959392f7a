"""Units of work: what one task reads. Small files go together, large ones in parts, so that all tasks take seconds.

Where one unit ends and the next begins depends on names and sizes near by, not on what came before: a file that comes or
goes changes its own unit and perhaps the next, and the results of all others are found as they were.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

from .sources.base import File, Part
from .sources.find import format_of
from .sources.read import can_be_sliced

UNIT = 2_000_000  # bytes of text, about: two seconds of a core
MOST = 4096  # units; of larger data each has more bytes
TEXT_PER_BYTE = {".gz": 4, ".zst": 4, ".xz": 4, ".parquet": 3}  # rules of thumb: weights, nothing more


class Unit(NamedTuple):
    """What one task reads, and about how many bytes of text that is."""

    parts: tuple[Part, ...]
    weight: int


def weight_of(file: File) -> int:
    """About how many bytes of text a file has."""
    _, packing = format_of(file.path)
    suffix = packing or ("." + file.path.rpartition(".")[2].lower())
    return max(1, file.size * TEXT_PER_BYTE.get(suffix, 1))


def units_of(files: Sequence[File]) -> list[Unit]:
    """All parts of all files in order, in units."""
    total = sum(map(weight_of, files))
    unit = UNIT
    while total / unit > MOST:
        unit *= 2
    made: list[Unit] = []
    parts: list[Part] = []
    weight = 0

    def close() -> None:
        nonlocal parts, weight
        if parts:
            made.append(Unit(tuple(parts), weight))
            parts, weight = [], 0

    for file in files:
        size = weight_of(file)
        if size > 1.5 * unit:
            close()
            of = -(-size // unit) if can_be_sliced(file) else 1
            made.extend(Unit((Part(file, i, of),), size // of) for i in range(of))
            continue
        if weight + size > 1.5 * unit or weight >= unit or (weight >= unit // 4 and _is_border(file)):
            close()
        parts.append(Part(file))
        weight += size
    close()
    return made


def _is_border(file: File) -> bool:
    """True for one name of eight."""
    return hashlib.sha256(file.path.encode()).digest()[0] % 8 == 0
