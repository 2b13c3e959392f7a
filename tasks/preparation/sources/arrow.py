"""Arrow IPC, files (also called feather) and streams: a document a row, of which one record batch at a time is read.

Parts are stretches of record batches. A stream has no list of them, so its first part is all of it.
"""

from collections.abc import Callable, Iterator
from typing import IO, ClassVar

from .base import Bad, Part, Reading, Row
from .columns import BROKEN, Table, damaged, missing, of_store, rows_of

MAGIC = b"ARROW1"
OLD_FEATHER = b"FEA1"
BEGIN = b"\xff\xff\xff\xff"  # of every message of a stream
END = BEGIN + b"\0\0\0\0"  # of a stream


class Arrow(Table):
    """A row, a document."""

    suffixes: ClassVar[tuple[str, ...]] = (".arrow", ".feather", ".ipc", ".arrows")

    def read(self, open_file: Callable[[], IO[bytes]], part: Part, wanted: Reading) -> Iterator[Row | Bad]:
        """See Format.read."""
        import pyarrow as pa

        row = 0
        with open_file() as stream:
            magic = stream.read(len(MAGIC))
            stream.seek(0)
            try:
                if magic[:4] == OLD_FEATHER:
                    yield Bad(0, "damaged file", " is of feather's first version, which is not read; write it again with pyarrow.feather")
                elif magic == MAGIC:
                    reader = pa.ipc.open_file(stream)
                    share = part.of_total(reader.num_record_batches)
                    if (problem := missing(reader.schema.names, wanted)) is not None:
                        if part.nth == 0:
                            rows = sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
                            yield Bad(0, "no field", problem, rows=max(1, rows))
                        return
                    for i in share:
                        batch = reader.get_batch(i)
                        yield from rows_of(batch, row + 1, wanted)
                        row += batch.num_rows
                elif part.nth == 0:
                    yield from self._stream(stream, wanted)
            except (*BROKEN, pa.ArrowException) as e:
                if of_store(e):
                    raise
                yield damaged(row, "Arrow", e)

    def rows_before(self, open_file: Callable[[], IO[bytes]], part: Part) -> int:
        """The rows of the record batches before."""
        import pyarrow as pa

        with open_file() as stream:
            if part.nth == 0 or stream.read(len(MAGIC)) != MAGIC:
                return 0
            stream.seek(0)
            reader = pa.ipc.open_file(stream)
            return sum(reader.get_batch(i).num_rows for i in range(part.of_total(reader.num_record_batches).start))

    def _stream(self, stream: IO[bytes], wanted: Reading) -> Iterator[Row | Bad]:
        import pyarrow as pa

        row = 0
        try:
            # A stream that was cut between two messages reads as a shorter one.
            size = stream.seek(0, 2)
            whole = size >= len(END) and stream.seek(-len(END), 2) and stream.read() == END
            stream.seek(0)
            if stream.read(len(BEGIN)) != BEGIN:  # read as the form of before 2019, other bytes may mean a stream of nothing
                yield damaged(row, "Arrow", OSError("it does not begin as a stream does"))
                return
            if _swallows(stream, size):
                yield damaged(row, "Arrow", OSError("the length of its schema is damaged"))
                return
            stream.seek(0)
            reader = pa.ipc.open_stream(stream)
            if (problem := missing(reader.schema.names, wanted)) is not None:
                yield Bad(0, "no field", problem, rows=max(1, sum(batch.num_rows for batch in reader)))
                return
            for batch in reader:
                yield from rows_of(batch, row + 1, wanted)
                row += batch.num_rows
            if not whole:
                yield damaged(row, "Arrow", OSError("the mark of its end is missing"))
            elif stream.tell() != size:  # a length that is damaged may lead to what looks like the end
                yield damaged(row, "Arrow", OSError(f"it ends after {stream.tell()} of {size} bytes"))
        except (*BROKEN, pa.ArrowException) as e:
            if of_store(e):
                raise
            yield damaged(row, "Arrow", e)


def _swallows(stream: IO[bytes], size: int) -> bool:
    """Whether the first message, whose length comes next, holds what begins like another: too long, it would take rows for itself."""
    length = int.from_bytes(stream.read(4), "little", signed=True)
    content = stream.read(max(0, min(length, size)))
    begins = (i for i in range(0, len(content) - len(END), 8) if content[i : i + len(BEGIN)] == BEGIN)  # messages lie at multiples of 8
    return any(int.from_bytes(content[i + 4 : i + 8], "little") <= size for i in begins)
