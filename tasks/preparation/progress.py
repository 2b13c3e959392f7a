"""How far a stage of the preparation is: jobs, bytes, tokens, and how long it will take."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from .jobs import Job

Tell = Callable[[str], None]


class Progress:
    """Counts the jobs of one stage that are done."""

    def __init__(self, stage: str, jobs: Sequence[Job]):
        self.stage = stage
        self.num_jobs, self.size = len(jobs), sum(job.size for job in jobs)
        self.jobs_done = self.size_done = self.tokens = 0
        self._began = time.monotonic()

    def add(self, job: Job, facts: dict[str, Any]) -> None:
        """Count a job that has ended."""
        self.jobs_done += 1
        self.size_done += job.size
        self.tokens += sum(split["tokens"] for split in facts.get("splits", {}).values())

    @property
    def fraction(self) -> float:
        """Of the stage."""
        return self.size_done / self.size if self.size else float(0 < self.jobs_done == self.num_jobs)

    @property
    def seconds_left(self) -> float | None:
        """By the speed up to now; None where there is none yet."""
        seconds = time.monotonic() - self._began
        return seconds / self.size_done * (self.size - self.size_done) if self.size_done else None

    def __str__(self) -> str:
        if not self.num_jobs:
            return self.stage
        parts = [f"{self.jobs_done}/{self.num_jobs}"]
        if self.size_done:  # before, there is no speed to tell
            parts.append(f"{self.size_done / 1e6 / max(time.monotonic() - self._began, 1e-3):.1f} MB/s")
        if self.tokens:
            parts.append(f"{self.tokens / 1e6:.1f} M tokens")
        if self.seconds_left and self.jobs_done < self.num_jobs:
            parts.append(f"ETA {_clock(self.seconds_left)}")
        return f"{self.stage} " + ", ".join(parts)


def _clock(seconds: float) -> str:
    """12 s, 3:25 or 1:02:30."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}" if minutes else f"{rest} s"
