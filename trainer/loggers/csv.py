"""Rows as tables, `metrics-<split>.csv`: a column `step`, then one per name in the order in which the names appeared.

Only a header may hold a line end, within quotes, and headers are written atomically: a line torn by a crash is always
one of values, and it is the last one, without a line end.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from ..files import fsync, write_atomic
from .base import Gate, LoggerPartConfig

STEP = "step"


class CsvLoggerConfig(LoggerPartConfig):
    """One table per split; an empty cell is a value that was None or not there, what is not finite reads nan, inf or -inf."""

    kind: Literal["csv"] = "csv"

    def build(self, folder: Path) -> "CsvLogger":
        """The logger that writes `metrics-<split>.csv` in `folder`."""
        return CsvLogger(folder)


class CsvLogger:
    """Each row is with the operating system when `row` returns: it outlives the process, and the machine after `finalize`."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.gate = Gate("csv")
        self.columns: dict[Path, list[str]] = {}

    def start(self, step: int, info: Mapping[str, Any]) -> None:
        """Drop the rows of later steps and a torn last line, and learn the columns that are there."""
        self.columns = {}
        for path in sorted(self.folder.glob("metrics-*.csv")):
            columns, rows = read(path)
            if columns[:1] != [STEP]:  # somebody else's table
                continue
            kept = [row for row in rows if int(row[0]) <= step]
            if not kept:
                path.unlink()
                fsync(self.folder)
                continue
            data = encode([columns, *kept])
            if data != path.read_bytes():
                write_atomic(path, data)
            self.columns[path] = columns
        self.gate.open()

    def row(self, split: str, step: int, values: Mapping[str, Any]) -> None:
        """Append the row; if it has new names, the table is written anew with a column for each, and the row in it."""
        self.gate.check(split, step)
        path = self.folder / f"metrics-{quote(split, safe='')}.csv"  # a split's name may be one that a file cannot have
        columns = self.columns.get(path, [STEP])
        new = [name for name in values if name not in columns]
        cells = {**values, STEP: step}
        line = [cells.get(name) for name in columns + new]
        if new or path not in self.columns:
            old = read(path)[1] if path in self.columns else []
            columns = columns + new
            write_atomic(path, encode([columns, *(row + [""] * len(new) for row in old), line]))
            self.columns[path] = columns
        else:
            with open(path, "ab", buffering=0) as f:  # one write: a kill leaves all of the line or none
                f.write(encode([line]))

    def finalize(self, status: str) -> None:
        """Bring the tables to the disk."""
        if self.gate.close(status):
            for path in self.columns:
                fsync(path)
            fsync(self.folder)


def read(path: Path) -> tuple[list[str], list[list[str]]]:
    """The columns and the whole rows of a table that a crash may have torn. Without a whole header there are none."""
    text = path.read_bytes().decode("utf-8", errors="surrogateescape")
    whole = text[: text.rfind("\n") + 1]  # half a number is a number too: only the line's end says that it is all there
    table: list[list[str]] = []
    with suppress(csv.Error):  # a block of zeros, where a machine lost power: the rows before it are good
        table.extend(csv.reader(io.StringIO(whole, newline="")))
    columns = table[0] if table else [STEP]
    return columns, [row for row in table[1:] if len(row) == len(columns) and row[0].isdecimal()]


def encode(table: Iterable[Iterable[Any]]) -> bytes:
    """The bytes of lines of cells."""
    out = io.StringIO(newline="")
    csv.writer(out, lineterminator="\n").writerows(table)
    return out.getvalue().encode("utf-8", errors="surrogateescape")
