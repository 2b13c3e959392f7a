"""The trainer process: obeys a pipe, trains in its main thread, and dies with its parent.

Messages are JSON over one socket. Requests: `start`, `open`, `train_until`, `evaluate`, `sample`, `conclude`, `close`, answered
in order by `ok` or `error`; `stop` is obeyed at once, in the middle of a chunk. Between answers it tells its log records and
rows; where it is stands in shared memory, see progress. It ignores SIGTERM and SIGINT: whoever is to stop it says so through
the pipe. At SIGUSR1 it writes down its stacks.
"""

import sys

from .lifeline import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[2]))  # before anything that takes time

import faulthandler
import json
import logging
import os
import queue
import signal
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from .progress import Progress

BEAT = 0.5  # seconds between signs of life
FAREWELL = 5.0  # seconds for callbacks and loggers at the end of a life that failed or was stopped
EXIT_ORPHANED = 3


class Pipe:
    """The trainer's end of the pipe; any thread may send."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, kind: str, value: Any) -> None:
        """Send one message; without a reader this process has no reason to be."""
        data = json.dumps([kind, value]).encode()
        try:
            with self._lock:
                self._connection.send_bytes(data)
        except OSError:
            os._exit(EXIT_ORPHANED)

    def receive(self) -> list[Any]:
        """The next request."""
        try:
            return json.loads(self._connection.recv_bytes())
        except (EOFError, OSError):
            os._exit(EXIT_ORPHANED)


class LogToPipe(logging.Handler):
    """Hands log records on to the flow process, where they are shown and reach the Prefect run."""

    def __init__(self, pipe: Pipe):
        super().__init__(logging.INFO)
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        """Send one record as (logger's name, level, message)."""
        text = self.format(record) if record.exc_info else record.getMessage()
        self._pipe.send("log", [record.name, record.levelno, text])


class Worker:
    """One life of the trainer: what each request does."""

    def __init__(self, pipe: Pipe, progress: Progress):
        self.pipe, self.progress = pipe, progress
        self.stop = threading.Event()
        self.requests: queue.Queue[list[Any]] = queue.Queue()
        self.run: Any = None
        self.run_dir = ""

    def listen(self) -> None:
        """In a thread of its own: take requests; `stop` is not queued behind them."""
        while True:
            kind, value = self.pipe.receive()
            if kind == "stop":
                self.stop.set()
            else:
                self.requests.put([kind, value])

    def beat(self) -> None:
        """In a thread of its own: show that this process lives."""
        while True:
            self.progress.beat()
            time.sleep(BEAT)

    def serve(self) -> None:
        """Answer requests in order, for ever."""
        from .errors import describe, of_the_system

        while True:
            kind, value = self.requests.get()
            try:
                answer = getattr(self, f"do_{kind}")(**value)
            except BaseException as e:
                logging.getLogger("trainer").debug("request %s failed", kind, exc_info=e)
                self.tell_of_the_end(e)
                self.pipe.send("error", describe(of_the_system(e, self.run_dir)))
            else:
                self.pipe.send("ok", answer)
            self.progress.enter("idle")

    def tell_of_the_end(self, error: BaseException) -> None:
        """Let callbacks and loggers know how this life ended, as far as they manage in their time: it ends with the answer."""
        from .errors import final_status

        if self.run is not None:
            job = threading.Thread(target=self.run.close, args=(final_status(error),), daemon=True)
            job.start()
            job.join(FAREWELL)

    def do_start(self, config: dict[str, Any], run_dir: str, numerics: str, require_exact: bool) -> dict[str, Any]:
        """Assemble the trainer and say on which devices; refuses what does not fit them."""
        self.progress.enter("start")
        from .assemble import TrainingConfig, assemble
        from .backend import set_up_jax
        from .run import describe_devices

        set_up_jax(numerics=numerics)
        self.config = TrainingConfig.model_validate(config)
        self.run_dir, self.require_exact = run_dir, require_exact
        self.trainer = assemble(self.config)
        return describe_devices(self.trainer)

    def do_open(self, data: str) -> dict[str, Any]:
        """Restore the newest commit, or make the first."""
        from .run import Run
        from .rundir import RunDir

        self.run = Run(
            self.config,
            self.trainer,
            RunDir(self.run_dir),
            Path(data),
            should_stop=self.stop.is_set,
            progress=self.progress,
            on_row=lambda split, step, values: self.pipe.send("row", [split, step, values]),
            require_exact=self.require_exact,
        )
        return vars(self.run.open())

    def do_train_until(self, step: int) -> dict[str, Any]:
        """Train to `step`; see Run.train_until."""
        return vars(self.run.train_until(step))

    def do_evaluate(self, step: int, split: str, row: int) -> dict[str, Any]:
        """Evaluate committed step `step` and write the values as the row of step `row`."""
        return self.run.evaluate(step, split, row=row)

    def do_sample(self, step: int, prompt: str) -> str:
        """A text that begins with `prompt`."""
        return self.run.sample(step, prompt)

    def do_conclude(self) -> None:
        """Tell callbacks and loggers that all is done."""
        self.run.conclude()

    def do_close(self) -> None:
        """Tell callbacks and loggers that this life ends without having failed."""
        self.progress.enter("close")
        if self.run is not None:
            self.run.close()


def main() -> None:
    """Serve the parent whose end of the socket is descriptor argv[1], whose process is argv[2]; argv[3] is shared memory."""
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    pipe = Pipe(Connection(int(sys.argv[1])))
    progress = Progress(int(sys.argv[3]))
    progress.start()
    worker = Worker(pipe, progress)
    for job in (worker.listen, worker.beat):
        threading.Thread(target=job, daemon=True).start()
    root = logging.getLogger()
    root.setLevel(logging.WARNING)
    root.addHandler(LogToPipe(pipe))
    logging.getLogger("trainer").setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells of a failed restore in dozens of tracebacks
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # and of a failed save in one for each array; the error itself is raised
    from . import run  # noqa: F401  the imports of seconds, before anything is asked

    progress.enter("idle")
    pipe.send("ready", {"pid": os.getpid()})
    worker.serve()


if __name__ == "__main__":
    main()
