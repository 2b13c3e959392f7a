"""A flow as a command: the stop signals, the writer's lock, the server, the flow, and an end that waits for nobody.

The order matters. The stop handler stands before the flow begins, because Prefect puts its own in front of it and calls
ours again after unwinding. Server and trainer are spawned before anything slow is imported, so all three start at once.
"""

import contextlib
import logging
import os
import signal
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from configs.run import RunConfig
from tasks.server import configured_api_url, server
from tasks.stop import SIGNALS, was_asked
from tasks.summary import is_finished, result_of
from tasks.writer import Writer, default_run_dir, is_trained, newest_step, writing
from trainer.errors import ConfigError, EverstepError, StoppedError
from trainer.paths import cache_dir
from trainer.rundir import RunDir

from .console import Display

log = logging.getLogger(__name__)

LAST_REPORTS = 15.0  # seconds that a finished command waits for the server to take the last reports
START_TRIES = 5  # of a flow whose server went away before its body began


class Stop(BaseException):
    """A stop request, as it reaches the command outside of the flow's body."""


def _on_stop(number: int, frame: Any) -> None:
    raise Stop


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Within, SIGTERM, SIGHUP and SIGINT raise Stop. The flow's body has handlers of its own; Prefect calls these after it."""
    before = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, _on_stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config: RunConfig, run_dir: Path | None, *, require_exact: bool, finish: Callable[[dict[str, Any]], None]) -> NoReturn:
    """Run the pretrain flow on a run directory, new or not; hand its result to `finish` and leave with exit code 0.

    Raises the typed error that failed it; StoppedError after a stop request that was obeyed.
    """
    place = (run_dir or default_run_dir(config)).absolute()
    check_surroundings()
    with Display(total=config.num_steps) as display, stop_signals():
        ending = Ending(finish, display)
        try:
            result = _train(config, place, display, ending, require_exact=require_exact)
        except BaseException as e:
            if ending.result is not None:  # the work was done; what failed or was stopped are reports to a server
                ending.now(ending.result)
            if was_asked(e):
                step = newest_step(RunDir(place))
                raise StoppedError(f"step {step} is committed" if step is not None else "nothing is committed yet", step=step or 0) from e
            raise
        ending.now(result)


def _train(config: RunConfig, place: Path, display: Display, ending: "Ending", *, require_exact: bool) -> dict[str, Any]:
    with writing(config, place, require_exact=require_exact) as writer:
        writer.listeners.append(display.tell)
        display.line(f"run directory {place}")
        if is_finished(config, writer.run_dir):
            display.line("all is done already: every file of the last checkpoint is as it was committed")
            return result_of(config, writer.run_dir)
        if not is_trained(config, writer.run_dir):
            writer.session.warm_up()
        writer.on_result = ending.within
        with server(writer.run_dir.path / "logs" / "server.log") as url:
            from prefect import tags

            from .pretrain import pretrain

            display.line(f"Prefect UI    {url.removesuffix('/api')}")
            with tags("everstep", config.name):
                return _insist(writer, lambda: pretrain(config, str(place), require_exact))


def check_surroundings() -> None:
    """See that what every run needs is there. Raises ConfigError: nothing is written before that."""
    folders = {"EVERSTEP_CACHE": cache_dir(), "PREFECT_HOME": Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()}
    for name, folder in folders.items():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as e:
            raise ConfigError(f"{folder} cannot be made ({e.strerror}); set {name} to a folder that can be written") from e
        if not os.access(folder, os.W_OK):
            raise ConfigError(f"{folder} cannot be written; set {name} to a folder that can")
    if (url := configured_api_url()) is not None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=10).close()
        except (OSError, ValueError) as e:
            raise ConfigError(
                f"the Prefect server at {url} does not answer ({e}); start it, or unset PREFECT_API_URL to have one of its own"
            ) from e


class Ending:
    """The end of a command whose work is done: shown once, and not put off by a server that takes no more reports."""

    def __init__(self, finish: Callable[[dict[str, Any]], None], display: Display):
        self._finish, self._display = finish, display
        self._once = threading.Lock()
        self.result: dict[str, Any] | None = None

    def within(self, result: dict[str, Any], seconds: float = LAST_REPORTS) -> None:
        """Leave after `seconds` at the latest, whatever this process still waits for."""
        self.result = result
        timer = threading.Timer(seconds, self.now, [result])
        timer.daemon = True
        timer.start()

    def now(self, result: dict[str, Any]) -> NoReturn:
        """Show the result and leave; threads that still wait for a server are not waited for."""
        self._once.acquire()  # for ever: who comes second finds the process gone
        code = 1
        try:
            self._display.stop()
            self._finish(result)
            code = 0
        except Exception:
            log.exception("the result could not be shown")
        finally:
            with contextlib.suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)


def _insist(writer: Writer, run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Call the flow. A server that dies before the body began costs another try, one that dies after it only its reports."""
    for attempt in range(1, START_TRIES + 1):
        try:
            return run()
        except EverstepError:
            raise
        except Exception as e:
            if writer.result is not None:
                log.warning("the Prefect server did not hear of the end: %s", e)
                return writer.result
            if writer.entered or attempt == START_TRIES:
                raise
            log.warning("the flow could not begin (%s: %s); trying again", type(e).__name__, e)
    raise AssertionError("unreachable")
