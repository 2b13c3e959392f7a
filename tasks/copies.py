"""What is known of a run's copies in its store, and the patience to make more: shared by the flow and the thread that uploads.

The flow never asks the store, which may be away: it reads here what the uploading thread found out.
"""

import logging
import threading
from collections.abc import Callable
from itertools import chain, repeat
from typing import TypeVar

from trainer.errors import StorageError

from .retry import STORE_DELAYS
from .stores import Store

log = logging.getLogger(__name__)

T = TypeVar("T")


class Copies:
    """Steps with a copy, as far as known: nothing before the store was asked, so that nothing counts as published wrongly."""

    def __init__(self) -> None:
        self._known: dict[int, str] | None = None
        self._lock = threading.Lock()
        self._bell = threading.Event()  # wakes who waits between two tries
        self._closed = self._ending = False
        self.trouble: StorageError | None = None  # of the last try, while there is any

    @property
    def known(self) -> dict[int, str]:
        """Steps known to have a copy, and the crc32c of the manifests."""
        with self._lock:
            return dict(self._known or {})

    def ask(self, store: Store) -> dict[int, str]:
        """`known`, after the store was asked once. Only in the uploading thread; raises StorageError."""
        if self._known is None:
            found = store.published()
            with self._lock:
                self._known = found
        return self.known

    def add(self, step: int, manifest_crc32c: str) -> None:
        """Note that a step has a copy."""
        with self._lock:
            self._known = {**(self._known or {}), step: manifest_crc32c}

    def remove(self, step: int) -> None:
        """Note that a step has none, or will have none soon."""
        with self._lock:
            self._known = {at: crc for at, crc in (self._known or {}).items() if at != step}

    @property
    def closed(self) -> bool:
        """Whether nobody waits for copies any more."""
        return self._closed

    def begin(self) -> None:
        """Somebody waits for copies (again)."""
        self._closed = self._ending = False
        self._bell.clear()

    def hurry(self) -> None:
        """All is trained: try at once, and wait for nothing that does not pass by itself."""
        self._ending = True
        self._bell.set()

    def close(self) -> None:
        """Cut off what is under way; a later command goes on with it."""
        self._closed = True
        self._bell.set()

    def insist(self, work: Callable[[], T]) -> T:
        """The result of work on the store, tried with growing pauses until it succeeds, however long that takes.

        Raises its StorageError where it was cut off, and at the run's end also one that time alone does not mend.
        """
        while True:
            for delay in chain(STORE_DELAYS, repeat(STORE_DELAYS[-1])):
                try:
                    result = work()
                    self.trouble = None
                    return result
                except StorageError as e:
                    if self._closed:
                        raise  # what it was before that is the reason
                    self.trouble = e
                    if self._ending and not e.retryable:
                        raise
                    log.warning("%s (again in %g s)", e, delay)
                if self._bell.wait(delay) and not self._closed:
                    self._bell.clear()
                    break  # at once, and with short pauses again
