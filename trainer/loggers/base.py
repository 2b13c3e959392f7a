"""A logger takes rows of values; where they end up is its own business.

Rows come in order of steps, each (split, step) once. A life that begins at step n first calls `start(n)`: what a dead
life wrote of later steps is then taken back, so that a row that comes again stands once.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ..config import PartConfig


class Logger(Protocol):
    """Where rows go. None of its methods may fail because of a value: what is not finite is shown as such, or left out."""

    def start(self, step: int, info: Mapping[str, Any]) -> None:
        """Begin, or go on, after `step` completed steps. `info`: facts of the run in JSON terms (parameters, mesh, batch size, ...)."""

    def row(self, split: str, step: int, values: Mapping[str, Any]) -> None:
        """One row: values (float, int or None) of a split after `step` steps. Raises RuntimeError before `start` and after `finalize`."""

    def finalize(self, status: str) -> None:
        """The end: status is "success", "nan", "error" or, of a run that goes on later, "stopped".

        What was logged is on the disk afterwards. A second call does nothing.
        """


class LoggerPartConfig(PartConfig):
    """Base of the configs of loggers."""

    def build(self, folder: Path) -> Logger:
        """The logger that keeps its files in `folder`, which exists. Does no I/O: that begins with `start`."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build its logger")


class Gate:
    """Open from `start` to `finalize`: a row at another time is its caller's mistake, and nobody would miss it."""

    def __init__(self, kind: str):
        self.kind = kind
        self.is_open = False
        self.reason = "it was not started"

    def open(self) -> None:
        """Let rows in."""
        self.is_open = True

    def close(self, status: str) -> bool:
        """Keep rows out from now on. False if they were already."""
        if not self.is_open:
            return False
        self.is_open = False
        self.reason = f"it was finalized with status {status!r}"
        return True

    def check(self, split: str, step: int) -> None:
        """Raise RuntimeError unless rows are let in."""
        if not self.is_open:
            raise RuntimeError(f"logger {self.kind!r} takes no row of {split!r} at step {step}: {self.reason}; call start first")
