"""Commits written beside the training: begun by the training thread, made final by another, in their order.

The training thread is kept for as long as its arrays are handed over. While the files are written and read for their checksums
it goes on; what it waits for is the commit before, if that is not through.
"""

import logging
import threading
import time
from collections.abc import Callable

from .checkpoint import Checkpoints
from .manifest import Commit
from .progress import Progress
from .rundir import RunDir
from .spacing import Spacing

log = logging.getLogger(__name__)


class Commits:
    """The commits of one life. `told` hears of each, in the training thread, as soon as that looks after it is final."""

    def __init__(self, store: Checkpoints, run_dir: RunDir, progress: Progress, spacing: Spacing, *, told: Callable[[int], None]):
        self.store, self.spacing = store, spacing
        self._run_dir, self._progress, self._told = run_dir, progress, told
        self.newest = -1  # the last step known to be committed
        self._thread: threading.Thread | None = None
        self._found: Commit | None = None
        self._error: BaseException | None = None
        self._began = self._kept = 0.0

    def begin(self, save: Callable[[], None]) -> None:
        """Begin a commit: `save` hands it over to the store. Waits for the one before. Raises what went wrong with that."""
        self.settle()
        self._began = time.monotonic()
        with self._progress.within("save"):
            save()
        self._kept = time.monotonic() - self._began
        self._thread = threading.Thread(target=self._finish, name="commit")
        self._thread.start()

    @property
    def writing(self) -> bool:
        """Whether one is under way."""
        return self._thread is not None and self._thread.is_alive()

    def look(self) -> None:
        """Take note of a commit that has become final. Raises what went wrong with it."""
        if self._thread is not None and not self._thread.is_alive():
            self.settle()

    def settle(self) -> Commit | None:
        """Wait for the commit under way, if there is one; the last commit of this life. Raises what went wrong with it."""
        if self._thread is None:
            return self._found
        waited = time.monotonic()
        with self._progress.within("save"):
            self._thread.join()
        self._thread, error, self._error = None, self._error, None
        if error is not None:
            raise error
        assert self._found is not None
        self.newest = self._found.step
        self._progress.committed()
        seconds, kept = time.monotonic() - self._began, self._kept + time.monotonic() - waited
        self._run_dir.event("committed", step=self.newest, seconds=round(seconds, 3), kept_waiting=round(kept, 3))
        log.info("committed step %d in %.2f s", self.newest, seconds)
        self.spacing.committed(kept)
        with self._progress.within("callbacks"):
            self._told(self.newest)
        return self._found

    def close(self) -> None:
        """Let go of the store. A commit that is being written becomes final, if it can."""
        try:
            self.settle()
        except Exception as e:
            log.warning("the commit under way failed: %s", e)
        self.store.close()

    def _finish(self) -> None:
        try:
            self._found = self.store.finish()
        except BaseException as e:
            self._error = e
