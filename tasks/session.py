"""A session: the trainer, warm across tasks, in a process of its own or inline.

Callers see calls (`start`, `open`, `train_until`, `evaluate`, `sample`, `conclude`) and typed errors. A process that died,
hung or failed is dropped; the next call finds a fresh one, opened at the newest commit. While a call waits, a stop request is a
message to the trainer, which finishes its step, commits and answers.
"""

import contextlib
import logging
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from configs.run import RunConfig, config_digest
from trainer.errors import (
    CrashLoopError,
    EverstepError,
    StoppedError,
    TrainerDiedError,
    TrainerHungError,
    describe,
    final_status,
    of_the_system,
    revive,
)
from trainer.manifest import Commit
from trainer.progress import Place
from trainer.rundir import RunDir

from .child import Child
from .evidence import evidence
from .goodput import Timekeeper
from .lives import verdict
from .stop import StopRequests

log = logging.getLogger(__name__)

FAREWELL = 5.0  # seconds for callbacks and loggers at the end of a session
POLL = 0.1  # seconds between looks at a stop request while a call waits

Listener = Callable[[str, Any], None]  # told of ("row", [split, step, values]) and ("beat", {"phase", "step"})


def training_config(config: RunConfig) -> dict[str, Any]:
    """What the trainer process is told of a run; see trainer.assemble.TrainingConfig."""
    data = config.to_dict()
    parts = ("num_steps", "model", "objective", "optimizer", "trainer", "mesh", "checkpoint")
    kept = {"kind": data["data"]["kind"], **{k: data["data"][k] for k in ("seq_len", "batch_size", "eval_batch_size", "leave_out")}}
    return {**{k: data[k] for k in parts}, "data": kept, "config_digest": config_digest(config)}


class Session(ABC):
    """What the flow needs of a trainer."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: RunDir,
        *,
        listener: Listener = lambda kind, value: None,
        require_exact: bool = False,
        stops: StopRequests | None = None,
        keeper: Timekeeper,
    ):
        self.config, self.run_dir, self.listener, self.require_exact = config, run_dir, listener, require_exact
        self.stops = stops or StopRequests()
        self.keeper = keeper
        self.data: Path | None = None  # the prepared data; set before `open` or anything that needs the weights

    def warm_up(self) -> None:  # noqa: B027  nothing to do is a fine answer
        """Begin with what takes long, without waiting for it. Called from the main thread."""

    @abstractmethod
    def start(self) -> dict[str, Any]:
        """Assemble the trainer; what of the machine it uses. Raises ConfigError where the config does not fit the devices."""

    @abstractmethod
    def open(self) -> Commit:
        """Restore the newest commit, or make that of step 0."""

    @abstractmethod
    def train_until(self, step: int) -> Commit:
        """Train to `step` and commit it; to an earlier one, with the reason, where a callback of the trainer ends training."""

    @abstractmethod
    def evaluate(self, step: int, split: str, *, row: int) -> dict[str, Any]:
        """Evaluate the weights of committed `step` and write the values as the row of step `row`; returns them."""

    @abstractmethod
    def sample(self, step: int, prompt: str) -> str:
        """A text that begins with `prompt`, by the weights of committed `step`."""

    @abstractmethod
    def conclude(self) -> None:
        """Tell the trainer's callbacks and loggers that all is done; they then have all rows."""

    @abstractmethod
    def close(self) -> None:
        """End the trainer; nothing that is not committed becomes so."""


class InlineSession(Session):
    """The trainer in this very process: for notebooks, debugging and most tests."""

    _trainer: Any = None
    _run: Any = None

    def start(self) -> dict[str, Any]:
        """See Session.start."""
        from trainer.assemble import TrainingConfig, assemble
        from trainer.backend import set_up_jax
        from trainer.run import describe_devices

        set_up_jax(numerics=self.config.execution.numerics)
        self._training = TrainingConfig.model_validate(training_config(self.config))
        self._trainer = self._trainer or assemble(self._training)
        return describe_devices(self._trainer)

    def open(self) -> Commit:
        """See Session.open."""
        from trainer.progress import Progress
        from trainer.run import Run

        self.start()
        assert self.data is not None, "session.data comes first"
        progress = Progress(on_step=lambda step: self.listener("beat", {"phase": "step", "step": step}))
        self.keeper.follow(progress)
        self._run = Run(
            self._training,
            self._trainer,
            self.run_dir,
            self.data,
            should_stop=lambda: self.stops.asked,
            progress=progress,
            on_row=lambda split, step, values: self.listener("row", [split, step, values]),
            require_exact=self.require_exact,
        )
        try:
            commit = self._run.open()
        except OSError as e:
            raise of_the_system(e, self.run_dir.path) from e
        self.keeper.own = "other"
        return commit

    def train_until(self, step: int) -> Commit:
        """See Session.train_until."""
        with self._opened() as run:
            commit = run.train_until(step)
            self.keeper.safe()
            return commit

    def evaluate(self, step: int, split: str, *, row: int) -> dict[str, Any]:
        """See Session.evaluate."""
        with self._opened() as run:
            return run.evaluate(step, split, row=row)

    def sample(self, step: int, prompt: str) -> str:
        """See Session.sample."""
        with self._opened() as run:
            return run.sample(step, prompt)

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        """The run; dropped where a call on it fails, since its arrays may have been donated."""
        try:
            if self._run is None:
                self.open()
            yield self._run
        except BaseException as e:
            self.close(final_status(e))
            raise of_the_system(e, self.run_dir.path) from e.__cause__
        finally:
            self.keeper.tick()

    def conclude(self) -> None:
        """See Session.conclude."""
        with self._opened() as run:
            run.conclude()

    def close(self, status: str = "stopped") -> None:
        """See Session.close; `status` as callbacks and loggers are told it."""
        if self._run is not None:
            self._run.close(status)
            self.keeper.tick()
            self.keeper.lost()
        self._run = self._trainer = None


class ProcessSession(Session):
    """The trainer in a warm process of its own, and a spare one with its imports done, so that a replacement is quick."""

    def __init__(self, config: RunConfig, run_dir: RunDir, lock_fd: int, **kwargs: Any):
        super().__init__(config, run_dir, **kwargs)
        self._lock_fd = lock_fd
        self._child: Child | None = None
        self._spare: Child | None = None
        self._description: dict[str, Any] | None = None  # of the devices; None: the current child is not started
        self._is_open = False
        self._committed = -1
        self._seen: dict[str, float] = {}  # the longest that a trainer took for a unit of each phase, in seconds
        self._given_up = 0  # trainers without progress since the last commit
        self._shown = 0.0

    def warm_up(self) -> None:
        """See Session.warm_up. The process dies with the thread that spawns it, hence the main one."""
        if self._child is None:
            self._child = self._spawn()

    def start(self) -> dict[str, Any]:
        """See Session.start."""
        return self._started()

    def open(self) -> Commit:
        """See Session.open."""
        return self._open()

    def train_until(self, step: int) -> Commit:
        """See Session.train_until."""
        commit = Commit(**self._call("train_until", step=step))
        self._committed, self._given_up = commit.step, 0
        self.keeper.tick()
        self.keeper.safe()
        self._keep_spare()
        return commit

    def evaluate(self, step: int, split: str, *, row: int) -> dict[str, Any]:
        """See Session.evaluate."""
        return self._call("evaluate", step=step, split=split, row=row)

    def sample(self, step: int, prompt: str) -> str:
        """See Session.sample."""
        return self._call("sample", step=step, prompt=prompt)

    def conclude(self) -> None:
        """See Session.conclude."""
        self._call("conclude")

    def close(self) -> None:
        """See Session.close. Its callbacks and loggers are told, as far as they manage in their time."""
        if self._child is not None and self._is_open and self._child.alive:
            with contextlib.suppress(EverstepError, OSError):
                self._child.send("close", {})
                deadline = time.monotonic() + FAREWELL
                while time.monotonic() < deadline and (message := self._child.receive(POLL) or ["", None])[0] not in ("ok", "error"):
                    if message[0] == "log":
                        logging.getLogger(message[1][0]).log(message[1][1], message[1][2])
        for child in (self._child, self._spare):
            if child is not None:
                child.kill()
        self._child = self._spare = None
        self._is_open = False

    def _spawn(self) -> Child:
        self.run_dir.logs.mkdir(parents=True, exist_ok=True)
        return Child(self._lock_fd, self.run_dir.logs / "trainer.log", self._seen, patience=2.0**self._given_up)

    def _keep_spare(self) -> None:
        if self._spare is not None and not self._spare.alive:
            self._spare.kill()
            self._spare = None
        if self._spare is None:
            self._spare = self._spawn()

    def _take(self) -> Child:
        """The current child; a new one where it is gone: the spare, if that lives."""
        if self._child is not None and self._child.alive:
            if self._description is None:
                self.keeper.follow(self._child.progress)
            return self._child
        if self._child is not None:  # it died while nobody was waiting for it
            error = self._note_death(self._child, self._child.died())
            self._child.kill()
            self._child = None
            if isinstance(error, CrashLoopError):
                raise error
        spare, self._spare = self._spare, None
        if spare is not None and not spare.alive:
            spare.kill()
            spare = None
        self._child, self._description, self._is_open = spare or self._spawn(), None, False
        self.keeper.follow(self._child.progress)
        return self._child

    def _note_death(self, child: Child, error: TrainerDiedError) -> EverstepError:
        """Write a death down; gives the error to raise for it: another one where it happens again and again."""
        if isinstance(error, TrainerHungError):
            self._given_up += 1
        self._let_go()
        log.warning("%s", error)
        place = child.place
        self.run_dir.event("killed", pid=child.process.pid, phase=place.phase, **{**describe(error), "step": place.step})
        why = verdict(self.run_dir.read_events())
        return CrashLoopError(f"{why}: {error}; {self._evidence(place)}") if why else error

    def _let_go(self) -> None:
        """The books of a trainer that is gone: what it had not committed is lost, and the next one has to start."""
        self.keeper.follow(None)
        self.keeper.lost()
        self.keeper.own = "startup"

    def _evidence(self, place: Place) -> str:
        log_path = os.path.relpath(self.run_dir.logs / "trainer.log", self.run_dir.path)
        if place.phase not in ("step", "compile") or self.data is None:
            return f"see {log_path}, mend the cause, then `everstep resume` tries again"
        return f"see {log_path}, and {evidence(self.config, self.run_dir, self.data, place.step + 1)}"

    def _started(self) -> dict[str, Any]:
        child = self._take()
        if self._description is None:
            self._description = self._ask(
                child,
                "start",
                config=training_config(self.config),
                run_dir=str(self.run_dir.path),
                numerics=self.config.execution.numerics,
                require_exact=self.require_exact,
            )
        return self._description

    def _open(self) -> Commit:
        self._started()
        assert self._child is not None and self.data is not None, "session.data comes first"
        commit = Commit(**self._ask(self._child, "open", data=str(self.data)))
        self._is_open, self._committed = True, commit.step
        self.keeper.tick()
        self.keeper.own = "other"
        return commit

    def _call(self, kind: str, **value: Any) -> Any:
        self._started()
        if not self._is_open:
            self._open()
        assert self._child is not None
        return self._ask(self._child, kind, **value)

    def _ask(self, child: Child, kind: str, **value: Any) -> Any:
        """Send a request and wait for its answer; on the way hand on what the trainer tells, and a stop request to it."""
        try:
            child.send(kind, value)
            deadline = None
            while True:
                if self.stops.asked and deadline is None:
                    deadline = time.monotonic() + self.config.execution.grace_seconds
                    log.info("asked to stop: finishing the step and committing it")
                    child.send("stop", None)
                if deadline is not None and time.monotonic() > deadline:
                    grace = self.config.execution.grace_seconds
                    raise StoppedError(f"no commit within the {grace:g} s of grace; step {self._committed} stands", step=self._committed)
                message = child.receive(POLL)
                self._show(child)
                if message is None:
                    continue
                topic, content = message
                if topic == "ok":
                    return content
                if topic == "error":
                    raise revive(content)
                if topic == "log":
                    logging.getLogger(content[0]).log(content[1], content[2])
                else:
                    self.listener(topic, content)
        except BaseException as e:
            # Whatever went wrong, the arrays of that process are not to be trusted: the next call has a new one.
            child.kill()
            self._child = None
            self._let_go()
            if isinstance(e, TrainerDiedError) and (final := self._note_death(child, e)) is not e:
                raise final from e
            raise

    def _show(self, child: Child) -> None:
        """Enter the time, and once a second tell the listener where the trainer is."""
        self.keeper.tick()
        if time.monotonic() - self._shown >= 1:
            self._shown = time.monotonic()
            self.listener("beat", {"phase": child.place.phase, "step": child.place.step})


def make_session(config: RunConfig, run_dir: RunDir, lock_fd: int, **kwargs: Any) -> Session:
    """The session that `execution.mode` asks for."""
    if config.execution.mode == "inline":
        return InlineSession(config, run_dir, **kwargs)
    return ProcessSession(config, run_dir, lock_fd, **kwargs)
