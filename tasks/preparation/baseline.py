"""What counting reaches on the same text: an interpolated byte 5-gram, in bits per byte.

Orders are mixed by Witten and Bell's rule (1991, method C): after a context h seen c(h) times with T(h) different
followers, P(w|h) = (c(hw) + T(h) P(w|h')) / (c(h) + T(h)), where h' is h without its oldest byte; order 0 is uniform. A
trained model that is not clearly below this number has learnt nothing beyond five bytes.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Self

import numpy as np

MODEL = "interpolated byte 5-gram"
ORDER = 5  # the byte to predict and up to four before it
SYMBOLS = 257  # the bytes, and one end of a document; 257**5 < 2**63, so an n-gram is one integer
END = 256
LIMIT = 4_000_000  # bytes of a split that are looked at, from its beginning
PORTION = 1 << 21  # bytes worked on at a time


def _portions(documents: Iterable[str], limit: int) -> Iterator[list[bytes]]:
    """The first `limit` bytes of `documents`, in lists of about PORTION bytes."""
    portion: list[bytes] = []
    size, left = 0, limit
    for text in documents:
        data = text.encode()[:left]
        portion.append(data)
        size, left = size + len(data), left - len(data)
        if size >= PORTION or not left:
            yield portion
            portion, size = [], 0
        if not left:
            return
    if portion:
        yield portion


def _grams(documents: Sequence[bytes]) -> np.ndarray:
    """The n-grams that end at each byte and at each document's end, int64, the oldest symbol in the highest place.

    What stands before a document counts as ends, so no context crosses a border.
    """
    before = ORDER - 1
    lengths = np.array([before + len(d) + 1 for d in documents])
    starts = np.cumsum(lengths) - lengths
    symbols = np.full(lengths.sum(), END, np.int64)
    predicted = np.ones(len(symbols), bool)
    predicted[starts[:, None] + np.arange(before)] = False
    for start, document in zip(starts + before, documents, strict=True):
        symbols[start : start + len(document)] = np.frombuffer(document, np.uint8)
    grams = np.zeros(len(symbols) - before, np.int64)
    for i in range(ORDER):
        grams = grams * SYMBOLS + symbols[i : i + len(grams)]
    return grams[predicted[before:]]


class ByteModel:
    """Counts of the n-grams of a text, as sorted arrays per order from 1 up."""

    def __init__(self, orders: list[tuple[np.ndarray, ...]]):
        self._orders = orders  # (n-grams, their counts, contexts, counts after them, different followers)

    @classmethod
    def train(cls, documents: Iterable[str], *, limit: int = LIMIT) -> Self:
        """The model of the first `limit` bytes of `documents`."""
        found = [_grams(portion) for portion in _portions(documents, limit)]
        grams, counts = np.unique(np.concatenate(found), return_counts=True)
        orders: list[tuple[np.ndarray, ...]] = []
        for order in range(ORDER, 0, -1):
            if order < ORDER:  # shorter n-grams are sums of longer ones: only what is different is sorted again
                grams, counts = _summed(grams % SYMBOLS**order, counts)
            contexts = grams // SYMBOLS
            first = _firsts(contexts)
            contexts = contexts[first]
            totals = np.add.reduceat(counts, first)
            followers = np.diff(np.append(first, len(grams)))
            orders.insert(0, (grams, counts, contexts, totals, followers))
        return cls(orders)

    def bits_per_byte(self, documents: Iterable[str], *, limit: int = LIMIT) -> float:
        """Bits for the first `limit` bytes of `documents` and for the documents' ends, by bytes."""
        bits, size = 0.0, 0
        for portion in _portions(documents, limit):
            grams, counts = np.unique(_grams(portion), return_counts=True)  # sorted look-ups stay in the cache
            bits -= float((np.log2(self._probabilities(grams)) * counts).sum())
            size += sum(map(len, portion))
        return bits / size

    def _probabilities(self, grams: np.ndarray) -> np.ndarray:
        p = np.full(len(grams), 1 / SYMBOLS)
        for order, (known, counts, contexts, totals, followers) in enumerate(self._orders, 1):
            wanted = grams % SYMBOLS**order
            seen = _look_up(known, counts, wanted)
            total, different = (_look_up(contexts, values, wanted // SYMBOLS) for values in (totals, followers))
            p = np.where(total > 0, (seen + different * p) / np.maximum(total + different, 1), p)
        return p


def _firsts(ordered: np.ndarray) -> np.ndarray:
    """Where in a sorted array each value stands first."""
    return np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))


def _summed(keys: np.ndarray, counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different `keys`, sorted, and the sum of the `counts` of each.

    Key and place are sorted as one integer, in a third of the time of an argsort: keys are shorter than ORDER, below 2**33.
    """
    bits = len(keys).bit_length()
    assert bits < 31
    packed = np.sort(keys << bits | np.arange(len(keys)))
    ordered = packed >> bits
    first = _firsts(ordered)
    return ordered[first], np.add.reduceat(counts[packed & ((1 << bits) - 1)], first)


def _look_up(keys: np.ndarray, values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`values` where sorted `keys` are `wanted`, else 0."""
    place = np.minimum(keys.searchsorted(wanted), len(keys) - 1)
    return np.where(keys[place] == wanted, values[place], 0)
