"""Loggers that follow a run's metrics.jsonl: each row reaches them once, and only after its step was committed.

A row of a step that is not committed may be taken back, and what was sent to another machine stays sent. How far a logger is
stands in a small file beside the rows, marked before it is given more and again afterwards: where a life ended between the
two, the logger is taken back to before the first row it was then given, and is given them anew.
"""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .files import write_atomic
from .loggers.base import Logger
from .names import named
from .rows import values_of
from .rundir import RunDir, lines_after, read_lines

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mark:
    """How far a logger is: the row (split, step) is the last that it has; `giving_from` is the step it is being given.

    Rows are known by their names and not by their number: of those it has, any may be damaged, and so be no row any more.
    """

    split: str | None = None
    step: int = -1
    giving_from: int | None = None

    @classmethod
    def read(cls, place: Path) -> "Mark":
        """That of a file; where there is none, of a logger that has nothing."""
        found: dict[str, Any] = next(read_lines(place), {})
        return cls(found.get("split"), found.get("step", -1), found.get("giving_from"))


class Follower:
    """Feeds one logger from `path`, a run's metrics.jsonl; `place` is the file that remembers how far it is.

    What a logger raises while it takes rows ends its part in this life, with a warning, and not the training: a life to come
    gives it what it missed. What it raises at the start, where a mistake in its config shows, is passed on.
    """

    def __init__(self, logger: Logger, path: Path, place: Path):
        self.logger, self.path, self.place = logger, path, place
        self._mark = Mark()
        self._offset = 0  # bytes of `path` that hold the rows it has
        self._works = False

    def start(self, step: int, info: Mapping[str, Any]) -> None:
        """Start the logger where it stands, taking back what is no row of the run any more; then give it all up to `step`."""
        have = _had(list(self._rows()), Mark.read(self.place))
        row, self._offset = have[-1] if have else ({}, 0)
        last = row.get("step", -1)
        self._mark = Mark(row.get("split"), last)
        self.logger.start(last, info)
        self._works = True
        self.give(step)

    def give(self, committed: int) -> None:
        """Give the logger the rows of steps up to `committed` that it does not have yet."""
        new = [at for at in self._rows() if at[0]["step"] <= committed]
        if not new or not self._works:
            return
        self._note(replace(self._mark, giving_from=new[0][0]["step"]))
        try:
            for row, _ in new:
                self.logger.row(row["split"], row["step"], values_of(row))
        except Exception:
            self._works = False
            log.exception("%s takes no more rows in this life; the next one gives it what it missed", type(self.logger).__name__)
            return
        row, self._offset = new[-1]
        self._note(Mark(row["split"], row["step"]))

    def finalize(self, status: str) -> None:
        """The end of a life."""
        self.logger.finalize(status)

    def _rows(self) -> Iterator[tuple[dict[str, Any], int]]:
        """The rows after those that the logger has, each with the place in the file where it ends."""
        return (at for at in lines_after(self.path, self._offset) if "step" in at[0] and "split" in at[0])

    def _note(self, mark: Mark) -> None:
        self._mark = mark
        self.place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(self.place, json.dumps(asdict(mark)).encode() + b"\n")


def _had(rows: list[tuple[dict[str, Any], int]], mark: Mark) -> list[tuple[dict[str, Any], int]]:
    """Those of all rows that a logger with this mark is left with: what it may have of the step it is to go on in, it is given anew."""
    if mark.giving_from is None:
        for number, (row, _) in enumerate(rows, 1):
            if (row["split"], row["step"]) == (mark.split, mark.step):
                return rows[:number]
    before = mark.step if mark.giving_from is None else mark.giving_from
    return [at for at in rows if at[0]["step"] < before]


def followers(loggers: Sequence[Logger], run_dir: RunDir) -> list[Follower]:
    """One for each logger; a logger keeps its place when others of another kind come or go."""
    return [Follower(logger, run_dir.metrics, run_dir.logs / f"rows-{name}.json") for name, logger in named(loggers)]
