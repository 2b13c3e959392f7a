"""Rows of tokens on disk: their config and manifest, and random access to them."""

from bisect import bisect_right
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError, field_validator

from ..config import Config, PartConfig
from ..errors import DataError
from ..files import unseal

if TYPE_CHECKING:
    import numpy as np

NAME = "manifest.json"
SOURCE = "source.json"  # of a folder whose shards lie elsewhere: {"address", "cache_bytes"}; see shards.py
VERSION = 2  # of the files below a prepared folder; part of their digest


class PackedConfig(PartConfig):
    """Base of the configs of data: whatever ends as rows of tokens."""

    seq_len: int = Field(128, ge=2, le=2**24)  # tokens a row
    batch_size: int = Field(16, ge=1, le=2**20)  # rows of the global batch of one step
    eval_batch_size: int | None = Field(None, ge=1)  # rows; None: batch_size
    leave_out: tuple[tuple[int, int], ...] = ()  # ranges [a, b) of places in the order of training batches, which are passed over

    @field_validator("leave_out")
    @classmethod
    def _in_order(cls, value: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        ends = [end for pair in value for end in pair]
        if ends != sorted(ends) or any(a == b for a, b in value) or ends[:1] < [0] * len(ends[:1]):
            raise ValueError(f"leave_out {value} must be ranges [a, b) with 0 <= a < b, in ascending order and apart; sort and join them")
        return value


class FileRecord(Config):
    """A file of the prepared folder as it was written."""

    file: str
    size: int  # bytes
    crc32c: str


class ShardRecord(FileRecord):
    """An Arrow file of rows."""

    rows: int


class SplitRecord(Config):
    """What a split holds."""

    documents: int
    bytes: int  # of their text in UTF-8
    tokens: int  # real targets: the documents' tokens and one end for each
    rows: int
    utilisation: float = 1.0  # of the rows' places, how many hold a target
    shards: tuple[ShardRecord, ...]


class Duplicates(Config):
    """What was left out because it stands elsewhere."""

    documents: int  # equal to an earlier document
    paragraphs: int  # of training that stand in val or test, and of val that stand in test


class SourceRecord(Config):
    """A file that was read."""

    path: str
    bytes: int  # as stored
    documents: int  # read from it, duplicates too
    sha256: str  # of the documents' hashes in order, so of what it says and not of how it is stored


class PartRecord(Config):
    """A part of a mixture."""

    digest: str  # of the part
    weight: float  # of the training rows; all parts' together 1
    shards: int  # how many of the training shards are its own: the parts' follow each other


class DataManifest(Config):
    """What a prepared folder holds and what it was made of."""

    version: int = VERSION
    digest: str  # sha256 of everything that went in
    seq_len: int
    vocab_size: int
    eos_id: int
    settings: dict[str, Any]  # the preparation's, in JSON terms
    tokenizer: FileRecord
    splits: dict[str, SplitRecord]  # train, val, and test unless its fraction is 0
    duplicates: Duplicates
    baseline: dict[str, Any]  # {"model", "val", "test"}: bits per byte of a simple model, to compare with
    sources: tuple[SourceRecord, ...] = ()  # where they lay when this was made; the digest does not know it
    left_out: dict[str, int] = Field(default_factory=dict)  # rows that are no documents, by reason
    histogram: dict[str, tuple[int, ...]] = Field(default_factory=dict)  # by split: documents of 2**i to 2**(i+1) - 1 tokens, ends included
    versions: dict[str, str] = Field(default_factory=dict)  # of the libraries that shape the rows
    parts: tuple[PartRecord, ...] = ()  # of a mixture; training rows are drawn from them by weight

    def split(self, name: str) -> SplitRecord:
        """The record of split `name`. Raises DataError if there is none."""
        if name not in self.splits:
            raise DataError(
                f"the data has no split {name!r}, only {', '.join(self.splits)}; for a test split set data.test_fraction above 0"
            )
        return self.splits[name]


def load_manifest(folder: str | Path) -> DataManifest:
    """The manifest of a prepared folder, after a look at the size of every file it names.

    Shards that lie elsewhere are looked at when they are fetched. Raises DataError if the manifest is missing, damaged or of
    another version, or a file is missing or of another size.
    """
    folder = Path(folder)
    way_out = f"delete {folder} and prepare again"
    try:
        data = (folder / NAME).read_bytes()
    except OSError as e:
        raise DataError(f"no {NAME} can be read in {folder} ({e.strerror}); {way_out}") from e
    manifest = parse_manifest(data, where=folder / NAME, way_out=way_out)
    shards = () if (folder / SOURCE).exists() else tuple(shard for split in manifest.splits.values() for shard in split.shards)
    for file in (manifest.tokenizer, *shards):
        path = folder / file.file
        size = path.stat().st_size if path.is_file() else None
        if size != file.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DataError(f"{path} {found}, its manifest says {file.size} bytes; {way_out}")
    return manifest


def parse_manifest(data: bytes, *, where: object, way_out: str) -> DataManifest:
    """The manifest that `data` is, read from `where`. Raises DataError, with the way out, if it is damaged or of another version."""
    try:
        record = unseal(data)
    except ValueError as e:
        raise DataError(f"{where} is damaged: {e}; {way_out}") from e
    if record.get("version") != VERSION:
        raise DataError(f"{where} is of version {record.get('version')}, this program reads {VERSION}; {way_out}")
    try:
        return DataManifest.model_validate(record)
    except ValidationError as e:
        raise DataError(f"{where} is not a manifest of data: {e}; {way_out}") from e


class ShardedRows:
    """Random access to the rows of Arrow IPC files, memory-mapped: nothing is read before it is asked for.

    Each file has one column `FixedSizeList<int32>[seq_len]` per field of a batch. Crosses process borders as its paths.
    """

    def __init__(self, paths: Sequence[str | Path]):
        self.paths = tuple(str(p) for p in paths)
        self._open()

    def _open(self) -> None:
        import pyarrow as pa

        from .base import FIELDS

        self._blocks: list[dict[str, np.ndarray]] = []  # views into the maps, which they keep alive
        starts = [0]
        for path in self.paths:
            try:
                with pa.memory_map(path) as source, pa.ipc.open_file(source) as reader:
                    for i in range(reader.num_record_batches):
                        batch = reader.get_batch(i)
                        block = {f: batch.column(f).flatten().to_numpy().reshape(batch.num_rows, -1) for f in FIELDS if batch.num_rows}
                        if block:
                            self._blocks.append(block)
                            starts.append(starts[-1] + batch.num_rows)
            except (OSError, KeyError, pa.ArrowException) as e:
                raise DataError(f"{path} is no shard of rows that can be read: {e}; delete {Path(path).parent} and prepare again") from e
        self._starts = starts

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> "dict[str, np.ndarray]":
        """Row `index`: each field as int32 of shape (seq,), read-only. Raises IndexError beyond the rows."""
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        block = bisect_right(self._starts, index) - 1
        return {field: rows[index - self._starts[block]] for field, rows in self._blocks[block].items()}

    def __reduce__(self) -> Any:
        return ShardedRows, (self.paths,)

    def __repr__(self) -> str:
        return f"ShardedRows({len(self)} rows in {len(self.paths)} files)"
