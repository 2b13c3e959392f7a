"""Artifacts in the Prefect UI, sent by a thread of their own: training never waits for a server.

Of what is to be sent under one key only the newest is kept, so a server that was away is caught up with at once.
"""

import contextlib
import contextvars
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)


class Artifacts:
    """Sends artifacts of the flow run in whose context it was made."""

    def __init__(self) -> None:
        self._waiting: dict[str, Callable[[], Any]] = {}
        self._changed = threading.Condition()
        self._busy = False
        self._closed = False
        self._progress: dict[str, object] = {}  # ids, by key
        context = contextvars.copy_context()  # holds the flow run
        self._thread = threading.Thread(target=lambda: context.run(self._send_all), name="artifacts", daemon=True)
        self._thread.start()

    def markdown(self, key: str, text: str, *, description: str) -> None:
        """Show `text` under `key`, instead of what was shown before."""
        from prefect.artifacts import create_markdown_artifact

        self._put(key, lambda: create_markdown_artifact(text, key=key, description=description))

    def table(self, key: str, rows: list[dict], *, description: str) -> None:
        """Show `rows` under `key`, instead of what was shown before."""
        from prefect.artifacts import create_table_artifact

        self._put(key, lambda: create_table_artifact(rows, key=key, description=description))

    def progress(self, key: str, percent: float, *, description: str) -> None:
        """Show how far something is; one artifact a key, that moves."""
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        def send() -> None:
            if key not in self._progress:
                self._progress[key] = create_progress_artifact(percent, key=key, description=description)
            else:
                update_progress_artifact(self._progress[key], percent, description=description)  # type: ignore[arg-type]

        self._put(key, send)

    def close(self, timeout: float = 15.0) -> None:
        """Wait at most `timeout` seconds for what is still to be sent; the rest is given up with a warning."""
        end = time.monotonic() + timeout
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            while (self._waiting or self._busy) and time.monotonic() < end:
                self._changed.wait(0.1)
            if self._waiting or self._busy:
                log.warning("the Prefect server did not take all artifacts within %.0f s; the run directory has what they showed", timeout)

    def _put(self, key: str, send: Callable[[], Any]) -> None:
        with self._changed:
            self._waiting[key] = send
            self._changed.notify_all()

    def _send_all(self) -> None:
        while True:
            with self._changed:
                while not self._waiting and not self._closed:
                    self._changed.wait()
                if not self._waiting:
                    return
                key = next(iter(self._waiting))
                send = self._waiting.pop(key)
                self._busy = True
            try:
                send()
            except Exception as e:
                log.debug("artifact %s was not sent: %s", key, e)
                with self._changed:
                    if not self._closed:
                        self._waiting.setdefault(key, send)
                with contextlib.suppress(Exception):
                    time.sleep(1)
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
