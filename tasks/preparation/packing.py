"""Documents of tokens to rows of one length: nothing cut away, nothing read across a border.

A document t1..tn becomes the stretch inputs [eos, t1, ..., tn], targets [t1, ..., tn, eos]: every token is predicted once,
the first and the end too. What does not fit into a row is cut into stretches of their own, each of which begins with the
token before it as its first input.

The stream of a split is all its targets, one document after the other. A window of it is packed by itself, so windows may
be packed anywhere at once; where they begin depends on the stream alone.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Rows = dict[str, np.ndarray]  # each field of a batch, int32 of shape (rows, seq)


class Stream(NamedTuple):
    """Some documents in a row, as one array."""

    tokens: np.ndarray  # int32: of all documents, without ends
    lengths: np.ndarray  # int64: of each, without its end

    def targets(self, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
        """The targets of all, int32, and where each document starts in them, int64."""
        starts = np.cumsum(self.lengths + 1) - (self.lengths + 1)
        targets = np.full(len(self.tokens) + len(self.lengths), eos_id, np.int32)
        inside = np.ones(len(targets), bool)
        inside[starts + self.lengths] = False
        targets[inside] = self.tokens
        return targets, starts


def greedy(stream: Stream, *, start: int, stop: int, seq_len: int, eos_id: int) -> Rows:
    """The rows of positions `start` to `stop` of the stream, one document after the other; the last is filled up with padding.

    A stretch ends where its document or its row does. Padding is 0 in all fields.
    """
    targets, starts = stream.targets(eos_id)
    stop = min(stop, len(targets))
    length = stop - start
    num_rows = -(-length // seq_len)
    inputs, wanted = np.zeros((2, num_rows * seq_len), np.int32)
    wanted[:length] = targets[start:stop]
    inputs[:length] = targets[start - 1 : stop - 1] if start else np.append(np.int32(eos_id), targets[: stop - 1])
    within = starts[(starts >= start) & (starts < stop)] - start
    inputs[within] = eos_id
    # A stretch that crosses into a row begins anew there.
    begins = np.union1d(within, np.arange(0, length, seq_len))
    sizes = np.diff(begins, append=length)
    rows_of = begins // seq_len
    first_of_row = np.searchsorted(begins, rows_of * seq_len)
    segments, positions = np.zeros((2, num_rows * seq_len), np.int32)
    segments[:length] = np.repeat((np.arange(len(begins)) - first_of_row + 1).astype(np.int32), sizes)
    positions[:length] = np.arange(length, dtype=np.int32) - np.repeat(begins.astype(np.int32), sizes)
    fields = {"inputs": inputs, "targets": wanted, "segment_ids": segments, "positions": positions}
    return {name: field.reshape(num_rows, seq_len) for name, field in fields.items()}


def best_fit(stream: Stream, *, seq_len: int, eos_id: int) -> Rows:
    """The rows of whole documents, where one that fits into a row is never cut (Ding et al. 2024, arXiv 2404.10830).

    Longer ones are cut into stretches that fill a row, and a last one. All that is shorter than a row is put, the longest
    first, into the row with the least room that has enough; of equal ones the earlier document first, and into the row that
    came to have that room first.
    """
    targets, starts = stream.targets(eos_id)
    pieces = [(at, min(seq_len, end - at)) for start, end in _spans(starts, len(targets)) for at in range(start, end, seq_len)]
    placed, num_rows = _place([size for _, size in pieces], seq_len)
    rows = {field: np.zeros((num_rows, seq_len), np.int32) for field in ("inputs", "targets", "segment_ids", "positions")}
    segments = [0] * num_rows
    begins = set(starts.tolist())
    count = np.arange(seq_len, dtype=np.int32)
    for i in sorted(range(len(pieces)), key=placed.__getitem__):  # so that segments are counted from the left
        (at, size), (row, column) = pieces[i], placed[i]
        segments[row] += 1
        place = slice(column, column + size)
        rows["targets"][row, place] = targets[at : at + size]
        rows["inputs"][row, place][1:] = targets[at : at + size - 1]
        rows["inputs"][row, column] = eos_id if at in begins else targets[at - 1]
        rows["segment_ids"][row, place] = segments[row]
        rows["positions"][row, place] = count[:size]
    return rows


def _spans(starts: np.ndarray, end: int) -> list[tuple[int, int]]:
    return list(zip(starts.tolist(), [*starts.tolist()[1:], end], strict=True)) if len(starts) else []


def _place(sizes: Sequence[int], seq_len: int) -> tuple[list[tuple[int, int]], int]:
    """(row, column) of each piece by best-fit-decreasing, and how many rows there are."""
    placed = [(0, 0)] * len(sizes)
    num_rows = 0
    rooms: list[int] = []  # sorted, those that some row has
    rows_with: dict[int, deque[int]] = {}  # rows by their room, the first to have it first
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        size = sizes[i]
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, room = num_rows, seq_len
            num_rows += 1
        else:
            room = rooms[at]
            row = rows_with[room].popleft()
            if not rows_with[room]:
                del rows_with[room], rooms[at]
        placed[i] = (row, seq_len - room)
        left = room - size
        if left:
            if left not in rows_with:
                rows_with[left] = deque()
                insort(rooms, left)
            rows_with[left].append(row)
    return placed, num_rows
