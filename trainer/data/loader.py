"""The batches of training, in an order that is a function of the seed alone, and those of evaluation.

Grain shuffles row numbers with a permutation that is computed, not stored, so a loader's whole state is one number and any
place in any epoch costs the same. Processes cut the batches, never the rows, so the global batch does not depend on how
many there are.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError
from .packed import SOURCE, DataManifest, ShardedRows, ShardRecord
from .shards import RemoteRows

if TYPE_CHECKING:
    from .base import Batch, Loader

READ_AHEAD = 8  # batches
MOST_HELD = READ_AHEAD + 4  # batches in memory: read ahead, being made, handed out
SPARE = 32_000_000  # bytes
Ranges = Sequence[tuple[int, int]]  # [a, b), ascending and apart


AnyRows = ShardedRows | RemoteRows


def _open(folder: str | Path, shards: Sequence[ShardRecord]) -> AnyRows:
    if (Path(folder) / SOURCE).exists():
        return RemoteRows(folder, shards)
    return ShardedRows([Path(folder) / shard.file for shard in shards])


def rows_of(folder: str | Path, manifest: DataManifest, split: str) -> AnyRows:
    """Random access to the rows of a split, wherever its shards lie. Raises DataError if they are not what the manifest says."""
    record = manifest.split(split)
    rows = _open(folder, record.shards)
    if len(rows) != record.rows:
        raise DataError(
            f"the {split} shards of {folder} hold {len(rows)} rows, the manifest says {record.rows}; delete it and prepare again"
        )
    return rows


def place_of(step: int, leave_out: Ranges = ()) -> int:
    """The place, from 0, of the batch of step `step`, from 1: so many batches were trained before it, and those left out passed."""
    place = step - 1
    for a, b in leave_out:
        if a <= place:
            place += b - a
    return place


class TrainLoader:
    """A Loader over a Grain dataset of batches; its place is that after the last batch handed out, not after the last read ahead.

    Memory of its own, beyond the libraries': MOST_HELD batches and SPARE bytes, however large the data is and however long it
    runs (tests/trainer/test_data.py). Rows that were read stay in mapped files, which the kernel takes back when it needs room.
    """

    def __init__(self, dataset: Any, leave_out: Ranges = ()):
        self._iterator = iter(dataset)
        self._leave_out = tuple(leave_out)
        self._place = 0

    def __iter__(self) -> "Iterator[Batch]":
        return self

    def __next__(self) -> "Batch":
        for a, b in self._leave_out:
            if a <= self._place < b:
                self._go_to(b)
        batch = next(self._iterator)
        self._place += 1
        return batch

    def get_state(self) -> dict[str, Any]:
        """The place after the last batch handed out."""
        return {"next_index": self._place}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a place that `get_state` gave. Raises DataError for what is none."""
        place = state.get("next_index")
        if set(state) != {"next_index"} or type(place) is not int or place < 0:
            raise DataError(f"{state!r} is no place in the data; it must read {{'next_index': batches handed out or left out}}")
        self._go_to(place)

    def _go_to(self, place: int) -> None:
        self._iterator.set_state({"next_index": place})
        self._place = place


def train_loader(
    folder: str | Path,
    manifest: DataManifest,
    *,
    batch_size: int,
    seed: int,
    leave_out: Ranges = (),
    num_processes: int = 1,
    process_index: int = 0,
) -> "Loader":
    """The endless training batches of one process, (batch_size // num_processes, seq) each, in an order drawn per epoch.

    The global batch is the processes' batches one after the other, the same for any `num_processes`; one that lies on the
    border of two epochs takes rows of both. Batches at the places `leave_out` are passed over.
    Raises DataError if the processes do not divide the batch, or the training split has fewer rows than one.
    """
    if batch_size % num_processes:
        raise DataError(f"batch_size {batch_size} cannot be divided among {num_processes} processes; make it a multiple of {num_processes}")
    rows = rows_of(folder, manifest, "train")
    if len(rows) < batch_size:
        raise DataError(
            f"{len(rows)} training rows of {manifest.seq_len} tokens are fewer than one batch of {batch_size}; "
            "lower data.batch_size or data.seq_len, or give more text"
        )
    parts, weights = _parts(folder, manifest, rows)
    dataset = batches_of(
        *parts, weights=weights, batch_size=batch_size, seed=seed, num_processes=num_processes, process_index=process_index
    )
    return TrainLoader(dataset, leave_out)


def _parts(folder: str | Path, manifest: DataManifest, rows: AnyRows) -> tuple[list[AnyRows], list[float]]:
    """The training rows of each part of a mixture, and the weights; of other data all rows."""
    if not manifest.parts:
        return [rows], [1.0]
    shards, parts = list(manifest.split("train").shards), []
    for part in manifest.parts:
        parts.append(_open(folder, shards[: part.shards]))
        del shards[: part.shards]
    return parts, [part.weight for part in manifest.parts]


def batch_of(
    folder: str | Path, manifest: DataManifest, *, step: int, batch_size: int, seed: int, leave_out: Ranges = ()
) -> "tuple[int, Batch]":
    """The place, and the global batch, (batch_size, seq), of step `step`, from 1, of a training with these settings."""
    loader = train_loader(folder, manifest, batch_size=batch_size, seed=seed, leave_out=leave_out)
    place = place_of(step, leave_out)
    loader.set_state({"next_index": place})
    return place, next(loader)


def batches_of(
    *parts: AnyRows,
    batch_size: int,
    seed: int,
    weights: Sequence[float] = (1.0,),
    num_processes: int = 1,
    process_index: int = 0,
) -> Any:
    """The Grain dataset of one process's batches, each epoch of rows in an order of its own. One thread reads ahead of it.

    Rows of several parts meet in proportion to the weights, each part shuffled and repeated by itself. Grain takes the
    proportions in whole hundredths of the smallest weight, so each is met within 1 %.
    """
    import grain

    # Endless for all purposes; `repeat(None)` has a length that overflows in batches of one row.
    endless = 2**62 if len(parts) == 1 else 2**52  # the lengths of a mixture are counted in floats
    datasets = [
        # The seeds of parts are apart, or equal texts would come in one order; a mixture of one is as its part alone.
        grain.MapDataset.source(rows).shuffle((seed + i * 0x9E3779B9) % 2**32).repeat(endless // len(rows))
        for i, rows in enumerate(parts)
    ]
    dataset = datasets[0] if len(datasets) == 1 else grain.MapDataset.mix(datasets, weights)
    # The slice comes after the batch: slicing rows first would change which rows meet in a global batch.
    dataset = dataset.batch(batch_size // num_processes)[process_index::num_processes]
    return dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=READ_AHEAD))


def eval_batches(folder: str | Path, manifest: DataManifest, split: str, *, batch_size: int) -> "Iterator[Batch]":
    """Every row of `split` once, in order, as batches of (batch_size, seq); the last is filled up with rows of padding.

    Raises DataError, before the first batch, if the data has no such split.
    """
    rows = rows_of(folder, manifest, split)

    def batches() -> "Iterator[Batch]":
        import numpy as np

        for start in range(0, len(rows), batch_size):
            taken = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            batch = {field: np.zeros((batch_size, manifest.seq_len), np.int32) for field in taken[0]}  # segment 0 is padding
            for field, array in batch.items():
                array[: len(taken)] = [row[field] for row in taken]
            yield batch

    return batches()
