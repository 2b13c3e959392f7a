"""The task that prepares data, and the tasks of its shards."""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from prefect import task
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner
from prefect.utilities.annotations import quote

from configs.execution import ExecutionConfig
from configs.run import RunConfig
from trainer.lifeline import die_with_parent

from .artifacts import Artifacts
from .preparation import prepare
from .preparation.choose import DataConfig
from .preparation.jobs import Done, Job
from .preparation.progress import Progress
from .preparation.report import NAME as REPORT
from .refs import DataRef
from .retry import WITH_SHARD, WITH_STORE
from .stop import StopRequests
from .writer import current

log = logging.getLogger(__name__)

LOOK = 0.05  # seconds between two looks for a stop request


@task(task_run_name="prepare[{config.name}]", **WITH_STORE)
def prepare_data(config: RunConfig) -> DataRef:
    """Turn the documents that `config.data` names into rows of tokens, once."""
    writer = current()
    data: Any = config.data
    return run_preparation(
        data,
        config.execution,
        stops=writer.stops,
        artifacts=writer.artifacts,
        on_advance=lambda progress: writer.tell("prepare", progress),
    )


def run_preparation(
    data: DataConfig,
    execution: ExecutionConfig,
    *,
    stops: StopRequests,
    artifacts: Artifacts,
    on_advance: Callable[[Progress], None],
) -> DataRef:
    """Prepare by tasks of the flow run that this is called in; shows how far it is, and what came of it.

    Raises StoppedError where a stop is asked for: what is done by then is not done again.
    """

    def advance(progress: Progress) -> None:
        artifacts.progress("preparation", 100 * progress.fraction, description=str(progress))
        on_advance(progress)

    with stops.interruptible(), TaskPerJob(execution, stops) as run:
        ref = prepare(data, on_progress=log.info, run=run, on_advance=advance)
    artifacts.markdown("data", (Path(ref.path) / REPORT).read_text(encoding="utf-8"), description=f"Data in `{ref.path}`")
    return ref


@task(task_run_name="{name}", **WITH_SHARD)
def run_job(name: str, job: Any) -> dict[str, Any]:
    """Do one job of a preparation."""
    work: Job = job.unquote() if isinstance(job, quote) else job
    return work.run()


def num_workers(execution: ExecutionConfig) -> int:
    """How many jobs run at a time."""
    return execution.prepare_workers or len(os.sched_getaffinity(0))


def _begin_worker(parent: int) -> None:
    """The first call in a worker process: it dies with the flow, and leaves the other cores to the other workers."""
    die_with_parent(parent)
    os.environ["RAYON_NUM_THREADS"] = "1"  # of the tokenizers' library, which is not imported yet
    os.environ["PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL"] = "ERROR"  # the command says what there is to say


def _processes(workers: int) -> TaskRunner[Any]:
    return ProcessPoolTaskRunner(max_workers=workers, initializer=_begin_worker, initargs=(os.getpid(),))


# Jobs take and give paths and small facts, so any task runner whose workers see the cache can run them.
TASK_RUNNERS: dict[str, Callable[[int], TaskRunner[Any]]] = {
    "threads": lambda workers: ThreadPoolTaskRunner(max_workers=workers),
    "processes": _processes,
}


class TaskPerJob:
    """A Runner of jobs by a task runner of Prefect, a task each; workers are started with the first job and kept to the end."""

    def __init__(self, execution: ExecutionConfig, stops: StopRequests):
        self._workers, self._kind, self._stops = num_workers(execution), execution.prepare, stops
        self._runner: TaskRunner[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._runner is not None:
            with self._stops.uninterrupted():
                self._runner.__exit__(kind, error, trace)

    def __call__(self, jobs: Sequence[Job], done: Done) -> list[dict[str, Any]]:
        """See tasks.preparation.jobs.Runner."""
        with self._stops.uninterrupted():
            if self._runner is None:
                self._runner = TASK_RUNNERS[self._kind](self._workers)
                self._runner.__enter__()
            return self._all(self._runner, jobs, done)

    def _all(self, runner: TaskRunner[Any], jobs: Sequence[Job], done: Done) -> list[dict[str, Any]]:
        # The largest first, and those of no size, which are long too, before: so that none is left over at the end.
        waiting = sorted(range(len(jobs)), key=lambda i: (jobs[i].size > 0, -jobs[i].size, i), reverse=True)
        running: dict[int, Any] = {}
        found: dict[int, dict[str, Any]] = {}
        while waiting or running:
            self._stops.check()
            while waiting and len(running) < 2 * self._workers:  # few: a stop waits for those that run, and cancels the others
                i = waiting.pop()
                running[i] = runner.submit(run_job, {"name": jobs[i].name, "job": quote(jobs[i])})
            ended = _ended(running)
            for i in ended:
                found[i] = running.pop(i).result()
                done(jobs[i], found[i])
        return [found[i] for i in range(len(jobs))]


def _ended(running: dict[int, Any]) -> list[int]:
    """Which of the futures have ended, after a while at the latest."""
    from prefect.futures import wait

    done = wait(list(running.values()), timeout=LOOK).done
    return sorted(i for i, future in running.items() if future in done)
