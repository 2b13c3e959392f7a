"""The one writer of a run directory: its lock, its config, and the session that trains in it.

Whoever runs a flow on a directory enters `writing`; entered again for the same directory, as the flow does inside the
command, it gives the same writer. Tasks find it by `current`, since a session cannot cross a task boundary.
"""

import contextlib
import functools
import json
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.load import read_config, to_json
from configs.run import RunConfig, config_digest, resume_conflicts, validates
from trainer.errors import ConfigError, DiskError, RunDirError, describe, of_the_system
from trainer.files import write_atomic
from trainer.manifest import NAME, name_of, newest_whole, steps_in
from trainer.rows import Rows
from trainer.rundir import EARLY_STOP, RunDir, WriterLock

from .artifacts import Artifacts
from .copies import Copies
from .goodput import Timekeeper, goodput
from .session import Session, make_session
from .stop import StopRequests, was_asked

log = logging.getLogger(__name__)

RUNS_ROOT = "runs"
FORMAT_VERSION = 1

_current: "Writer | None" = None


class Writer:
    """What the tasks of a run share: `config`, `run_dir` and the `session`."""

    def __init__(self, config: RunConfig, run_dir: RunDir, lock_fd: int, *, require_exact: bool):
        self.config, self.run_dir = config, run_dir
        self.entered = False  # the flow's body has begun
        self.result: dict[str, Any] | None = None  # of the flow, as soon as its work is done
        self.on_result: Callable[[dict[str, Any]], None] = lambda result: None
        self.listeners: list[Callable[[str, Any], None]] = []  # told of rows and signs of life, in the thread that waits for them
        self.stops = StopRequests(at_once=lambda: note_stop(run_dir, "a second request"))
        self.copies = Copies()
        self.keeper = Timekeeper(run_dir.books)
        self.session: Session = make_session(
            config, run_dir, lock_fd, listener=self.tell, require_exact=require_exact, stops=self.stops, keeper=self.keeper
        )

    @functools.cached_property
    def artifacts(self) -> Artifacts:
        """What is shown of the run in the Prefect UI; first asked for inside the flow."""
        return Artifacts()

    def finish(self, result: dict[str, Any]) -> None:
        """Note that all work is done and written; what follows are reports to a server."""
        self.keeper.end()
        self.note_time(result["step"])
        self.run_dir.event("finished", step=result["step"])
        self.result = result
        self.on_result(result)

    def note_time(self, step: int | None) -> None:
        """Write into the event log what the run's time went to up to now."""
        spent = self.keeper.seconds()
        share = goodput(spent)
        self.run_dir.event(
            "goodput", step=step, goodput=None if share is None else round(share, 4), seconds={k: round(v, 3) for k, v in spent.items()}
        )

    def tell(self, kind: str, value: Any) -> None:
        """Tell all listeners of something."""
        for listener in self.listeners:
            listener(kind, value)


def default_run_dir(config: RunConfig) -> Path:
    """Where a run of this name is kept unless another place is asked for."""
    return Path(RUNS_ROOT, config.name).absolute()


def current() -> Writer:
    """The writer of the run that this process trains. Raises RunDirError outside of `writing`."""
    if _current is None:
        raise RunDirError("no run directory is open for writing; tasks of a run are called inside `with writing(...)`")
    return _current


@contextlib.contextmanager
def writing(config: RunConfig, run_dir: Path | str | None = None, *, require_exact: bool = False) -> Iterator[Writer]:
    """Take the run directory for a run of `config`, logging `started` and, where it ends early by request, `stopped`.

    Raises RunDirError where it cannot be written or another process writes it, ConfigError where a run of another config
    lives there.
    """
    global _current
    place = RunDir(run_dir or default_run_dir(config))
    if _current is not None:
        if _current.run_dir.path != place.path:
            raise RunDirError(f"this process writes {_current.run_dir.path} already and cannot write {place.path} too")
        yield _current
        return
    lock = WriterLock(place)
    lock.acquire(wait=2.0)
    try:
        settle_config(place, config)
        _current = Writer(config, place, lock.fd, require_exact=require_exact)
        session = _current.session
        place.event("started", pid=os.getpid(), attempt=attempt())
        try:
            yield _current
        except BaseException as e:
            session.close()
            with contextlib.suppress(OSError):  # where the disk is full, the error itself is what counts
                if _current.result is None:
                    _current.note_time(newest_step(place))
            if _current.result is not None:
                pass  # all was done: what failed or was stopped are last reports
            elif _current.stops.asked or was_asked(e):
                note_stop(place, "asked to stop")
            else:
                e = _of_the_disk(e, place)
                with contextlib.suppress(OSError):
                    place.event("failed", **describe(e))
                raise e
            raise
        finally:
            session.close()
            _current = None
    finally:
        lock.release()


def _of_the_disk(error: BaseException, place: RunDir) -> BaseException:
    """An error of this process as one that says what to do about the disk, if that is what it is about."""
    found = of_the_system(error, place.path) if isinstance(error, OSError) else error
    return found if isinstance(found, DiskError) else error


def attempt() -> int:
    """Which try of its flow run this is; 1 where there is none yet: somebody started it by hand."""
    if "prefect" not in sys.modules:  # then there is no flow run, and importing it takes a second
        return 1
    from prefect.context import FlowRunContext

    context = FlowRunContext.get()
    return context.flow_run.run_count if context is not None and context.flow_run is not None else 1


def is_trained(config: RunConfig, place: RunDir) -> bool:
    """Whether the run's last step is committed, and whole."""
    newest = newest_whole(place.checkpoints)
    return newest is not None and newest.step == last_step(config, place)


def last_step(config: RunConfig, place: RunDir) -> int:
    """The step at which the run's training ends: `num_steps`, or the newest commit where a callback said that it is enough."""
    ended = early_stop(config, place)
    return ended["step"] if ended else config.num_steps


def early_stop(config: RunConfig, place: RunDir) -> dict[str, Any] | None:
    """The event by which a callback ended training at the newest commit, if one did: `step` and `reason`."""
    found: dict[str, Any] = next((e for e in reversed(place.read_events()) if e["event"] == EARLY_STOP), {})
    stands = found.get("config_digest") == config_digest(config) and found.get("step") == newest_step(place)
    return found if found and stands else None


def note_stop(place: RunDir, reason: str) -> None:
    """Log that the run ended early by request, and where it can go on."""
    step = newest_step(place)
    if step is None:
        place.event("ended", reason=f"{reason} before the first commit")
    else:
        place.event("stopped", step=step, reason=reason)


def settle_config(place: RunDir, config: RunConfig, *, dry: bool = False) -> None:
    """Make the directory one of a run of `config`, or see that it is one; `dry` only looks. Raises ConfigError with the differences."""
    newest = newest_step(place)
    if place.config.exists():
        old = read_config(place.config)
        if newest is not None and newest > config.num_steps:
            raise ConfigError(f"{place.path} is trained to step {newest} already, beyond num_steps {config.num_steps}; raise num_steps")
        # Nothing was trained yet: the config may be corrected.
        if newest is not None and (conflicts := resume_conflicts(old, config, place=_place_in_data(place, newest))):
            lines = "\n  ".join(conflicts)
            raise ConfigError(
                f"{place.path} holds a run of another config:\n  {lines}\n"
                "go on with its own (everstep resume), or choose another name or --run-dir"
            )
        if old == config and place.identity.exists():
            return
    elif steps_in(place.checkpoints):
        raise RunDirError(f"{place.path} has checkpoints but no config.json; bring that back, or choose another directory by --run-dir")
    if dry:
        return
    if not place.identity.exists():
        if newest is not None:
            raise RunDirError(f"{place.identity} is missing, and with it the run's name in its store; bring it back from a published copy")
        identity = f'{{"format": {FORMAT_VERSION}, "run_id": "{secrets.token_hex(8)}"}}\n'
        write_atomic(place.identity, identity.encode())
    if newest is not None and newest == old.num_steps < config.num_steps:
        forget_the_end(place, newest, config)
    write_atomic(place.config, to_json(config).encode())  # last: with it the directory is a run


def _place_in_data(place: RunDir, step: int) -> int:
    """How many batches of the data are behind the commit of `step`, as it says itself."""
    try:
        return json.loads((place.checkpoints / name_of(step) / "meta" / "metadata").read_text())["loader"]["train"]["next_index"]
    except (OSError, ValueError, LookupError):
        return sys.maxsize  # damaged: then nothing of the order may change


def forget_the_end(place: RunDir, step: int, config: RunConfig) -> None:
    """Drop the evaluations that a run had only because it ended at `step`, beyond which it now goes on.

    So its rows, and what they say is the best, are those of a run that was to go on from the start. Lost in between, they are made
    again. The row of a window that was cut short is dropped by whoever holds the window: trainer.run.
    """
    splits = ("test",) if validates(config, step) else ("test", "val", "val_ema")
    Rows(place.metrics).drop(step, *splits)


def newest_step(place: RunDir) -> int | None:
    """The newest step that has a manifest, by name alone."""
    return next((s for s in reversed(steps_in(place.checkpoints)) if (place.checkpoints / name_of(s) / NAME).exists()), None)
