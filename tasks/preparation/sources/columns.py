"""What Parquet and Arrow files have in common: rows out of record batches, and what is wrong with a file."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar

from .base import Bad, Reading, Row

if TYPE_CHECKING:
    import pyarrow as pa

# What reading a damaged file may come to: pyarrow's own errors (of which most are a ValueError or an OSError), and Python's
# at a length or a place that cannot be.
BROKEN = (OSError, ValueError, LookupError, TypeError, NotImplementedError, MemoryError, OverflowError)


class Table:
    """What a format of tables says of itself; see Format."""

    place: ClassVar[str] = "{path} row {number}"
    has_fields: ClassVar[bool] = True
    compressed: ClassVar[bool] = False
    sliced: ClassVar[bool] = True


def of_store(error: Exception) -> bool:
    """Whether an error is of the store, not of what a file holds: pyarrow's own have no number."""
    return isinstance(error, OSError) and (error.errno is not None or type(error) is not OSError)


def damaged(row: int, kind: str, error: Exception) -> Bad:
    """The end of a file that cannot be read beyond `row` rows."""
    if row == 0:
        return Bad(0, "damaged file", f" is no {kind} file that can be read: {error}")
    return Bad(row + 1, "damaged file", f" and all after it cannot be read: {error}; the {kind} file is damaged")


def missing(names: list[str], wanted: Reading) -> str | None:
    """What to say of a file that lacks a column that is wanted."""
    for field in wanted.fields:
        if field not in names:
            shown = ", ".join(map(repr, names[:20])) or "none"
            key = "data.text_field" if field == wanted.text_field else "data.filters"
            return f" has no column {field!r}, only {shown}; set {key}"
    return None


def rows_of(batch: "pa.RecordBatch", first: int, wanted: Reading) -> Iterator[Row | Bad]:
    """The rows of a batch, of which the first has number `first`."""
    fields = wanted.fields
    columns = [_values(batch.column(name)) for name in fields]
    for number, values in enumerate(zip(*columns, strict=True), first):
        yield Row(number, dict(zip(fields, values, strict=True)))


def _values(column: Any) -> list[Any]:
    """A column as Python values; strings as bytes, since one that is no UTF-8 must not take the others with it."""
    import pyarrow as pa

    # Whatever of a damaged file is not checked here is memory that is not ours.
    if pa.types.is_dictionary(column.type):
        column.indices.validate(full=True)
        column = pa.DictionaryArray.from_arrays(column.indices, _as_bytes(column.dictionary), safe=True).dictionary_decode()
    column = _as_bytes(column)
    try:
        return column.to_pylist()
    except (UnicodeDecodeError, ValueError, OverflowError):  # nested strings, times that Python cannot hold
        return [_value(item) for item in column]


def _as_bytes(column: Any) -> Any:
    """Strings as bytes, checked: their offsets, and not whether they are UTF-8."""
    import pyarrow as pa

    alike = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    if column.type in alike:
        column = column.view(alike[column.type])
    column.validate(full=True)
    return column


def _value(item: Any) -> Any:
    try:
        return item.as_py()
    except (UnicodeDecodeError, ValueError, OverflowError):
        return item
