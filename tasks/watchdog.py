"""Finds a trainer process that goes on no more, and leaves one alone that is only slow.

A process without a beat stands still as a whole. One whose training thread is through with nothing for ten times as long as
that ever took in this phase is stuck. Where nothing was seen of a phase yet, or where what was seen says nothing of what is to
come (a user's code), a generous limit holds. Time counts as far as this process saw it pass: after a sleep of the whole
machine nobody is late.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from trainer.progress import Place

LEAST = 10.0  # seconds that everything is given
FACTOR = 10  # times the longest that was seen
LONG_SILENCE = 60.0  # seconds that a process may hold the interpreter's lock while it works, and so give no beat
GENEROUS = {
    "imports": 180.0,
    "idle": 60.0,  # though it was asked for something
    "start": 300.0,  # backends of accelerators are slow to begin
    "restore": 600.0,
    "compile": 1800.0,
    "step": 600.0,
    "data": 600.0,
    "callbacks": 600.0,
    "save": 600.0,
    "evaluate": 600.0,
    "sample": 600.0,
    "conclude": 600.0,
    "close": 60.0,
}
UNJUDGED = ("imports", "idle", "start", "callbacks", "sample", "conclude", "close")  # by what was seen
# What may take far longer than it did before, if a cache was emptied or a disk is busy: a process at work on it is given
# the generous limit, whatever was seen.
WORKING = ("restore", "compile", "data", "save")


class Activity(NamedTuple):
    """What the kernel knows of a process."""

    stopped: bool  # by a signal
    work: int  # CPU time in hundredths of a second and kilobytes of I/O, in one sum that grows while anything is done
    waits_for_disk: bool


class Watchdog:
    """Watches one process. `seen` has the longest unit of each phase, in seconds, and outlives the process.

    `patience` multiplies what is judged by progress: twice as long after each process that was given up for that reason.
    """

    def __init__(
        self,
        read: Callable[[], Place],
        activity: Callable[[], Activity],
        seen: dict[str, float],
        *,
        patience: float = 1.0,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._read, self._activity, self._seen, self._patience, self._clock = read, activity, seen, patience, clock
        self.forgive()

    def forgive(self) -> None:
        """Begin to count anew: nobody looked for a while."""
        self._place, self._looked = self._read(), self._clock()
        self._silent = self._stuck = 0.0
        self._found, self._sampled, self._works = Activity(False, 0, False), -1.0, True

    def look(self) -> str | None:
        """Why the process is to be replaced; None: it may go on. Called several times a second while somebody waits for it."""
        place, now = self._read(), self._clock()
        passed, self._looked = min(1.0, now - self._looked), now
        self._silent = 0.0 if place.beats != self._place.beats else self._silent + passed
        if (place.phase, place.units) == (self._place.phase, self._place.units):
            self._stuck += passed
        else:
            phase = self._place.phase
            self._seen[phase] = max(self._seen.get(phase, 0.0), self._stuck)
            self._stuck = 0.0
        self._place = place
        if max(self._silent, self._stuck) < LEAST - 2:
            return None
        if now - self._sampled >= 1:
            self._sample(now)
        return self._judge()

    def limit(self, phase: str) -> float:
        """Seconds that a unit of `phase` may take."""
        if phase in UNJUDGED or phase not in self._seen:
            return GENEROUS[phase] * self._patience
        return max(LEAST, FACTOR * self._seen[phase]) * self._patience

    def _sample(self, now: float) -> None:
        found = self._activity()
        # A twentieth of a core, or some kilobytes a second. Of the first sample nothing is known, so it counts as work.
        self._works = found.waits_for_disk or self._sampled < 0 or found.work - self._found.work > 5 * (now - self._sampled)
        self._found, self._sampled = found, now

    def _judge(self) -> str | None:
        if self._silent > LEAST and self._found.stopped:
            return f"a signal stopped it, and it gave no sign of life for {self._silent:.0f} s"
        phase = self._place.phase
        if self._silent > (LONG_SILENCE if self._works or phase == "imports" else LEAST):
            return f"it gave no sign of life for {self._silent:.0f} s"
        limit = self.limit(phase)
        if self._works and phase in WORKING:
            limit = max(limit, GENEROUS[phase] * self._patience)
        return f"nothing got done for {self._stuck:.0f} s" if self._stuck > limit else None


def activity_of(pid: int) -> Activity:
    """What the kernel knows of process `pid`; where it tells nothing, the process counts as at work."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        done = dict(line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
        states = [p.read_text().rpartition(")")[2].split()[0] for p in Path(f"/proc/{pid}/task").glob("*/stat")]
    except (OSError, ValueError):
        return Activity(stopped=False, work=0, waits_for_disk=True)
    moved = (int(done["rchar"]) + int(done["wchar"])) // 1024
    return Activity(stopped=fields[0] in "Tt", work=int(fields[11]) + int(fields[12]) + moved, waits_for_disk="D" in states)
