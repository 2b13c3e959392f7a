"""The uploads of a run in the background, in order and one at a time: they overlap what is trained, and never delay it.

A store that is away is tried until it is back, however long that takes; what was committed meanwhile queues up behind, a
small record for each step, while the files wait in the run directory. The flow asks nothing of the store itself.
"""

import contextlib
import logging
import time
from concurrent.futures import Future, wait
from types import TracebackType
from typing import Any, Self, cast

from prefect.futures import PrefectConcurrentFuture

from configs.run import RunConfig, chunk_ends
from trainer import manifest
from trainer.errors import StorageError

from .publish import publish_checkpoint, tidy, withdraw_copies
from .refs import CheckpointRef, DataRef
from .summary import commit_of
from .writer import Writer

log = logging.getLogger(__name__)

LAST_WORDS = 10.0  # seconds for uploads to notice that they are cut off
TIDYING = 30.0  # seconds for the store to forget, at the end, what nothing keeps


class Uploads:
    """Submits the copies of commits, and looks after them; where nothing is published it does nothing. Cut off at its exit."""

    def __init__(self, config: RunConfig, writer: Writer):
        self._config, self._writer, self._copies = config, writer, writer.copies
        self._data: DataRef | None = None
        self._flying: dict[CheckpointRef, PrefectConcurrentFuture] = {}  # a step trained again may follow its older self
        self._tidying: list[PrefectConcurrentFuture] = []
        self._failed: dict[int, Exception] = {}

    def __enter__(self) -> Self:
        self._copies.begin()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._copies.close()  # the flow's end waits for the thread

    def begin(self, data: DataRef, newest: CheckpointRef) -> None:
        """Submit what an earlier life committed; what it published too is found done."""
        self._data = data
        run_dir = self._writer.run_dir
        for step in sorted(set(chunk_ends(self._config)) & set(manifest.steps_in(run_dir.checkpoints))):
            if step < newest.step and (run_dir.checkpoints / manifest.name_of(step) / manifest.NAME).exists():
                self.submit(commit_of(run_dir, step))

    def submit(self, ref: CheckpointRef) -> None:
        """Begin to publish a commit, unless that is under way."""
        if self._config.publish.kind != "none" and ref not in self._flying:
            assert self._data is not None, "begin comes first"
            self._failed.pop(ref.step, None)
            future = publish_checkpoint.submit(self._config, ref, self._data, str(self._writer.run_dir.path))
            self._flying[ref] = cast(Any, future)

    def look(self) -> None:
        """Take note of those that are through, and remove what nothing keeps any more, here at once and in the store later."""
        for ref, future in list(self._flying.items()):
            if _inner(future).done():  # the future's own `state` would ask the server
                self._settle(ref, future)
        self._tidying = [future for future in self._tidying if not _inner(future).done()]
        known = {} if self._copies.closed else self._copies.known
        if gone := sorted(set(tidy(self._config, self._writer.run_dir, known)) & known.keys()):
            for step in gone:
                self._copies.remove(step)
            copies = {step: known[step] for step in gone}
            self._tidying.append(cast(Any, withdraw_copies.submit(self._config, copies, str(self._writer.run_dir.path))))

    def finish(self) -> StorageError | None:
        """Wait for all, at most `publish.wait_seconds`; the error that says what is missing, if anything is."""
        limit = self._config.publish.wait_seconds
        deadline = time.monotonic() + limit
        for step in [*self._failed]:
            with contextlib.suppress(OSError, ValueError, KeyError):  # damaged: it stays among what is missing
                self.submit(commit_of(self._writer.run_dir, step))
        self._copies.hurry()
        with self._writer.stops.interruptible():
            if self._flying and (trouble := self._copies.trouble):
                log.info(
                    "all is trained; waiting up to %g s to publish steps %s: %s", limit, _steps({ref.step for ref in self._flying}), trouble
                )
            wait([_inner(f) for f in self._flying.values()], timeout=deadline - time.monotonic())
            late = {ref.step for ref, future in self._flying.items() if not _inner(future).done()}
            if late:
                self._copies.close()
                wait([_inner(f) for f in self._flying.values()], timeout=LAST_WORDS)
            self.look()
            if not late:
                wait([_inner(f) for f in self._tidying], timeout=TIDYING)
        missing = sorted({*late, *self._failed})
        if not missing:
            return None
        why = self._copies.trouble or next(iter(self._failed.values()), "they take longer than that")
        waited = f" after {limit:g} s (publish.wait_seconds)" if late else ""
        return StorageError(
            f"all is trained, but steps {_steps(missing)} are not published{waited}: {why}; they are kept here, and `everstep resume` "
            "publishes them"
        )

    def _settle(self, ref: CheckpointRef, future: PrefectConcurrentFuture) -> None:
        del self._flying[ref]
        try:
            future.result()
        except Exception as e:  # whatever it is, it is no reason to train no further
            if self._is_here(ref):
                self._failed[ref.step] = e
            log.warning("step %d is not published: %s", ref.step, e)

    def _is_here(self, ref: CheckpointRef) -> bool:
        """Whether the checkpoint that was to be published is still wanted: not set aside as damaged, and not trained again since."""
        folder = self._writer.run_dir.checkpoints / manifest.name_of(ref.step)
        try:
            return manifest.own_crc(folder) == ref.manifest_crc32c
        except (ValueError, KeyError):
            return True
        except OSError:
            return folder.exists()


def _inner(future: PrefectConcurrentFuture) -> "Future[Any]":
    return future.wrapped_future


def _steps(steps: Any) -> str:
    return ", ".join(map(str, sorted(steps)))
