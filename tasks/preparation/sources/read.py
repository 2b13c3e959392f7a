"""Documents out of the parts of files: rows that pass the filters and have text, and what is wrong with the others."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from trainer.errors import DataError

from .base import Bad, Document, File, Format, Part, Reading, Row
from .columns import of_store
from .find import can_be_sliced, find_files, format_of, open_file, shown, still_the_same, storage_errors
from .unpack import DAMAGED

__all__ = ["Left", "can_be_sliced", "find_files", "message", "read_documents"]


class Left(NamedTuple):
    """A row that is left out and is no fault: `why` is "filtered" or "empty"."""

    why: str


def read_documents(part: Part, wanted: Reading) -> Iterator[Document | Bad | Left]:
    """What the rows of a part are, in order. Numbers of bad ones are those in the whole file, others count in the part.

    Raises DataError if the file is gone or another one than was listed, StorageError if its store failed.
    """
    file = part.file
    format, _ = format_of(file.path)
    assert format is not None, "listings have no others"
    if wanted.filters and not format.has_fields:
        raise DataError(f"data.filters looks at field {wanted.filters[0].field!r}, but {shown(file)} is plain text; leave one of them out")

    def opened() -> Any:
        return open_file(part)

    number = 0
    before: int | None = 0 if part.nth == 0 else None
    with storage_errors(shown(file)):
        rows = format.read(opened, part, wanted)
        while True:
            try:
                row = next(rows, None)
            except DAMAGED as e:
                row = Bad(
                    number + 1, "damaged file", f" and all after it cannot be unpacked: {e}; the file is damaged or its name ends wrongly"
                )
            if row is None:
                break
            number = row.number
            found = check(row, wanted) if isinstance(row, Row) else row
            if isinstance(found, Bad):
                if before is None:
                    before = _rows_before(format, opened, part)
                yield found._replace(number=found.number + before if found.number else 0)
            else:
                yield found
            if isinstance(row, Bad) and row.reason == "damaged file":
                break
        if not still_the_same(file):
            raise DataError(f"{shown(file)} changed while it was prepared; start again when nothing writes to it")


def _rows_before(format: Format, opened: Any, part: Part) -> int:
    try:
        return format.rows_before(opened, part)
    except Exception as e:
        if of_store(e):
            raise
        return 0  # the file is damaged there too: its rows are numbered from the part's beginning


def check(row: Row, wanted: Reading) -> Document | Bad | Left:
    """What a row is."""
    number, values = row
    for rule in wanted.filters:
        try:
            if not rule.holds(values.get(rule.field)):
                return Left("filtered")
        except TypeError as e:
            return Bad(number, "cannot be filtered", f": field {rule.field!r} {e}; mend or remove it, or change data.filters")
    name = wanted.text_field
    if name not in values:
        return Bad(
            number, "no field", f" has no field {name!r}, only {', '.join(map(repr, list(values)[:20])) or 'none'}; set data.text_field"
        )
    text = values[name]
    if text is None:
        return Bad(number, "null", f": field {name!r} is None, not text; mend or remove it, or set data.text_field")
    if isinstance(text, bytes):
        try:
            text = text.decode()
        except UnicodeDecodeError as e:
            return Bad(number, "no UTF-8", f" is no UTF-8: {e.reason} at byte {e.start}; mend or remove it")
    if not isinstance(text, str):
        return Bad(number, "no text", f": field {name!r} is {text!r:.80}, not text; mend or remove it, or set data.text_field")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as e:  # JSON can spell half of a surrogate pair
        return Bad(number, "no Unicode", f": field {name!r} is no Unicode text: {e.reason} at character {e.start}; mend or remove it")
    if size > wanted.max_bytes:
        return Bad(
            number, "too long", f" has {size} bytes of text, data.max_document_bytes is {wanted.max_bytes}; cut it up, or raise that"
        )
    if not text or text.isspace():
        return Left("empty")
    return Document(number, text, size)


def message(file: File, bad: Bad) -> str:
    """`bad` as a sentence that says where."""
    format, _ = format_of(file.path)
    assert format is not None
    return (format.place.format(path=shown(file), number=bad.number) if bad.number else shown(file)) + bad.detail
