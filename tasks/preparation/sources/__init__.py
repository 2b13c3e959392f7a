"""The index of sources: which files are read as documents. A new format is one file beside this, and one line here."""

from .arrow import Arrow
from .base import Bad, Document, File, Format, Part, Reading
from .jsonl import JsonLines
from .parquet import Parquet
from .text import Text

FORMATS: tuple[Format, ...] = (Text(), JsonLines(), Parquet(), Arrow())

__all__ = ["FORMATS", "Bad", "Document", "File", "Format", "Part", "Reading"]
