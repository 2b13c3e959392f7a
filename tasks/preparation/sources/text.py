"""Plain text and Markdown: a file is one document."""

from collections.abc import Callable, Iterator
from typing import IO, ClassVar

from .base import Bad, Part, Reading, Row


class Text:
    """A file, a document."""

    suffixes: ClassVar[tuple[str, ...]] = (".txt", ".md")
    place: ClassVar[str] = "{path}:{number}"
    has_fields: ClassVar[bool] = False
    compressed: ClassVar[bool] = True
    sliced: ClassVar[bool] = False

    def read(self, open_file: Callable[[], IO[bytes]], part: Part, wanted: Reading) -> Iterator[Row | Bad]:
        """See Format.read; the row's only field is called as the one that is wanted."""
        with open_file() as stream:
            data = read_at_most(stream, wanted.max_bytes)
        if len(data) > wanted.max_bytes:
            yield Bad(1, "too long", f" is longer than data.max_document_bytes {wanted.max_bytes}; cut it up, or raise that")
            return
        try:
            yield Row(1, {wanted.text_field: data.decode("utf-8-sig")})
        except UnicodeDecodeError as e:
            yield no_utf8(data, e, first=1)

    def rows_before(self, open_file: Callable[[], IO[bytes]], part: Part) -> int:
        """None: there are no parts."""
        return 0


def read_at_most(stream: IO[bytes], limit: int) -> bytes:
    """All of a stream, or a little more than `limit` bytes of it."""
    blocks, size = [], 0
    while size <= limit and (block := stream.read(1 << 20)):
        blocks.append(block)
        size += len(block)
    return b"".join(blocks)


def no_utf8(data: bytes, error: UnicodeDecodeError, *, first: int) -> Bad:
    """What is wrong with `data`, whose first line has number `first`."""
    return Bad(first + data.count(b"\n", 0, error.start), "no UTF-8", f" is no UTF-8: {error.reason}; convert the file to UTF-8")
