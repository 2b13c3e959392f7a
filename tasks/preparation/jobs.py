"""A job: a piece of work that one task does. Paths and small facts go in, a result file and small facts come out.

So jobs can run in threads, in processes or on other machines that share the cache, and one whose result is there already
returns at once.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol


class Job(Protocol):
    """Picklable, and the same result however often and wherever it runs."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def size(self) -> int:
        """About how many bytes of text it is about."""

    def run(self) -> dict[str, Any]:
        """Do the work, unless it is done. Returns facts in JSON terms."""


Done = Callable[[Job, dict[str, Any]], None]


class Runner(Protocol):
    """Who runs jobs."""

    def __call__(self, jobs: Sequence[Job], done: Done) -> list[dict[str, Any]]:
        """What each job returned, in their order; `done` is called in this thread as each ends. Raises the first error."""


def in_turn(jobs: Sequence[Job], done: Done) -> list[dict[str, Any]]:
    """One after the other, in this thread."""
    found = []
    for job in jobs:
        found.append(job.run())
        done(job, found[-1])
    return found
