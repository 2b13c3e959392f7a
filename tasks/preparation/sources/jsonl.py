"""JSON lines: an object a line, a document an object.

A part of a large file has the lines that begin in its share of the bytes. Their numbers are only known from the bytes
before, which are read where a line is bad and not otherwise.
"""

import io
import json
from collections.abc import Callable, Iterator
from typing import IO, Any, ClassVar, cast

from .base import Bad, Part, Reading, Row
from .text import no_utf8

BLOCK = 1 << 20


class JsonLines:
    """A line, a document."""

    suffixes: ClassVar[tuple[str, ...]] = (".jsonl", ".ndjson", ".json")
    place: ClassVar[str] = "{path}:{number}"
    has_fields: ClassVar[bool] = True
    compressed: ClassVar[bool] = True
    sliced: ClassVar[bool] = True

    def read(self, open_file: Callable[[], IO[bytes]], part: Part, wanted: Reading) -> Iterator[Row | Bad]:
        """See Format.read; lines of white space are no rows."""
        share = part.of_total(part.file.size)
        longest = 4 * wanted.max_bytes + BLOCK  # of a line: escapes and the other fields take room too
        with open_file() as raw, io.BufferedReader(cast(io.RawIOBase, raw), BLOCK) as stream:
            place = _begin(stream, share.start)
            number = 0
            while part.of == 1 or place < share.stop:
                line = stream.readline(longest + 1)
                if not line:
                    return
                number += 1
                first = place == 0
                place += len(line)
                if len(line) > longest:
                    place += _skip_line(stream)
                    found: Row | Bad | None = Bad(number, "too long", f" is longer than {longest} bytes; cut it up")
                else:
                    found = _parse(line, number, wanted, first=first)
                if found is not None:
                    yield found

    def rows_before(self, open_file: Callable[[], IO[bytes]], part: Part) -> int:
        """The lines that begin in earlier parts."""
        count, last, left = 0, b"\n", part.of_total(part.file.size).start
        with open_file() as stream:
            while left and (block := stream.read(min(BLOCK, left))):
                count, last, left = count + block.count(b"\n"), block[-1:], left - len(block)
        return count + (last != b"\n")


def _begin(stream: "io.BufferedReader[Any]", start: int) -> int:
    """Go to the first line that begins at `start` or later. Returns where that is."""
    if not start:
        return 0
    stream.seek(start - 1)
    return start - 1 + _skip_line(stream)


def _skip_line(stream: "io.BufferedReader[Any]") -> int:
    """Read to the end of the line, holding a block at most. Returns how many bytes that were."""
    size = 0
    while block := stream.readline(BLOCK):
        size += len(block)
        if block.endswith(b"\n"):
            break
    return size


class _TwiceError(ValueError):
    """A key that stands twice: json would keep the last and lose the other without a word."""


def _parse(line: bytes, number: int, wanted: Reading, *, first: bool) -> Row | Bad | None:
    try:
        text = line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as e:
        return no_utf8(line, e, first=number)
    if not text.strip():
        return None

    def gather(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        made = dict(pairs)
        if len(made) != len(pairs):
            keys = [key for key, _ in pairs]
            for name in wanted.fields:
                if keys.count(name) > 1:
                    raise _TwiceError(name)
        return made

    try:
        record = json.loads(text, object_pairs_hook=gather)
    except _TwiceError as e:
        return Bad(number, "a field twice", f" has field {e.args[0]!r} twice; mend or remove the line")
    except (ValueError, RecursionError) as e:
        return Bad(number, "no JSON", f" is no JSON: {e}; mend or remove the line")
    if not isinstance(record, dict):
        return Bad(number, "no object", f" is a JSON {type(record).__name__}, not an object with a field {wanted.text_field!r}")
    return Row(number, record)
