"""Stop requests: noted while a flow's body runs, obeyed at the next border, never raised in the middle of somebody's code.

An exception out of a signal handler can come up anywhere, in Prefect's engine too, which does not expect it there. So a
signal is only noted; the trainer's call passes it on as a message, the flow asks at the borders of tasks, and only code that
says so (`interruptible`) is cut off.
"""

import contextlib
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from trainer.errors import StoppedError

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME_REQUEST = 1.0  # seconds within which another signal is the same request: a closing terminal sends several


class StopRequests:
    """The stop requests of one command. `at_once` is called before the process is ended by a second request."""

    def __init__(self, at_once: Callable[[], None] = lambda: None):
        self.asked = False
        self._at_once = at_once
        self._first = 0.0
        self._raises = 0

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Within, signals are noted. Those that the process ignores, as under nohup, are left ignored. Main thread only."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {n: signal.getsignal(n) for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, self._note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within `held`: code that a request may cut off anywhere. Raises StoppedError."""
        self._raises += 1
        try:
            self.check()
            yield
        finally:
            self._raises -= 1

    @contextlib.contextmanager
    def uninterrupted(self) -> Iterator[None]:
        """Within `interruptible`: code that asks by `check` where it can be cut off."""
        before, self._raises = self._raises, 0
        try:
            yield
        finally:
            self._raises = before

    def check(self) -> None:
        """Raise StoppedError if a stop was asked for."""
        if self.asked:
            raise StoppedError("a stop was asked for", step=-1)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.asked and now - self._first > SAME_REQUEST:
            self._at_once()
            os._exit(StoppedError.exit_code)  # the trainer and the server die with this process
        if not self.asked:
            self.asked, self._first = True, now
            if self._raises:
                self.check()


def was_asked(error: BaseException) -> bool:
    """Whether an error is, or came up while handling, a stop request: Prefect's engine may put another one in its place."""
    chain: list[BaseException] = []
    seen: BaseException | None = error
    while seen is not None and seen not in chain:  # a chain can be a ring
        if isinstance(seen, StoppedError) or not isinstance(seen, Exception):
            return True
        chain.append(seen)
        seen = seen.__cause__ or seen.__context__
    return False
