"""The uploads of a run in the background: each overlaps what is trained next, and one that fails delays nothing but itself."""

import logging
from typing import Any, cast

from prefect.futures import PrefectConcurrentFuture

from configs.run import RunConfig, chunk_ends
from trainer import manifest
from trainer.errors import EverstepError, StorageError

from .publish import is_published, publish_checkpoint
from .refs import CheckpointRef, DataRef
from .summary import commit_of, store_of
from .writer import Writer

log = logging.getLogger(__name__)


class Uploads:
    """Submits the copies of commits, and looks after them; where nothing is published it does nothing."""

    def __init__(self, config: RunConfig, data: DataRef, writer: Writer):
        self._config, self._data, self._writer = config, data, writer
        self._store = store_of(config, writer.run_dir)
        self._flying: dict[int, PrefectConcurrentFuture] = {}
        self._failed: dict[int, EverstepError] = {}

    def catch_up(self, newest: CheckpointRef) -> None:
        """Submit what an earlier life committed and did not get published."""
        if self._store is None:
            return
        run_dir, published = self._writer.run_dir, self._store.published()
        for step in sorted(set(chunk_ends(self._config)) & set(manifest.steps_in(run_dir.checkpoints))):
            if step < newest.step and not is_published(run_dir, step, published):
                self.submit(commit_of(run_dir, step))

    def submit(self, ref: CheckpointRef) -> None:
        """Begin to publish a commit, unless that is under way."""
        if self._store is not None and ref.step not in self._flying:
            future = publish_checkpoint.submit(self._config, ref, self._data, str(self._writer.run_dir.path))
            self._flying[ref.step] = cast(Any, future)

    def look(self) -> None:
        """Take note of those that are through; of those that failed, with a warning: training does not depend on the store."""
        for step, future in list(self._flying.items()):
            if future.wrapped_future.done():  # the future's own `state` would ask the server
                self._settle(step, future)

    def finish(self) -> None:
        """Wait for all, and try those once more that had failed. Raises StorageError that says what is missing."""
        again = [*self._failed]
        self._failed.clear()
        for step in again:
            self.submit(commit_of(self._writer.run_dir, step))
        with self._writer.stops.interruptible():
            for step, future in list(self._flying.items()):
                self._settle(step, future)
        if self._failed:
            first = next(iter(self._failed.values()))
            raise StorageError(f"all is trained, but steps {', '.join(map(str, self._failed))} could not be published: {first}")

    def _settle(self, step: int, future: PrefectConcurrentFuture) -> None:
        del self._flying[step]
        try:
            future.result()
        except EverstepError as e:
            self._failed[step] = e
            log.warning("step %d is not published: %s", step, e)
