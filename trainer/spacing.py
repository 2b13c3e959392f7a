"""When the next commit is due: at multiples of steps, after some time, or as often as it pays.

When commits happen never changes bits, so here, and nowhere else, training looks at a clock.
"""

import logging
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

log = logging.getLogger(__name__)

SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0}
PATTERN = r"^(auto|\d+(\.\d+)?[smh])$"
# What is expected of a machine of which nothing is known yet: one failure in so many seconds. It weighs as much as that time.
PRIOR = 6 * 3600.0
LEAST = 5.0  # seconds between commits that are due by a clock


def seconds_of(every: str) -> float | None:
    """The seconds of "90s", "10m" or "2h"; None for "auto". Raises ValueError for anything else."""
    if not re.match(PATTERN, every):
        raise ValueError(f"{every!r} is no spacing of commits: give a number of steps, a time such as 90s, 10m or 2h, or auto")
    return None if every == "auto" else float(every[:-1]) * SECONDS[every[-1]]


def optimal(cost: float, between_failures: float) -> float:
    """Seconds of work between commits that lose the least: sqrt(2 cost (M + restart)), of the first order, where a commit costs `cost`
    seconds and a failure comes every M = `between_failures` (Young 1974; Daly 2006, eq. 20, without the restart, which no spacing saves).
    """
    return math.sqrt(2 * cost * between_failures)


def between_failures(events: Sequence[Mapping[str, Any]], *, now: float) -> float:
    """Seconds between failures of a run, by its event log up to time `now`, and by `PRIOR` where it is short.

    A failure is a killed trainer, or a start after a life that said no word of its end. The time that a run lay still counts
    as little as what it was stopped for.
    """
    failures, alive, began, last = 0, 0.0, None, None
    for event in events:
        kind, at = event["event"], event["time"]
        if kind == "started":
            if began is not None:  # the life before ended without a word
                failures += 1
                alive += max(0.0, last - began)
            began = at
        elif kind in ("stopped", "ended", "failed", "finished") and began is not None:
            alive, began = alive + max(0.0, at - began), None
        failures += kind == "killed"
        last = at
    if began is not None:
        alive += max(0.0, now - began)
    return (alive + PRIOR) / (failures + 1)


class Spacing:
    """Says when a commit is due. `history` gives the run's events; read only where the spacing is to be found."""

    def __init__(
        self,
        every: int | str | None,
        history: Callable[[], Sequence[Mapping[str, Any]]],
        *,
        clock: Callable[[], float] = time.monotonic,
        now: Callable[[], float] = time.time,
    ):
        self._steps = every if isinstance(every, int) else None
        self._seconds = seconds_of(every) if isinstance(every, str) else None
        self._auto, self._history, self._clock, self._now = every == "auto", history, clock, now
        self._last = clock()
        self._costs: list[float] = []

    def due(self, step: int) -> bool:
        """Whether a commit is due when `step` is done."""
        if self._steps is not None:
            return step % self._steps == 0
        return self._seconds is not None and self._clock() - self._last >= self._seconds

    def committed(self, cost: float) -> None:
        """A commit is through, that kept training waiting for `cost` seconds."""
        self._last = self._clock()
        if not self._auto:
            return
        self._costs = [*self._costs[-9:], cost]
        usual = sorted(self._costs)[len(self._costs) // 2]
        between = between_failures(self._history(), now=self._now())
        before, self._seconds = self._seconds, max(LEAST, optimal(usual, between))
        if before is None or not 0.67 < self._seconds / before < 1.5:
            log.info(
                "commits every %.0f s: one costs %.2f s, and a failure is to be expected every %.0f s (Young, Daly)",
                self._seconds,
                usual,
                between,
            )
