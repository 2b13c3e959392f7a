"""Where the wall time of a run goes: every second from its first start to its report is in one bucket.

The flow process keeps the books: what of a stretch of time the trainer says that it spent in its phases is theirs, the rest is
what the flow itself was at. The sums lie in a mapped file of the run directory, so they outlive a kill; the next life finds how
long nobody lived, and that what was trained since the last commit is lost.
"""

import contextlib
import mmap
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.progress import Progress

BUCKETS = ("startup", "prepare", "restore", "compile", "data", "step", "evaluate", "save", "lost", "down", "other")
OF_PHASE = {
    "imports": "startup",
    "start": "startup",
    "restore": "restore",
    "compile": "compile",
    "step": "step",
    "data": "data",
    "callbacks": "other",
    "save": "save",
    "evaluate": "evaluate",
    "sample": "other",
    "conclude": "other",
    "close": "other",
}
AT_STAKE = ("step", "data")  # lost with a life, as far as it was not committed
_FIELDS = (*BUCKETS, *(f"{name} at stake" for name in AT_STAKE), "until", "ended")
_SIZE = 8 * len(_FIELDS)


class Books:
    """The sums, in seconds, in a file. `until` is the time up to which they reach; `ended`: with the report, after which nothing counts."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a+b") as f:
            if os.fstat(f.fileno()).st_size != _SIZE:  # none, or of another version
                f.truncate(0)
                f.write(bytes(_SIZE))  # room that is taken: a mapped hole on a full disk would end the process
                f.flush()
            self._numbers = memoryview(mmap.mmap(f.fileno(), _SIZE)).cast("d")

    def __getitem__(self, name: str) -> float:
        return self._numbers[_FIELDS.index(name)]

    def __setitem__(self, name: str, value: float) -> None:
        self._numbers[_FIELDS.index(name)] = value

    def seconds(self) -> dict[str, float]:
        """Seconds by bucket; what is at stake counts as what it will be if all goes well."""
        return {name: self[name] + (self[f"{name} at stake"] if name in AT_STAKE else 0.0) for name in BUCKETS}


class Timekeeper:
    """Keeps the books of a run from this life of its flow on."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic, now: Callable[[], float] = time.time):
        self._books, self._clock, self._now = Books(path), clock, now
        self.own = "startup"  # what the flow is at where no trainer works for it
        if self._books["until"] and not self._books["ended"]:
            self.lost()
            self._books["down"] += max(0.0, now() - self._books["until"])
        self._progress: Progress | None = None
        self._before: dict[str, float] = {}
        self._commits = 0
        self._last = clock()
        if not self._books["ended"]:
            self._books["until"] = now()

    def follow(self, progress: Progress | None) -> None:
        """From here on this trainer is the one that is waited for. A run that was at its end goes on with it."""
        self._books["ended"] = 0.0
        self.tick()
        self._progress = progress
        if progress is not None:
            self._before, self._commits = progress.seconds(), progress.read().commits

    @contextlib.contextmanager
    def within(self, bucket: str) -> Iterator[None]:
        """What the flow is at."""
        self.tick()
        before, self.own = self.own, bucket
        try:
            yield
        finally:
            self.tick()
            self.own = before

    def tick(self) -> None:
        """Enter the time since the last tick, which is all there is between two calls: no second is counted twice or left out."""
        now = self._clock()
        passed, self._last = now - self._last, now
        if self._books["ended"]:
            return
        spent = self._spent()
        scale = min(1.0, passed / total) if (total := sum(spent.values())) > 0 else 0.0  # read while it goes on, it may be a little off
        for bucket, seconds in spent.items():
            self._books[f"{bucket} at stake" if bucket in AT_STAKE else bucket] += scale * seconds
        self._books[self.own] += passed - scale * total
        self._books["until"] = self._now()
        if self._progress is not None and (commits := self._progress.read().commits) != self._commits:
            self._commits = commits
            self.safe()

    def safe(self) -> None:
        """What was trained up to now is committed."""
        for name in AT_STAKE:
            self._books[name] += self._books[f"{name} at stake"]
            self._books[f"{name} at stake"] = 0.0

    def lost(self) -> None:
        """What was trained since the last commit is to be trained again."""
        for name in AT_STAKE:
            self._books["lost"] += self._books[f"{name} at stake"]
            self._books[f"{name} at stake"] = 0.0

    def end(self) -> None:
        """The report is written."""
        self.tick()
        self._books["ended"] = 1.0

    def seconds(self) -> dict[str, float]:
        """Seconds by bucket up to now."""
        self.tick()
        return self._books.seconds()

    def _spent(self) -> dict[str, float]:
        if self._progress is None:
            return {}
        found, before = self._progress.seconds(), self._before
        self._before = found
        spent = dict.fromkeys(OF_PHASE.values(), 0.0)
        for phase, bucket in OF_PHASE.items():
            spent[bucket] += max(0.0, found[phase] - before[phase])
        return spent


def goodput(seconds: dict[str, float]) -> float | None:
    """The share of the time, preparation aside, that went to steps which are committed; None where there was no time."""
    total = sum(seconds.values()) - seconds["prepare"]
    return seconds["step"] / total if total > 0 else None


def books_of(path: Path) -> dict[str, float] | None:
    """Seconds by bucket of a run whose books lie there; None where it has none."""
    if not path.exists() or path.stat().st_size != _SIZE:
        return None
    with open(path, "rb") as f:
        numbers = memoryview(f.read()).cast("d")
    found = dict(zip(_FIELDS, numbers, strict=True))
    return {name: found[name] + (found[f"{name} at stake"] if name in AT_STAKE else 0.0) for name in BUCKETS}


def as_table(seconds: dict[str, float]) -> list[dict[str, str]]:
    """The buckets with something in them, by size, for people."""
    total = sum(seconds.values()) or 1.0
    rows = sorted(((s, name) for name, s in seconds.items() if s >= 0.05), reverse=True)
    return [{"what": name, "seconds": f"{s:,.1f}", "share": f"{100 * s / total:.1f} %"} for s, name in rows]
