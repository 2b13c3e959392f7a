"""How busy the workers of a preparation are: each job notes who did it and when; see preparation.py."""

import os
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from tasks.data import TaskPerJob
from tasks.preparation.jobs import Done, Job

NOTE = "worked"


class Timed(NamedTuple):
    """A job that notes its worker, its beginning and its end, by a clock that processes share."""

    job: Job

    @property
    def name(self) -> str:
        return self.job.name

    @property
    def size(self) -> int:
        return self.job.size

    def run(self) -> dict[str, Any]:
        began = time.monotonic()
        facts = self.job.run()
        return {**facts, NOTE: (os.getpid(), threading.get_native_id(), began, time.monotonic())}


class Watched(TaskPerJob):
    """A runner that keeps the notes in `stages`: of each, how many jobs, its seconds, and the busy ones of each worker."""

    stages: ClassVar[list[tuple[str, int, float, list[float]]]] = []

    def __call__(self, jobs: Sequence[Job], done: Done) -> list[dict[str, Any]]:
        """See tasks.preparation.jobs.Runner."""
        facts = super().__call__([Timed(job) for job in jobs], lambda timed, found: done(timed.job, found))
        notes = [found.pop(NOTE) for found in facts]
        if notes:
            busy: dict[tuple[int, int], float] = defaultdict(float)
            for pid, thread, began, ended in notes:
                busy[pid, thread] += ended - began
            # From the first job's beginning: what a worker takes to start is no question of how work is shared out.
            seconds = max(n[3] for n in notes) - min(n[2] for n in notes)
            workers = sorted(busy.values(), reverse=True) + [0.0] * self._workers
            self.stages.append((jobs[0].name.partition("[")[0], len(notes), seconds, workers[: self._workers]))
        return facts
