"""Rows as lines of JSON in `metrics.jsonl`, in the form that the run directory's own file has.

For a trainer without a pipeline. In a run directory the pipeline writes that very file itself; `folder` must be another.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..rows import Rows
from .base import Gate, LoggerPartConfig


class JsonlLoggerConfig(LoggerPartConfig):
    """One line of JSON per row; what is not finite becomes null."""

    kind: Literal["jsonl"] = "jsonl"

    def build(self, folder: Path) -> "JsonlLogger":
        """The logger that writes `metrics.jsonl` in `folder`."""
        return JsonlLogger(folder)


class JsonlLogger:
    """Each row is with the operating system when `row` returns: it outlives the process, and the machine after `finalize`."""

    def __init__(self, folder: Path):
        self.rows = Rows(folder / "metrics.jsonl")
        self.gate = Gate("jsonl")

    def start(self, step: int, info: Mapping[str, Any]) -> None:
        """Drop the rows of later steps and a torn last line."""
        self.rows.cut(step)
        self.gate.open()

    def row(self, split: str, step: int, values: Mapping[str, Any]) -> None:
        """Append the row."""
        self.gate.check(split, step)
        self.rows.append(split, step, values)

    def finalize(self, status: str) -> None:
        """Bring the rows to the disk."""
        if self.gate.close(status):
            self.rows.sync()
