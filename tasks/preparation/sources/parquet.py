"""Parquet: a document a row, of which one row group at a time is read. Parts are stretches of row groups."""

from collections.abc import Callable, Iterator
from typing import IO, ClassVar

from .base import Bad, Part, Reading, Row
from .columns import BROKEN, Table, damaged, missing, of_store, rows_of

BATCH = 256  # rows that are Python objects at a time


class Parquet(Table):
    """A row, a document."""

    suffixes: ClassVar[tuple[str, ...]] = (".parquet",)

    def read(self, open_file: Callable[[], IO[bytes]], part: Part, wanted: Reading) -> Iterator[Row | Bad]:
        """See Format.read."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        row = 0
        with open_file() as stream:
            try:
                file = pq.ParquetFile(stream, page_checksum_verification=True)
                sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
                share = part.of_total(len(sizes))
                if (problem := missing(file.schema_arrow.names, wanted)) is not None:
                    if part.nth == 0:
                        yield Bad(0, "no field", problem, rows=max(1, sum(sizes)))
                    return
                for group in share:
                    for batch in file.iter_batches(batch_size=BATCH, row_groups=[group], columns=wanted.fields):
                        yield from rows_of(batch, row + 1, wanted)
                        row += batch.num_rows
                if row != (said := sum(sizes[i] for i in share)):
                    yield damaged(row, "Parquet", ValueError(f"it should have {said - row} more rows"))
            except (*BROKEN, pa.ArrowException) as e:
                if of_store(e):
                    raise
                yield damaged(row, "Parquet", e)

    def rows_before(self, open_file: Callable[[], IO[bytes]], part: Part) -> int:
        """The rows of the row groups before."""
        import pyarrow.parquet as pq

        with open_file() as stream:
            metadata = pq.ParquetFile(stream).metadata
            return sum(metadata.row_group(i).num_rows for i in range(part.of_total(metadata.num_row_groups).start))
