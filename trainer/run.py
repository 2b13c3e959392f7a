"""A trainer at work in a run directory: train to a step and commit it, evaluate a commit, write rows and events.

Everything a run needs to go on is in its newest commit; this object can be dropped at any moment and made again.
"""

import contextlib
import functools
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from . import ledger, loop, manifest, metrics
from .assemble import TrainingConfig
from .checkpoint import Checkpoints
from .commits import Commits
from .data import DataManifest, eval_batches, load_manifest, load_tokenizer, train_loader
from .errors import CheckpointError, ConfigError, DamagedError, DataError, DivergedError, EverstepError, StoppedError
from .fingerprint import differences, fingerprint
from .generate import generate
from .manifest import Commit, name_of
from .module import TrainerModule
from .onlookers import Onlookers
from .progress import Progress
from .restore import state_to_evaluate
from .retention import steps_to_delete
from .rows import Rows, as_recorded, find, read
from .rundir import RunDir
from .spacing import Spacing
from .state import TrainState
from .throughput import Stopwatch, stopwatch

log = logging.getLogger(__name__)


class Run:
    """One life of a run: `open` finds or makes its newest commit, `train_until` and `evaluate` go on from it.

    `should_stop` is asked after every step; `on_row` is told of each row as it is written; `progress` says where it is.
    """

    def __init__(
        self,
        config: TrainingConfig,
        trainer: TrainerModule,
        run_dir: RunDir,
        data: Path,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        progress: Progress | None = None,
        on_row: Callable[[str, int, dict], None] = lambda split, step, values: None,
        require_exact: bool = False,
    ):
        self.config, self.trainer, self.run_dir, self.data = config, trainer, run_dir, data
        self.onlookers = Onlookers(trainer, run_dir)
        self.should_stop, self.on_row, self.require_exact = should_stop, on_row, require_exact
        self.progress = progress or Progress()
        self.manifest: DataManifest = load_manifest(data)
        self._check_data()
        self.rows = Rows(run_dir.metrics)
        self.store = Checkpoints(run_dir.path, device_digest=config.checkpoint.device_digest)
        self.ledger = ledger.read(run_dir, config.config_digest)
        left, size = ledger.joined(config.data.leave_out, self.ledger), config.data.batch_size
        self.loader = train_loader(data, self.manifest, batch_size=size, seed=config.trainer.seed, leave_out=left)
        self.fingerprint = fingerprint(trainer.mesh) | trainer.mesh_config.dtypes()
        self.log_every = config.trainer.logger.log_every_n_steps if config.trainer.logger else None  # None: one row, at the end
        self.window: Any = None
        spacing = Spacing(config.checkpoint.every, run_dir.read_events)
        self.commits = Commits(self.store, run_dir, self.progress, spacing, told=self.onlookers.feed)
        self._stopwatch: Stopwatch | None = None
        self._evaluates = False  # the evaluation is compiled

    @property
    def step(self) -> int:
        """Of the state in memory; -1: none yet."""
        return self.trainer.global_step

    def open(self) -> Commit:
        """The newest commit, restored; where there is none, step 0 is made and committed. Later rows are cut."""
        with self.progress.within("restore"):
            commit = self._open()
        with self.progress.within("callbacks"):
            self.onlookers.begin(num_steps=self.config.num_steps, loader=self.loader, eval_names=self._eval_names())
        self.progress.at(commit.step)
        return self._ended(commit) if self.onlookers.stop_reason else commit

    def _open(self) -> Commit:
        self.store.abandon(ledger.abandoned_steps(self.store.root, self.ledger))
        while (newest := self.store.newest_whole()) is not None:
            try:
                self._restore(newest)
                break
            except DamagedError as e:
                self.store.set_aside(newest, [str(e)])
        if newest is None:
            self._refuse_to_forget()
        return self._begin() if newest is None else self._commit_of(newest)

    def train_until(self, step: int) -> Commit:
        """Train to `step` and commit it; returns at once where that is done already, and earlier where a callback ends training.

        Raises StoppedError once a stop was asked for, after a commit of the step then reached.
        """
        if step in self.store.steps() and step <= self.step:
            return self._commit_of(step)
        if step < self.step:
            raise CheckpointError(
                f"step {step} has no checkpoint any more, and the run is at {self.step}; roll back to an earlier one first"
            )
        if self.onlookers.stop_reason:
            return self._ended(self._commit_of(self.step))
        if self.should_stop():
            raise StoppedError(f"stopped at step {self.step}, which is committed; go on with `everstep resume`", step=self.step)
        stopping, within = False, list[int]()  # a stop was asked for; steps committed on the way

        def wants_commit(at: int) -> bool:
            nonlocal stopping
            stopping = stopping or self.should_stop()
            return stopping or at == step or self.commits.spacing.due(at)

        if self._stopwatch is None or self._stopwatch.step != self.step:
            self._stopwatch = stopwatch(self.trainer, [self.window], step=self.step)
        records = self.trainer.train_until(
            step,
            self._fetched(),
            window=self.window,
            closes=self._closes,
            pause=lambda at: wants_commit(at) or self.onlookers.wants(at, row=self._closes(at)),
        )
        for record in self._stopwatch.watch(self._watched(records)):
            self._take(record)
            self.commits.look()
            if not record.settled or not (self.onlookers.take_save() or self.onlookers.stop_reason or wants_commit(record.step)):
                continue
            if not (stopping or record.step == step or self.onlookers.stop_reason):
                self._begin_commit(within)
                continue
            commit = self._commit()
            if self.onlookers.stop_reason:
                return self._ended(commit)
            if record.step < step:
                raise StoppedError(f"stopped at step {record.step}, which is committed; go on with `everstep resume`", step=record.step)
        return commit

    def _watched(self, records: Iterator[loop.Record]) -> Iterator[loop.Record]:
        """The same records; the progress says what is waited for, and what happens between them is noted by who does it."""
        while True:
            with self.progress.within("compile" if self.trainer.first_step else "step"):
                try:
                    record = next(records, None)
                except DivergedError as e:
                    raise self._rolled_back(e) from None  # an error that is its own cause would be gone round for ever
                if record is None:
                    return
                self.progress.completed(record.step)
            yield record

    def _fetched(self) -> Iterator[Any]:
        """The loader's batches; the progress says how long they were waited for."""
        while True:
            with self.progress.within("data"):
                batch = next(self.loader)
            yield batch

    def _rolled_back(self, error: DivergedError) -> EverstepError:
        """What a step that was refused comes to: the error itself, or that this life is over, for the run went back."""
        if self.config.trainer.on_spike != "rollback":
            return error
        self.commits.settle()
        return ledger.roll_back(self.store, self.run_dir, error, config=self.config, ledger=self.ledger)

    def evaluate(self, step: int, split: str, *, row: int | None = None) -> dict[str, Any]:
        """Values of `split` with the weights of committed step `step`, written as the row of step `row` (None: `step`), once.

        A row that stands already is returned as it is. What callbacks evaluate beside the weights comes before, as `<split>_ema`.
        Callbacks and hooks see the state that is evaluated, of which the optimizer's statistics may be None.
        """
        at = step if row is None else row
        if there := find(self.run_dir.metrics, split, at):
            return there
        if split == "test":
            self.onlookers.end_training()
        began = time.monotonic()
        with self._holding(step):
            with self.progress.within("callbacks"):
                self.onlookers.evaluating(split, step)
            values = self._values_of(self.trainer.weights(self.trainer.state), split)
            values |= {"time_evaluate_s": round(time.monotonic() - began, 3)} | ({"best_step": step} if split == "test" else {})
            if split == "val" and step == self.step:
                for averaged in self.onlookers.averages():
                    self._record("val_ema", at, self._values_of((averaged, self.trainer.state.mutable), split))
            values = as_recorded(values)
            with self.progress.within("callbacks"):
                self.onlookers.evaluated(split, step, values)
        self._record(split, at, values)
        return find(self.run_dir.metrics, split, at) or values

    def sample(self, step: int, prompt: str, *, max_tokens: int = 120, temperature: float = 0.8, seed: int = 0) -> str:
        """`prompt` and what the weights of committed step `step` make of it."""
        tokenizer = load_tokenizer(self.data)
        tokens = tokenizer.encode(prompt).tolist()
        with self.progress.within("sample"):
            params, _ = self.trainer.weights(self._state_of(step))
            more = generate(
                functools.partial(self.trainer.model.apply, train=False),
                params,
                tokens,
                eos_id=tokenizer.eos_id,
                window=self.config.data.seq_len,
                max_tokens=max_tokens,
                temperature=temperature,
                seed=seed,
            )
        return tokenizer.decode([*tokens, *more])

    def conclude(self) -> None:
        """The end of all: callbacks and loggers are told. Weights may still be asked for."""
        with self.progress.within("conclude"):
            self.onlookers.conclude()

    def close(self, status: str = "stopped") -> None:
        """Tell callbacks and loggers how this life ended, and let go of the checkpoints; nothing uncommitted becomes committed."""
        self.onlookers.finalize(status)
        self.commits.close()

    def _refuse_to_forget(self) -> None:
        """A run that was committed before is not begun anew because all of its checkpoints are damaged."""
        damaged = sorted(p.parent.name for p in self.run_dir.path.glob(f"damaged/*/{manifest.NAME}"))
        if damaged or read(self.run_dir.metrics):
            raise CheckpointError(
                f"no checkpoint in {self.store.root} is whole (set aside: {', '.join(damaged) or 'none'}); bring one back from a copy, "
                f"or move {self.run_dir.path} away to begin anew"
            )

    def _begin(self) -> Commit:
        self.rows.cut(-1)
        self.trainer.init_model()
        self.window = self.trainer.init_train_metrics()
        self.loader.set_state({"next_index": 0})
        return self._commit()

    def _restore(self, step: int) -> None:
        began = time.monotonic()
        found = self.store.restore(step, self.trainer.shapes, self.trainer.window_shapes)
        meta = found.meta
        if meta["data_digest"] != self.manifest.digest:
            raise DataError(
                f"the run was trained on data {meta['data_digest'][:16]}, but this is {self.manifest.digest[:16]}; "
                "bring the old text back, or start another run"
            )
        self._compare_environment(meta["fingerprint"], step)
        self.trainer.state, self.trainer.global_step, self.window = found.state, step, found.window
        self.commits.newest = step
        self.onlookers.set_state(found.extra, stop_reason=meta.get("stop"))
        self.loader.set_state(meta["loader"]["train"])
        self.rows.cut(step)
        if meta.get("cut_short") and step != self.config.num_steps:
            self.rows.drop(step, "train")  # the end is the end no more, and the window goes on
        self.run_dir.event("restored", step=step, seconds=round(time.monotonic() - began, 3))
        log.info("restored step %d in %.1f s", step, time.monotonic() - began)

    def _compare_environment(self, old: dict[str, Any], step: int) -> None:
        changed = differences(old, self.fingerprint)
        if not changed:
            return
        if self.require_exact:
            raise ConfigError(
                f"the environment is not that of checkpoint {step}: {'; '.join(changed)}; go back to it, or leave out --require-exact"
            )
        self.run_dir.event("environment_changed", step=step, changes=changed)
        log.warning("the environment changed since step %d, so bits may differ from here on: %s", step, "; ".join(changed))

    def _commit(self) -> Commit:
        """Commit the state in memory; returns when that is final."""
        self.commits.begin(self._hand_over)
        commit = self.commits.settle()
        assert commit is not None and commit.step == self.step
        return commit

    def _begin_commit(self, within: list[int]) -> None:
        """Commit the state in memory beside the training, one of those `within` a chunk, of which few are kept."""
        self.commits.settle()
        gone = steps_to_delete(within, best=None, unpublished=(), config=self.config.checkpoint)
        self.store.remove(gone)
        within[:] = [*(s for s in within if s not in gone), self.step]
        self.commits.begin(self._hand_over)

    def _hand_over(self) -> None:
        self.store.save(self.trainer.state, self.window, self._meta(), self.onlookers.get_state())
        if self._cut_short(self.step):  # of its row the callbacks learn when their states are taken: if the run goes on, there was none
            self._write_row(self.step, self.window.on_host())
        self.rows.sync()

    def _commit_of(self, step: int) -> Commit:
        return Commit(step, manifest.own_crc(self.store.root / name_of(step)))

    def _ended(self, commit: Commit) -> Commit:
        """The commit at which a callback ended training, with the reason, which is told once, and not of a run that is through anyway."""
        if commit.step < self.config.num_steps and self.onlookers.ended_at(commit.step, self.config.config_digest):
            log.info("training ends at step %d: %s", commit.step, self.onlookers.stop_reason)
        return replace(commit, stop=self.onlookers.stop_reason)

    def _meta(self) -> dict[str, Any]:
        return {
            "loader": {"train": self.loader.get_state()},
            "config_digest": self.config.config_digest,
            "data_digest": self.manifest.digest,
            "fingerprint": self.fingerprint,
            "stop": self.onlookers.stop_reason,
            "cut_short": self._cut_short(self.step),
            ledger.EVENT: self.ledger,
        }

    def _closes(self, step: int) -> bool:
        return self.log_every is not None and step % self.log_every == 0

    def _cut_short(self, step: int) -> bool:
        """Whether the run's end cuts its last window short: it has a row, and stays open, for num_steps may be raised."""
        return step == self.config.num_steps and not self._closes(step)

    def _take(self, record: loop.Record) -> None:
        """Make a step the newest: its state, and the rows that turned out complete with it."""
        self.window = record.window
        with self.progress.within("callbacks"):
            for at, window in record.before():
                self._write_row(at, window)
            self.onlookers.stepped()
            for at, window in record.own():
                self._write_row(at, window)

    def _values_of(self, weights: tuple[Any, dict[str, Any]], split: str) -> dict[str, Any]:
        size = self.config.data.eval_batch_size or self.config.data.batch_size
        batches = eval_batches(self.data, self.manifest, split, batch_size=size)
        with self.progress.within("evaluate" if self._evaluates else "compile"):
            values = self.trainer.run_evaluation(weights, self._counted(batches))
        self._evaluates = True
        return add_bits_per_byte(values, self.manifest, split)

    def _counted(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The same batches, each noted when it is through."""
        for batch in batches:
            yield batch
            self.progress.enter("evaluate")

    def _record(self, split: str, step: int, values: dict[str, Any]) -> None:
        """Write the row of an evaluation, unless it stands."""
        if find(self.run_dir.metrics, split, step) is None:
            self.rows.append(split, step, values)
            self.rows.sync()
            self.on_row(split, step, values)
            with self.progress.within("callbacks"):
                self.onlookers.feed(self.commits.newest)

    def _state_of(self, step: int) -> TrainState:
        return self.trainer.state if step == self.step else state_to_evaluate(self.trainer, self.run_dir.path, step)

    @contextlib.contextmanager
    def _holding(self, step: int) -> Iterator[None]:
        """Within, the trainer holds the state of a committed step, and afterwards the trained one again."""
        trained = self.trainer.state
        self.trainer.state = self._state_of(step)
        try:
            yield
        finally:
            self.trainer.state = trained

    def _write_row(self, step: int, window: Any) -> None:
        assert self._stopwatch is not None
        values: dict[str, Any] = metrics.compute(window)
        values = self.trainer.get_metric_postprocess_fn()(values) | self._stopwatch.row(step, values)
        self.onlookers.row(step, values)
        self.rows.append("train", step, values)
        self.on_row("train", step, values)

    def _check_data(self) -> None:
        vocab = getattr(self.config.model, "vocab_size", None)
        if vocab is not None and self.manifest.vocab_size > vocab:
            raise ConfigError(
                f"the tokenizer has {self.manifest.vocab_size} tokens, but model.vocab_size is {vocab}; "
                f"set model.vocab_size={self.manifest.vocab_size} or more"
            )
        if self.manifest.seq_len != self.config.data.seq_len:
            raise DataError(
                f"the data has rows of {self.manifest.seq_len} tokens, but data.seq_len is {self.config.data.seq_len}; prepare it again"
            )
        monitor = self.config.checkpoint.monitor
        if monitor not in (names := self._eval_names()):
            raise ConfigError(f"checkpoint.monitor {monitor!r} is no value of an evaluation; choose one of {', '.join(names)}")

    def _eval_names(self) -> list[str]:
        return [*self.trainer.eval_metrics(), "bits_per_byte"]


def add_bits_per_byte(values: dict[str, Any], manifest: DataManifest, split: str) -> dict[str, Any]:
    """With `loss` in nats per token also `bits_per_byte` = loss x tokens / (ln 2 x bytes of the split's text)."""
    if "loss" not in values or not math.isfinite(values["loss"]):
        return values
    found = manifest.split(split)
    bits = values["loss"] * found.tokens / (math.log(2) * found.bytes) if found.bytes else math.nan
    return values | {"bits_per_byte": bits}


def describe_devices(trainer: TrainerModule) -> dict[str, Any]:
    """What of the machine is used, in JSON terms."""
    devices = jax.devices()
    dtype = getattr(trainer.model_config, "dtype", "float32")
    return {
        "devices": len(devices),
        "kind": devices[0].device_kind,
        "platform": devices[0].platform,
        "mesh": {axis: n for axis, n in trainer.mesh.shape.items() if n > 1} or {"data": 1},
        "dtype": dtype,
        "attention": getattr(trainer.model_config, "attention", "xla"),
        "parameters": trainer.get_num_params(),
    }
