"""Hashes of text as rows of two uint64, and sets of them as sorted arrays: 16 bytes a text, looked up by the million.

A hash is the first half of a SHA-256: two different texts with the same one are not met with.
"""

import hashlib
from collections.abc import Iterable

import numpy as np


def hash_of(text: bytes) -> bytes:
    """16 bytes, of a text in UTF-8."""
    return hashlib.sha256(text).digest()[:16]


def as_array(hashes: Iterable[bytes]) -> np.ndarray:
    """Hashes as uint64 of shape (n, 2), the first bytes first."""
    return np.frombuffer(b"".join(hashes), ">u8").astype(np.uint64).reshape(-1, 2)


def to_bytes(hashes: np.ndarray) -> bytes:
    """The bytes that `as_array` was given."""
    return hashes.astype(">u8").tobytes()


def places(hashes: np.ndarray) -> np.ndarray:
    """Where in [0, 1) texts lie: by the first 48 bits of their hashes."""
    return (hashes[:, 0] >> np.uint64(16)).astype(np.float64) / 2**48


def firsts(hashes: np.ndarray) -> np.ndarray:
    """Whether each is the first of its kind: bool of shape (n,)."""
    order = np.lexsort((hashes[:, 1], hashes[:, 0]))  # stable: equal ones stay in their order
    ordered = hashes[order]
    new = np.ones(len(hashes), bool)
    new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    found = np.empty(len(hashes), bool)
    found[order] = new
    return found


class HashSet:
    """A set of hashes, and which of many are in it."""

    def __init__(self, hashes: np.ndarray):
        order = np.lexsort((hashes[:, 1], hashes[:, 0]))
        ordered = hashes[order]
        new = np.ones(len(hashes), bool)
        new[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
        self._high, self._low = (np.ascontiguousarray(ordered[new][:, i]) for i in (0, 1))

    def __len__(self) -> int:
        return len(self._high)

    def holds(self, hashes: np.ndarray) -> np.ndarray:
        """Whether each is in the set: bool of shape (n,)."""
        found = np.zeros(len(hashes), bool)
        if not len(self):
            return found
        at = self._high.searchsorted(hashes[:, 0])
        open_ones = np.arange(len(hashes))
        while len(open_ones):  # once, unless first halves are equal where second ones are not
            inside = at[open_ones] < len(self)
            open_ones = open_ones[inside]
            open_ones = open_ones[self._high[at[open_ones]] == hashes[open_ones, 0]]
            same = self._low[at[open_ones]] == hashes[open_ones, 1]
            found[open_ones[same]] = True
            open_ones = open_ones[~same]
            at[open_ones] += 1
        return found
