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
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from configs.run import RunConfig
from tasks.server import server
from tasks.summary import is_finished, result_of
from tasks.writer import Writer, default_run_dir, is_trained, writing
from trainer.errors import EverstepError, StoppedError

from .console import Display

log = logging.getLogger(__name__)

EXIT_STOPPED = StoppedError.exit_code
LAST_REPORTS = 15.0  # seconds that a finished command waits for the server to take the last reports
START_TRIES = 5  # of a flow whose server went away before its body began


class Stop(SystemExit):
    """A stop request, as it reaches the command after the flow has unwound."""

    def __init__(self) -> None:
        super().__init__(EXIT_STOPPED)


def _on_stop(number: int, frame: Any) -> None:
    signal.signal(number, lambda *_: os._exit(EXIT_STOPPED))  # a second request ends at once; children die with us
    raise Stop


@contextlib.contextmanager
def stop_signals() -> Iterator[None]:
    """Within, SIGTERM, SIGHUP and SIGINT unwind to an exit with code 75."""
    before = {n: signal.signal(n, _on_stop) for n in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train(config: RunConfig, run_dir: Path | None, *, require_exact: bool, finish: Callable[[dict[str, Any]], None]) -> NoReturn:
    """Run the pretrain flow on a run directory, new or not; hand its result to `finish` and leave with exit code 0.

    Raises the typed error that failed it, or SystemExit(75) after a stop request that was obeyed.
    """
    place = (run_dir or default_run_dir(config)).absolute()
    with Display(total=config.num_steps) as display, stop_signals(), writing(config, place, require_exact=require_exact) as writer:
        ending = Ending(finish, display)
        writer.listeners.append(display.tell)
        display.line(f"run directory {place}")
        if is_finished(config, writer.run_dir):
            display.line("all is done already: every file of the last checkpoint is as it was committed")
            writer.result = result_of(config, writer.run_dir)
        else:
            if not is_trained(config, writer.run_dir):
                writer.session.warm_up()
            writer.on_result = ending.within
            with server(writer.run_dir.path / "logs" / "server.log") as url:
                from prefect import tags

                from .pretrain import pretrain

                display.line(f"Prefect UI    {url.removesuffix('/api')}")
                with tags("everstep", config.name):
                    writer.result = _insist(writer, lambda: pretrain(config, str(place), require_exact))
        result = writer.result
    ending.now(result)


class Ending:
    """The end of a command whose work is done: shown once, and not put off by a server that takes no more reports."""

    def __init__(self, finish: Callable[[dict[str, Any]], None], display: Display):
        self._finish, self._display = finish, display
        self._once = threading.Lock()

    def within(self, result: dict[str, Any], seconds: float = LAST_REPORTS) -> None:
        """Leave after `seconds` at the latest, whatever this process still waits for."""
        timer = threading.Timer(seconds, self.now, [result])
        timer.daemon = True
        timer.start()

    def now(self, result: dict[str, Any]) -> NoReturn:
        """Show the result and leave; threads that still wait for a server are not waited for."""
        self._once.acquire()  # for ever: who comes second finds the process gone
        self._display.stop()
        self._finish(result)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


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
