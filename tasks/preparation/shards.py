"""Shards: Arrow files of rows, each made from a window of a split's stream, and each as large as the next.

A shard is written beside a note with its size and checksum, so one that a kill left torn is seen and made again.
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.base import FIELDS
from trainer.data.packed import VERSION
from trainer.files import crc32c, fsync, seal, unseal

from . import results
from .packing import Rows, Stream, best_fit, greedy

SHARD_TOKENS = 1 << 23  # 128 MB in four fields of int32
BATCH_TOKENS = 1 << 20  # of a record batch
NOTE = ".note"


class Piece(NamedTuple):
    """Some documents of one unit's tokens."""

    path: str  # of the result
    first: int  # document
    last: int  # document, not included


class PackJob(NamedTuple):
    """Makes one shard."""

    folder: str
    split: str
    nth: int
    pieces: tuple[Piece, ...]
    start: int  # positions in the stream of the pieces; best_fit packs all of it
    stop: int
    packing: str
    seq_len: int
    eos_id: int

    @property
    def name(self) -> str:
        return f"pack[{self.file}]"

    @property
    def file(self) -> str:
        return f"{self.split}-{self.nth:05d}.arrow"

    @property
    def size(self) -> int:
        return self.stop - self.start

    @property
    def key(self) -> str:
        """Of all that decides the shard's bytes."""
        pieces = [(Path(piece.path).stem, piece.first, piece.last) for piece in self.pieces]
        return results.key_of(VERSION, pieces, self.split, self.start, self.stop, self.packing, self.seq_len, self.eos_id)

    def run(self) -> dict[str, Any]:
        """The shard's record for the manifest."""
        path = Path(self.folder, self.file)
        if (record := _noted(path, self.key)) is not None:
            return record
        stream = self._read()
        if self.packing == "best_fit":
            rows = best_fit(stream, seq_len=self.seq_len, eos_id=self.eos_id)
        else:
            rows = greedy(stream, start=self.start, stop=self.stop, seq_len=self.seq_len, eos_id=self.eos_id)
        write_shard(path, rows)
        record = {"file": path.name, "size": path.stat().st_size, "crc32c": crc32c(path), "rows": len(rows["inputs"])}
        note = path.with_name(path.name + NOTE)
        part = note.with_name(note.name + ".part")
        part.write_bytes(seal({"key": self.key, "record": record}))
        os.replace(part, note)
        return record

    def _read(self) -> Stream:
        tokens, lengths = [], []
        for piece in self.pieces:
            found = results.needed(Path(piece.path)).arrays
            own = found[f"{self.split}_lengths"]
            begin = int(own[: piece.first].sum())
            lengths.append(own[piece.first : piece.last])
            tokens.append(found[self.split][begin : begin + int(lengths[-1].sum())])
        return Stream(np.concatenate(tokens).astype(np.int32), np.concatenate(lengths))


def _noted(path: Path, key: str) -> dict[str, Any] | None:
    """The record of a shard that stands at `path` as it was written, and is the one that `key` names."""
    try:
        note = unseal(path.with_name(path.name + NOTE).read_bytes())
        record = note["record"]
        whole = note["key"] == key and path.stat().st_size == record["size"] and crc32c(path) == record["crc32c"]
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError):
        return None
    return record if whole else None


def write_shard(path: Path, rows: Rows) -> None:
    """Write `rows` as an Arrow file, in the place of what is there, and bring it to the disk."""
    import pyarrow as pa

    count, seq_len = rows["inputs"].shape
    # "not null" inside and out: the reader sees plain int32, without validity bitmaps
    kind = pa.list_(pa.field("item", pa.int32(), nullable=False), seq_len)
    schema = pa.schema([pa.field(field, kind, nullable=False) for field in FIELDS])
    step = max(1, BATCH_TOKENS // seq_len)
    part = path.with_name(path.name + ".part")
    with pa.ipc.new_file(str(part), schema) as writer:
        for start in range(0, count, step):
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(rows[field][start : start + step].ravel()), type=kind) for field in FIELDS
            ]
            writer.write_batch(pa.record_batch(columns, schema=schema))
    fsync(part)
    os.replace(part, path)


def plan_shards(
    folder: Path, split: str, tokens: Sequence[tuple[str, np.ndarray]], *, packing: str, seq_len: int, eos_id: int
) -> list[PackJob]:
    """The shards of a split whose documents have the lengths (without ends) that `tokens` says for each unit's result.

    greedy: rows of SHARD_TOKENS positions of the stream. best_fit: the documents that begin in so many positions; rows are
    filled within a shard, which bounds the memory, and there are enough to choose from.
    """
    window = max(1, SHARD_TOKENS // seq_len) * seq_len
    lengths = np.concatenate([own for _, own in tokens]) + 1
    units = np.repeat(np.arange(len(tokens)), [len(own) for _, own in tokens])
    within = np.concatenate([np.arange(len(own)) for _, own in tokens])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    jobs: list[PackJob] = []
    for begin in range(0, int(ends[-1]), window):
        stop = min(begin + window, int(ends[-1]))
        if packing == "best_fit":
            first, last = (int(np.searchsorted(starts, at)) for at in (begin, stop))
        else:
            first, last = int(np.searchsorted(ends, begin, side="right")), int(np.searchsorted(starts, stop))
        if first == last:
            continue  # within a document that began in an earlier window
        own = units[first:last]
        pieces = []
        for unit in np.unique(own):
            some = within[first:last][own == unit]
            pieces.append(Piece(tokens[unit][0], int(some[0]), int(some[-1]) + 1))
        base = int(starts[first])
        if packing == "best_fit":
            span = (0, int(ends[last - 1]) - base)
        else:
            span = (begin - base, stop - base)
        jobs.append(PackJob(str(folder), split, len(jobs), tuple(pieces), *span, packing, seq_len, eos_id))
    return jobs
