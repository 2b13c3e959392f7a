"""train_model: epochs, validations, the test, callbacks and loggers around the loop.

What is logged is cut at absolute steps: a window ends where a row is due, where an epoch ends and at the last step. Rows
and epoch values are merged from these pieces, so they are the same wherever a life began.
"""

import functools
import logging
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax

from . import contract
from .dispatch import misfit
from .errors import ConfigError, DivergedError
from .feed import Feed, length
from .optimizers.schedule import ScheduleConfig
from .params import count
from .throughput import stopwatch

if TYPE_CHECKING:
    from .module import TrainerModule

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How long to train, and when to look up. Steps and epochs count those of earlier lives."""

    total: int
    per_epoch: int | None  # None: there are no epochs
    log_every: int
    val_steps: int  # 0: never
    val_epochs: int  # 0: never

    def epoch(self, step: int) -> int:
        """The epoch, from 1, that completed step `step` is of."""
        return (step - 1) // self.per_epoch + 1 if self.per_epoch else 1

    def ends_epoch(self, step: int) -> bool:
        """Whether an epoch ends with this step."""
        return bool(self.per_epoch) and step % (self.per_epoch or 1) == 0

    def logs(self, step: int) -> bool:
        """Whether a row is due."""
        return step % self.log_every == 0 or step == self.total

    def closes(self, step: int) -> bool:
        """Whether the open window ends with this step."""
        return self.logs(step) or self.ends_epoch(step)

    def validates_by_step(self, step: int) -> bool:
        """Whether a validation is due by the count of steps."""
        return bool(self.val_steps) and step % self.val_steps == 0

    def validates_by_epoch(self, step: int) -> bool:
        """Whether a validation is due by the count of epochs."""
        return bool(self.val_epochs) and self.ends_epoch(step) and self.epoch(step) % self.val_epochs == 0

    def looks_up(self, step: int) -> bool:
        """Whether something is due after this step for which it must be finished."""
        return self.ends_epoch(step) or self.validates_by_step(step)


def make_plan(trainer: "TrainerModule", loader: Any, *, num_epochs: int | None, num_steps: int | None, per_epoch: int | None) -> Plan:
    """The plan of a `train_model` call. Raises ConfigError where there can be none."""
    if (num_epochs is None) == (num_steps is None):
        raise ConfigError(f"give exactly one of num_epochs ({num_epochs}) and num_train_steps ({num_steps})")
    per_epoch = per_epoch or length(loader)
    if num_epochs is not None and not per_epoch:
        raise ConfigError("the loader does not know its length, so num_epochs needs steps_per_epoch; or give num_train_steps")
    total = num_steps if num_steps is not None else (num_epochs or 0) * (per_epoch or 0)
    c = trainer.trainer_config
    if c.on_spike == "rollback":
        raise ConfigError("trainer.on_spike=rollback needs the commits of a run of the pipeline; train_model can stop or skip")
    log_every = c.logger.log_every_n_steps if c.logger else max(total, 1)
    borders = {
        "the step to go on from": trainer.global_step,
        "num_train_steps": num_steps,
        "steps_per_epoch": per_epoch,
        "trainer.logger.log_every_n_steps": log_every,
        "trainer.check_val_every_n_steps": max(0, c.check_val_every_n_steps),
    }
    if problem := misfit(c.steps_per_dispatch, borders) or outgrown(trainer, total):
        raise ConfigError(problem)
    return Plan(total, per_epoch, log_every, max(0, c.check_val_every_n_steps), max(0, c.check_val_every_n_epoch))


def outgrown(trainer: "TrainerModule", step: int) -> str | None:
    """Why the learning rates up to `step` would not be what is meant: the schedule ends before, with a length that nobody gave."""
    schedule = trainer.optimizer_config.get("schedule")
    if not (isinstance(schedule, ScheduleConfig) and schedule.depends_on_num_steps and step > trainer.num_steps):
        return None
    return (
        f"the {schedule.kind} schedule ends with the run, and the trainer was made for num_steps={trainer.num_steps}, but is to train to "
        f"step {step}; make it with num_steps={step}, or set optimizer.schedule.decay_steps"
    )


def fit(trainer: "TrainerModule", plan: Plan, *, train_loader: Any, val_loader: Any, test_loader: Any) -> dict[str, dict[str, Any]]:
    """Train to `plan.total`; values of validations and of the test, by name. `finalize` is called whatever happens."""
    desk, status = trainer.desk, "error"
    results: dict[str, dict[str, Any]] = {}
    loaders = {"train": train_loader, "val": val_loader, "test": test_loader}
    try:
        desk.begin(loaders, total=plan.total)
        epochs = plan.total // plan.per_epoch if plan.per_epoch else None
        trainer.log_training_info(epochs, plan.total, plan.per_epoch, train_loader, val_loader, test_loader)
        trainer.on_training_start()
        if val_loader is not None:
            trainer.test_eval_function(val_loader)
        if trainer.audience.stop_reason:
            log.info("nothing to train: %s", trainer.audience.stop_reason)
        elif trainer.global_step < plan.total:
            results = train(trainer, plan, train_loader=train_loader, val_loader=val_loader)
        else:
            log.info("step %d of %d is trained already", trainer.global_step, plan.total)
        trainer.on_training_end()
        if test_loader is not None:
            with desk.best_weights():
                results["test"] = trainer.test_model(test_loader, apply_callbacks=True, epoch_idx=plan.epoch(trainer.global_step))
        status = "success"
    except DivergedError as e:
        status = "nan"
        if e.state is not None:
            # The last good one: what was in flight behind it changed nothing. What was logged since the last row is spoilt.
            trainer.state, trainer.global_step = e.state, int(e.state.step)
            desk.reset_windows()
        raise
    finally:
        desk.finalize(status)
    return results


def train(trainer: "TrainerModule", plan: Plan, *, train_loader: Any, val_loader: Any) -> dict[str, dict[str, Any]]:
    """The steps that are still to do, and what is due between them; values of validations by name."""
    desk, audience = trainer.desk, trainer.audience
    results: dict[str, dict[str, Any]] = {}
    start = trainer.global_step
    feed = desk.feed = Feed(train_loader, step=start, steps_per_epoch=plan.per_epoch, restored=desk.is_placed(train_loader))
    if start == 0 or plan.ends_epoch(start):
        trainer.on_training_epoch_start(plan.epoch(start + 1))
    records = trainer.train_until(
        plan.total,
        trainer.tracker(feed, total=plan.total, completed=start),
        window=desk.window,
        closes=plan.closes,
        pause=lambda step: plan.looks_up(step) or audience.wants(step, row=plan.logs(step)),
    )
    desk.stopwatch = stopwatch(trainer, [desk.window, desk.pieces.row], step=start)
    for record in desk.stopwatch.watch(records):
        desk.window = record.window
        take(trainer, plan, record.before())
        audience.tell("on_training_step", epoch=plan.epoch(record.step))
        take(trainer, plan, record.own())
        if record.settled:
            results |= look_up(trainer, plan, record.step, val_loader)
            desk.save_if_wanted(last=record.step == plan.total or audience.stop_reason is not None)
            if audience.stop_reason:
                log.info("stopped after step %d: %s", record.step, audience.stop_reason)
                break
    return results


def take(trainer: "TrainerModule", plan: Plan, closed: Iterable[tuple[int, Any]]) -> None:
    """Add windows to the open row and epoch, and close the rows that end with them."""
    desk = trainer.desk
    for step, window in closed:
        desk.pieces.add(window, epochs=plan.per_epoch is not None)
        if plan.logs(step):
            desk.row(step, plan.epoch(step), desk.pieces.close_row())


def look_up(trainer: "TrainerModule", plan: Plan, step: int, val_loader: Any) -> dict[str, dict[str, Any]]:
    """The end of an epoch and the validations due after `step`, which is finished. One validation serves both counts."""
    results: dict[str, dict[str, Any]] = {}
    epoch = plan.epoch(step)
    if plan.ends_epoch(step):
        found = trainer.get_metric_postprocess_fn()(trainer.desk.pieces.close_epoch())
        trainer.on_training_epoch_end(found, epoch)
        trainer.desk.write("train_epoch", step, found)
    by_step, by_epoch = plan.validates_by_step(step), plan.validates_by_epoch(step)
    if val_loader is not None and (by_step or by_epoch):
        values = trainer._eval_model_in_train_loop(val_loader, epoch)
        results |= ({f"val_step_{step}": values} if by_step else {}) | ({f"val_epoch_{epoch}": values} if by_epoch else {})
    if plan.ends_epoch(step) and step < plan.total:
        trainer.on_training_epoch_start(epoch + 1)
    return results


def check_evaluation(trainer: "TrainerModule", loader: Any) -> None:
    """Trace the evaluation on shapes, and look at the first batch of those loaders that give it again.

    Raises ConfigError or DataError for what would fail at the first validation.
    """
    for one in loader.values() if isinstance(loader, Mapping) else [loader]:
        if (batch := contract.first_of(one)) is not None:
            contract.check_batch_like(batch, trainer.exmp_batch, rows=False, what="a batch to evaluate on")
    step, shapes = trainer.create_evaluation_step_function(), trainer.shapes
    jax.eval_shape(step, shapes.params, shapes.mutable, None, trainer.exmp_batch)


def validate_averages(trainer: "TrainerModule", loader: Any) -> None:
    """The row `val_ema`, where a callback has averaged parameters to validate with and the loaders can be read once more."""
    loaders = loader.values() if isinstance(loader, Mapping) else [loader]
    for averaged in trainer.audience.averages():
        if any(iter(one) is one for one in loaders):
            log.warning("there is no val_ema row: the validation loader is an iterator that can be used once")
            continue
        weights = (averaged, trainer.state.mutable)
        trainer.desk.write("val_ema", trainer.global_step, over_loaders(loader, functools.partial(trainer.run_evaluation, weights)))


def over_loaders(loader: Any, evaluate: Callable[[Any], dict[str, Any]]) -> dict[str, Any]:
    """Values over one loader, or `<name>_<metric>` over each of a dictionary of them."""
    if not isinstance(loader, Mapping):
        return evaluate(loader)
    return {f"{name}_{key}": value for name, one in loader.items() for key, value in evaluate(one).items()}


def tracked(iterator: Iterable[Any], *, enabled: bool, total: int | None = None, completed: int = 0, **kwargs: Any) -> Iterable[Any]:
    """`iterator`, with a bar of steps on a terminal."""
    if not enabled or not sys.stderr.isatty():
        return iterator
    from rich.console import Console
    from rich.progress import track

    return track(iterator, total=total, completed=completed, console=Console(stderr=True), transient=True, **kwargs)


def training_info(trainer: "TrainerModule", **loaders: Any) -> dict[str, Any]:
    """Facts of a training in JSON terms: numbers of parameters, devices, rows, batches."""
    rows = jax.tree.leaves(trainer.exmp_batch)[0].shape[0]
    sizes = {f"{name}_batches": length(loader) for name, loader in loaders.items() if loader is not None}
    return {
        "num_parameters": trainer.get_num_params(),
        "num_optimizer_values": count(trainer.shapes.opt_state),
        "start_step": trainer.global_step,
        "global_batch_size": rows,
        "local_batch_size": rows // jax.process_count(),
        "num_devices": trainer.mesh.size,
        "num_processes": jax.process_count(),
        "eval_metrics": trainer.eval_metrics(),
        "run_dir": str(trainer.log_dir) if trainer.log_dir else None,
        **{f"mesh_{axis}": n for axis, n in trainer.mesh.shape.items()},
        **{name: n for name, n in sizes.items() if n is not None},
    }
