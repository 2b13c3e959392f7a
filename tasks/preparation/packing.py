"""Documents of tokens to rows of one length: concatenate and split, nothing cut away, nothing read across a border.

A document t1..tn becomes the stretch inputs [eos, t1, ..., tn], targets [t1, ..., tn, eos]: every token is predicted once,
the first and the end too. Where a row ends within a stretch, the rest goes on in the next row as a stretch of its own.
"""

from collections.abc import Sequence

import numpy as np


class Packer:
    """Takes documents in any portions and gives rows as they fill; the portions do not change the rows."""

    def __init__(self, *, seq_len: int, eos_id: int):
        self._seq_len, self._eos_id = seq_len, eos_id
        # What does not fill a row yet: inputs, targets, and 1 where a document starts.
        self._rest = np.zeros((3, 0), np.int32)

    def add(self, documents: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
        """The rows that `documents` (int32 tokens without an end) fill up: each field int32 (rows, seq), rows perhaps 0."""
        eos = np.full(1, self._eos_id, np.int32)
        tokens = np.concatenate([part for document in documents for part in (document, eos)] or [eos[:0]]).astype(np.int32, copy=False)
        ends = np.cumsum([len(document) + 1 for document in documents], dtype=np.int64)
        stream = np.zeros((3, len(tokens)), np.int32)
        inputs, targets, starts = stream
        targets[:] = tokens
        inputs[1:] = tokens[:-1]
        if len(tokens):
            inputs[0] = self._eos_id
            starts[0] = 1
            starts[ends[:-1]] = 1
        stream = np.concatenate([self._rest, stream], axis=1)
        whole = stream.shape[1] // self._seq_len * self._seq_len
        self._rest = stream[:, whole:].copy()
        return self._rows(stream[:, :whole])

    def finish(self) -> dict[str, np.ndarray]:
        """The last row, filled up with padding (0 in all fields), if there is a rest; no rows otherwise."""
        length = self._rest.shape[1]
        padded = np.pad(self._rest, ((0, 0), (0, -length % self._seq_len)))
        self._rest = np.zeros((3, 0), np.int32)
        rows = self._rows(padded)
        if length % self._seq_len:
            for field in ("segment_ids", "positions"):
                rows[field][-1, length:] = 0
        return rows

    def _rows(self, stream: np.ndarray) -> dict[str, np.ndarray]:
        inputs, targets, starts = stream.reshape(3, -1, self._seq_len)
        starts = starts.copy()
        starts[:, :1] = 1  # a stretch that crosses into a row begins anew there
        column = np.arange(self._seq_len, dtype=np.int32)
        stretch_starts = np.maximum.accumulate(np.where(starts == 1, column, 0), axis=1)
        return {
            "inputs": inputs,
            "targets": targets,
            "segment_ids": np.cumsum(starts, axis=1, dtype=np.int32),
            "positions": (column - stretch_starts).astype(np.int32),
        }
