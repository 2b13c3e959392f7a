"""Where the trainer is, noted in memory that its parent shares, and can read when it is dead.

The training thread notes its phase, the last completed step, and each unit of the phase that it is through with: a step, a
batch of an evaluation, a commit. Another thread counts beats. So its watcher can tell apart a process that stands still as a
whole and one whose training thread is stuck, and knows at which step it died.
"""

import contextlib
import mmap
import os
import struct
import tempfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

PHASES = ("imports", "idle", "start", "restore", "compile", "step", "callbacks", "save", "evaluate", "sample", "conclude", "close")
SIZE = 4 * 8
_NUMBER = struct.Struct("q")  # aligned and native: copied as a whole
_BEATS, _PHASE, _STEP, _UNITS = range(0, SIZE, 8)


class Place(NamedTuple):
    """What can be read of a process."""

    phase: str
    step: int  # last completed; -1: none is known
    units: int  # of any phases, counted since the start
    beats: int


class Progress:
    """The notes of one process: one thread of it writes, a second one beats, whoever shares the memory reads.

    `fd` is of a file of at least `SIZE` bytes, as `shared_memory` gives it; without one nobody else reads. `on_step` is told of
    each completed step.
    """

    def __init__(self, fd: int | None = None, *, on_step: Callable[[int], None] = lambda step: None):
        self._memory = mmap.mmap(-1 if fd is None else fd, SIZE)
        self._on_step = on_step

    def read(self) -> Place:
        """Where the process is, or was when it died."""
        return Place(PHASES[self._get(_PHASE)], self._get(_STEP), self._get(_UNITS), self._get(_BEATS))

    def start(self) -> None:
        """The first note of a process."""
        self._set(_STEP, -1)
        self._set(_PHASE, 0)

    def beat(self) -> None:
        """The process as a whole goes on. From a thread of its own."""
        self._set(_BEATS, self._get(_BEATS) + 1)

    @contextlib.contextmanager
    def within(self, phase: str) -> Iterator[None]:
        """Do a unit of `phase`; afterwards the phase is that of before."""
        before = self._get(_PHASE)
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
        self._set(_STEP, step)

    def done(self) -> None:
        """One more unit of the phase is done."""
        self._set(_UNITS, self._get(_UNITS) + 1)

    def completed(self, step: int) -> None:
        """A step is done."""
        self._set(_STEP, step)
        self.done()
        self._on_step(step)

    def _enter(self, phase: int) -> None:
        self._set(_PHASE, phase)
        self.done()

    def _get(self, at: int) -> int:
        return int(_NUMBER.unpack_from(self._memory, at)[0])

    def _set(self, at: int, value: int) -> None:
        _NUMBER.pack_into(self._memory, at, value)


def shared_memory() -> int:
    """The descriptor of memory for `Progress`, which lives as long as somebody has it open."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("everstep-progress")
    else:  # macOS
        with tempfile.TemporaryFile() as f:
            fd = os.dup(f.fileno())
    os.ftruncate(fd, SIZE)
    return fd
