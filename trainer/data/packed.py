"""Rows of tokens on disk: their config and manifest, random access to them, and the batches of training and evaluation.

A training batch is a function of (seed, position): Grain shuffles row numbers with a permutation that is computed, not
stored, so a loader's whole state is one number and any place in any epoch costs the same. Processes cut the batches,
never the rows, so the global batch does not depend on how many there are.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field, ValidationError

from ..config import Config, PartConfig
from ..errors import DataError
from ..files import unseal

if TYPE_CHECKING:
    import numpy as np

    from .base import Batch, Loader

NAME = "manifest.json"
VERSION = 1  # of the files below a prepared folder; part of their digest


class PackedConfig(PartConfig):
    """Base of the configs of data: whatever ends as rows of tokens."""

    seq_len: int = Field(128, ge=2, le=2**24)  # tokens a row
    batch_size: int = Field(16, ge=1, le=2**20)  # rows of the global batch of one step
    eval_batch_size: int | None = Field(None, ge=1)  # rows; None: batch_size


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
    shards: tuple[ShardRecord, ...]


class Duplicates(Config):
    """What was left out because it stands elsewhere."""

    documents: int  # equal to an earlier document
    paragraphs: int  # of training that stand in val or test, and of val that stand in test


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

    def split(self, name: str) -> SplitRecord:
        """The record of split `name`. Raises DataError if there is none."""
        if name not in self.splits:
            raise DataError(
                f"the data has no split {name!r}, only {', '.join(self.splits)}; for a test split set data.test_fraction above 0"
            )
        return self.splits[name]


def load_manifest(folder: str | Path) -> DataManifest:
    """The manifest of a prepared folder, after a look at the size of every file it names.

    Raises DataError if the manifest is missing, damaged or of another version, or a file is missing or of another size.
    """
    folder = Path(folder)
    way_out = f"delete {folder} and prepare again"
    try:
        data = (folder / NAME).read_bytes()
    except OSError as e:
        raise DataError(f"no {NAME} can be read in {folder} ({e.strerror}); {way_out}") from e
    try:
        record = unseal(data)
    except ValueError as e:
        raise DataError(f"{folder / NAME} is damaged: {e}; {way_out}") from e
    if record.get("version") != VERSION:
        raise DataError(f"{folder / NAME} is of version {record.get('version')}, this program reads {VERSION}; {way_out}")
    try:
        manifest = DataManifest.model_validate(record)
    except ValidationError as e:
        raise DataError(f"{folder / NAME} is not a manifest of data: {e}; {way_out}") from e
    for file in (manifest.tokenizer, *(shard for split in manifest.splits.values() for shard in split.shards)):
        path = folder / file.file
        size = path.stat().st_size if path.is_file() else None
        if size != file.size:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DataError(f"{path} {found}, its manifest says {file.size} bytes; {way_out}")
    return manifest


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


def _rows(folder: str | Path, manifest: DataManifest, split: str) -> ShardedRows:
    record = manifest.split(split)
    rows = ShardedRows([Path(folder) / shard.file for shard in record.shards])
    if len(rows) != record.rows:
        raise DataError(
            f"the {split} shards of {folder} hold {len(rows)} rows, the manifest says {record.rows}; delete it and prepare again"
        )
    return rows


class _GrainLoader:
    """A Loader over a Grain dataset of batches; its state is that of the last batch handed out, not of the last one read ahead."""

    def __init__(self, dataset: Any):
        self._iterator = iter(dataset)

    def __iter__(self) -> "Iterator[Batch]":
        return self

    def __next__(self) -> "Batch":
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        return {"next_index": int(self._iterator.get_state()["next_index"])}

    def set_state(self, state: dict[str, Any]) -> None:
        place = state.get("next_index")
        if set(state) != {"next_index"} or type(place) is not int or place < 0:
            raise DataError(f"{state!r} is no place in the data; it must read {{'next_index': batches handed out}}")
        self._iterator.set_state({"next_index": place})


def train_loader(
    folder: str | Path,
    manifest: DataManifest,
    *,
    batch_size: int,
    seed: int,
    num_processes: int = 1,
    process_index: int = 0,
) -> "Loader":
    """The endless training batches of one process, (batch_size // num_processes, seq) each, in an order drawn per epoch.

    The global batch is the processes' batches one after the other, the same for any `num_processes`; one that lies on the
    border of two epochs takes rows of both. Raises DataError if the processes do not divide the batch, or the training
    split has fewer rows than one.
    """
    import grain

    if batch_size % num_processes:
        raise DataError(f"batch_size {batch_size} cannot be divided among {num_processes} processes; make it a multiple of {num_processes}")
    rows = _rows(folder, manifest, "train")
    if len(rows) < batch_size:
        raise DataError(
            f"{len(rows)} training rows of {manifest.seq_len} tokens are fewer than one batch of {batch_size}; "
            "lower data.batch_size or data.seq_len, or give more text"
        )
    # The slice comes after the batch: slicing rows first would change which rows meet in a global batch.
    dataset = grain.MapDataset.source(rows).shuffle(seed).repeat(None)
    dataset = dataset.batch(batch_size // num_processes)[process_index::num_processes]
    return _GrainLoader(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=8)))


def eval_batches(folder: str | Path, manifest: DataManifest, split: str, *, batch_size: int) -> "Iterator[Batch]":
    """Every row of `split` once, in order, as batches of (batch_size, seq); the last is filled up with rows of padding.

    Raises DataError, before the first batch, if the data has no such split.
    """
    rows = _rows(folder, manifest, split)

    def batches() -> "Iterator[Batch]":
        import numpy as np

        for start in range(0, len(rows), batch_size):
            taken = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            batch = {field: np.zeros((batch_size, manifest.seq_len), np.int32) for field in taken[0]}  # segment 0 is padding
            for field, array in batch.items():
                array[: len(taken)] = [row[field] for row in taken]
            yield batch

    return batches()
