"""Where the trainer is, noted in memory that its parent shares, and can read when it is dead.

The training thread notes its phase, the last completed step, each unit of the phase that it is through with (a step, a batch of
an evaluation, a commit), and how long it was in each phase. Another thread counts beats. So its watcher can tell apart a process
that stands still as a whole and one whose training thread is stuck, knows at which step it died, and what its time went to.
"""

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

PHASES = ("imports", "idle", "start", "restore", "compile", "step", "data", "callbacks", "save", "evaluate", "sample", "conclude", "close")
_BEATS, _PHASE, _STEP, _UNITS, _COMMITS = range(5)
_SINCE = 5  # seconds of the monotonic clock, which is one for all processes of a machine; behind it the seconds of each phase
SIZE = 8 * (_SINCE + 1 + len(PHASES))


class Place(NamedTuple):
    """What can be read of a process."""

    phase: str
    step: int  # last completed; -1: none is known
    units: int  # of any phases, counted since the start
    beats: int
    commits: int  # that became final


class Progress:
    """The notes of one process: one thread of it writes, a second one beats, whoever shares the memory reads.

    `fd` is of a file of at least `SIZE` bytes, as `shared_memory` gives it; without one nobody else reads. `on_step` is told of
    each completed step.
    """

    def __init__(self, fd: int | None = None, *, on_step: Callable[[int], None] = lambda step: None):
        memory = memoryview(mmap.mmap(-1 if fd is None else fd, SIZE))
        # Numbers of eight bytes are copied as a whole.
        self._counts, self._seconds = memory[: 8 * _SINCE].cast("q"), memory[8 * _SINCE :].cast("d")
        self._on_step = on_step
        if fd is None:
            self.start()

    def read(self) -> Place:
        """Where the process is, or was when it died."""
        c = self._counts
        return Place(PHASES[c[_PHASE]], c[_STEP], c[_UNITS], c[_BEATS], c[_COMMITS])

    def seconds(self) -> dict[str, float]:
        """How long it was in each phase up to now, or to its last note of one if it is dead. Read while it goes on: roughly."""
        phase, since = self._counts[_PHASE], self._seconds[0]
        found = list(self._seconds[1:])
        if since:
            found[phase] += max(0.0, time.monotonic() - since)
        return dict(zip(PHASES, found, strict=True))

    def start(self) -> None:
        """The first note of a process."""
        self._counts[_STEP] = -1
        self._seconds[0] = time.monotonic()

    def beat(self) -> None:
        """The process as a whole goes on. From a thread of its own."""
        self._counts[_BEATS] += 1

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Do a unit of `phase`; afterwards the phase is that of before."""
        before = self._counts[_PHASE]
        self._enter(PHASES.index(phase))
        try:
            yield
        finally:
            self._enter(before)

    def enter(self, phase: str) -> None:
        """From here on the phase is another."""
        self._enter(PHASES.index(phase))

    def at(self, step: int) -> None:
        """The step in memory is another, without any having been done: made, or restored."""
        self._counts[_STEP] = step

    def completed(self, step: int) -> None:
        """A step is done."""
        self._counts[_STEP] = step
        self._counts[_UNITS] += 1
        self._on_step(step)

    def committed(self) -> None:
        """A commit became final."""
        self._counts[_COMMITS] += 1

    def _enter(self, phase: int) -> None:
        now = time.monotonic()
        self._seconds[1 + self._counts[_PHASE]] += now - self._seconds[0]
        self._seconds[0] = now
        self._counts[_PHASE] = phase
        self._counts[_UNITS] += 1


def shared_memory() -> int:
    """The descriptor of memory for `Progress`, which lives as long as somebody has it open."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("everstep-progress")
    else:  # macOS
        with tempfile.TemporaryFile() as f:
            fd = os.dup(f.fileno())
    os.ftruncate(fd, SIZE)
    return fd
