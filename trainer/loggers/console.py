"""Rows as lines of text, through `logging`.

Whether and where they show is up to the host program: nothing here adds a handler, sets a level or prints.
"""

import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from .base import Gate, LoggerPartConfig

log = logging.getLogger(__name__)


class ConsoleLoggerConfig(LoggerPartConfig):
    """One INFO line per row, from the logger `trainer.loggers.console`."""

    kind: Literal["console"] = "console"
    every: int = Field(1, ge=1)  # rows of a split per line; the first row of a life always has one

    def build(self, folder: Path) -> "ConsoleLogger":
        """The logger; it keeps nothing in `folder`."""
        return ConsoleLogger(every=self.every)


class ConsoleLogger:
    """Counts the rows of each split apart, so that a rare validation is not lost among the rows of training."""

    def __init__(self, *, every: int = 1):
        self.every = every
        self.gate = Gate("console")
        self.seen: Counter[str] = Counter()

    def start(self, step: int, info: Mapping[str, Any]) -> None:
        """Begin to count anew; a line that was shown cannot be taken back."""
        self.seen.clear()
        self.gate.open()

    def row(self, split: str, step: int, values: Mapping[str, Any]) -> None:
        """Log the line, if it is this row's turn."""
        self.gate.check(split, step)
        if self.seen[split] % self.every == 0:
            log.info("step %d %s: %s", step, split, " ".join(f"{name}={shown(value)}" for name, value in values.items()))
        self.seen[split] += 1

    def finalize(self, status: str) -> None:
        """Take no more rows."""
        self.gate.close(status)


def shown(value: Any) -> str:
    """A value in few characters: five digits of a float, all of an int."""
    return "none" if value is None else f"{value:.5g}" if isinstance(value, float) else str(value)
