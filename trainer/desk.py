"""The desk of `train_model`: open windows and the rows they become, the loaders' places, checkpoints."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax

from . import manifest, metrics, rows
from .callbacks.checkpointing import CheckpointCallbackConfig
from .errors import ConfigError
from .feed import Feed
from .retention import CheckpointConfig, best_step, steps_to_delete
from .throughput import Stopwatch

if TYPE_CHECKING:
    from .checkpoint import Checkpoints
    from .module import TrainerModule


class Pieces:
    """Windows that wait on the host for what follows: of the open row and of the open epoch; `empty` is the window of no step."""

    def __init__(self, empty: Any):
        self.empty = empty
        self.row = self.epoch = empty

    def add(self, window: Any, *, epochs: bool) -> None:
        """Take in the next piece; without `epochs` there is none to be part of."""
        self.row = window if self.row is self.empty else metrics.merge(self.row, window)
        if epochs:
            self.epoch = window if self.epoch is self.empty else metrics.merge(self.epoch, window)

    def close_row(self) -> dict[str, float]:
        """The values of the row, which begins anew."""
        values, self.row = metrics.compute(self.row), self.empty
        return values

    def close_epoch(self) -> dict[str, float]:
        """The values of the epoch, which begins anew."""
        values, self.epoch = metrics.compute(self.epoch), self.empty
        return values


class Desk:
    """What a trainer keeps of its training besides the state."""

    def __init__(self, trainer: "TrainerModule"):
        self._trainer = trainer
        self.window: Any = None  # the open one, on the device
        self.pieces: Pieces = Pieces(None)
        self.feed: Feed | None = None
        self.stopwatch: Stopwatch | None = None
        self.val_rows: list[tuple[int, dict[str, Any]]] = []  # of this object's validations
        self._store: Checkpoints | None = None
        self._placed: list[int] = []  # ids of loaders that were put to their places
        self._saved: int | None = None

    def begin(self, loaders: Mapping[str, Any], *, total: int) -> None:
        """Start a `train_model` call that trains to step `total`. Raises ConfigError where its checkpoints could not be saved."""
        self._trainer.audience.forget()
        self._saved = None
        if self.saves and self._trainer.global_step < total:
            self._see_that_steps_are_free()
        from .restore import write_hyperparameters

        self._loaders = loaders
        if self.window is None:
            self.reset_windows()
        self._trainer.init_logger(self._trainer.trainer_config.logger)
        if self.saves:
            write_hyperparameters(self._trainer)

    def reset_windows(self) -> None:
        """Windows that hold no step."""
        self.window = self._trainer.init_train_metrics()
        self.pieces = Pieces(jax.device_get(self.window))

    def row(self, step: int, epoch: int, values: dict[str, Any]) -> None:
        """A logging window closed: values to callbacks, which may add to them, then to the loggers."""
        assert self.stopwatch is not None
        values = self._trainer.get_metric_postprocess_fn()(values) | self.stopwatch.row(step, values)
        self._trainer.audience.tell("on_row", values, epoch=epoch, step=step)
        self.write("train", step, values)

    def write(self, split: str, step: int, values: Mapping[str, Any]) -> None:
        """A row to all loggers."""
        if split == "val":
            self.val_rows.append((step, dict(values)))
        for logger in self._trainer.loggers:
            logger.row(split, step, values)

    # Checkpoints of train_model, where there is a place for them and a callback that asks.

    @property
    def checkpoints(self) -> CheckpointConfig:
        """What is kept, and what makes a checkpoint the best."""
        asked = self._checkpoint_callback
        return asked.keep if asked else CheckpointConfig()

    @property
    def saves(self) -> bool:
        """Whether checkpoints are asked for. Raises ConfigError where there is no place for them."""
        if self._checkpoint_callback and self._trainer.log_dir is None:
            raise ConfigError("a checkpoint callback needs a place: set trainer.logger.path to a directory")
        return self._checkpoint_callback is not None

    @property
    def _checkpoint_callback(self) -> CheckpointCallbackConfig | None:
        return next((c for c in self._trainer.trainer_config.callbacks if isinstance(c, CheckpointCallbackConfig)), None)

    @property
    def store(self) -> "Checkpoints":
        """The checkpoints in the log directory."""
        from .checkpoint import Checkpoints

        if self._store is None:
            folder = self._trainer.log_dir
            if folder is None:
                raise ConfigError("there is no directory to look for checkpoints in: set trainer.logger.path")
            self._store = Checkpoints(folder)
        return self._store

    def windows(self) -> dict[str, Any]:
        """All open windows, as they go into a checkpoint."""
        return {"open": self.window, "row": self.pieces.row, "epoch": self.pieces.epoch}

    def save_if_wanted(self, *, last: bool) -> None:
        """Commit a checkpoint of the finished step where one is asked for, or at the end; then remove what nothing keeps."""
        t = self._trainer
        asked = t.audience.take_save() or last
        if not self.saves or not asked or self._saved == t.global_step:
            return
        self.store.save(t.state, jax.device_put(self.windows()), self._meta(), t.audience.get_state())
        self.store.finish()
        self._saved = t.global_step
        best = best_step(self.val_rows, self.checkpoints)
        self.store.remove(steps_to_delete(self.store.steps(), best=best, unpublished=(), config=self.checkpoints))

    def _see_that_steps_are_free(self) -> None:
        """Checkpoints of later steps are of another course of the training, whose own would be mixed with them, or not saved at all."""
        at, there = self._trainer.global_step, self.store.steps()
        if there and there[-1] > at:
            later = [manifest.name_of(step) for step in there if step > at]
            raise ConfigError(
                f"training would begin at step {at}, but {self.store.root} has checkpoints of later steps ({', '.join(later)}); call "
                "load_model() to go on from the newest, move those away, or set another logger.path"
            )

    def _meta(self) -> dict[str, Any]:
        from .feed import has_state
        from .fingerprint import fingerprint

        loaders = {k: x.get_state() for k, x in self._loaders.items() if k != "train" and has_state(x)}
        if self.feed is not None and (place := self.feed.get_state()) is not None:
            loaders["train"] = place
        found = fingerprint(self._trainer.mesh) | self._trainer.mesh_config.dtypes()
        values = [[step, rows.stable(v)] for step, v in self.val_rows]
        return {"loader": json.loads(json.dumps(loaders)), "val_rows": values, "fingerprint": found}

    def place(self, loader: Any) -> None:
        """Note that a loader stands where it belongs."""
        self._placed.append(id(loader))

    def is_placed(self, loader: Any) -> bool:
        """Whether a loader was put to its place since the last training; asked once."""
        found, self._placed = id(loader) in self._placed, []
        return found

    @contextlib.contextmanager
    def best_weights(self) -> Iterator[None]:
        """Within, the trainer holds the best checkpoint's state, if there are checkpoints; the trained state is kept aside."""
        from .checkpoint import read_state

        t = self._trainer
        best = best_step(self.val_rows, self.checkpoints) if self.saves else None
        if best is None or best == t.global_step or best not in self.store.steps():
            yield
            return
        trained = t.state
        t.state = read_state(self.store.root.parent, best, t.shapes)
        try:
            yield
        finally:
            t.state = trained

    def finalize(self, status: str) -> None:
        """The end of a `train_model` call, whatever it was."""
        self._trainer.audience.finalize(status)
        if self._store is not None:
            self._store.close()
            self._store = None
