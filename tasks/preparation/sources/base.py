"""What a source is: a file, or a part of a large one, whose rows a format reads one after the other.

A row is a number and its fields, or says why it is none. What may go wrong with a row is therefore a value and not an
exception: whoever reads counts it, and decides how many are too many.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, ClassVar, NamedTuple, Protocol

from configs.prepare import FilterConfig


class File(NamedTuple):
    """A file as a listing showed it. Small, and crosses process borders."""

    address: str  # that fsspec opens; gives the file system
    path: str  # in that file system, and in messages
    size: int  # bytes; 0 where the store does not say
    version: str | None  # another one if the file is another; None where the store does not say


class Part(NamedTuple):
    """Part `nth` (from 0) of `of` parts of a file, which are read independently."""

    file: File
    nth: int = 0
    of: int = 1

    def of_total(self, total: int) -> range:
        """The share of this part in `total` things in a row."""
        return range(total * self.nth // self.of, total * (self.nth + 1) // self.of)


class Row(NamedTuple):
    """A row of a part: its number, from 1, and its fields."""

    number: int
    values: Mapping[str, Any]


class Bad(NamedTuple):
    """A row that is no document."""

    number: int  # from 1 in its part; 0: the file itself
    reason: str  # a few words, the same for all that are bad in this way
    detail: str  # the rest of a sentence that begins with the place
    rows: int = 1  # how many rows it stands for


class Document(NamedTuple):
    """A row that is one."""

    number: int
    text: str
    size: int  # bytes in UTF-8


class Reading(NamedTuple):
    """What of each row is wanted."""

    text_field: str = "text"
    filters: tuple[FilterConfig, ...] = ()
    max_bytes: int = 1 << 25  # of a document in UTF-8

    @property
    def fields(self) -> list[str]:
        """The fields that are looked at."""
        return list(dict.fromkeys([self.text_field, *(f.field for f in self.filters)]))


class Format(Protocol):
    """How the rows of a kind of file are found. Implementations hold no state."""

    suffixes: ClassVar[tuple[str, ...]]  # of names, without that of a compression
    place: ClassVar[str]  # of a row in messages, of `path` and `number`
    has_fields: ClassVar[bool]  # whether filters have anything to look at
    compressed: ClassVar[bool]  # whether .gz, .zst and .xz may follow the suffix
    sliced: ClassVar[bool]  # whether a large file is read in parts

    def read(self, open_file: Callable[[], IO[bytes]], part: Part, wanted: Reading) -> Iterator[Row | Bad]:
        """The rows of a part in order, numbered from 1 in the part. `open_file` gives the bytes, unpacked, from the beginning.

        A file that is damaged ends with a Bad. Errors of the store are raised as they come.
        """

    def rows_before(self, open_file: Callable[[], IO[bytes]], part: Part) -> int:
        """How many rows the parts before have. May read them: asked where a row has to be named, and not otherwise."""
