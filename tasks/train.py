"""The tasks that make and train weights."""

import logging
from pathlib import Path

from prefect import task

from configs.run import RunConfig
from trainer import manifest
from trainer.errors import DivergedError, RolledBackError
from trainer.manifest import Commit

from .evidence import evidence
from .publish import bring_back
from .refs import CheckpointRef, DataRef, already_done
from .retry import WITH_TRAINER
from .writer import current

log = logging.getLogger(__name__)


def _ref(commit: Commit) -> CheckpointRef:
    return CheckpointRef(step=commit.step, manifest_crc32c=commit.manifest_crc32c, stop=commit.stop)


@task(task_run_name="init[{config.name}]", **WITH_TRAINER)
def init_model(config: RunConfig, data: DataRef) -> CheckpointRef:
    """The run's newest commit, made where there is none.

    A run that is trained to its end already is not loaded for this: its files are verified, and that is all.
    """
    writer = current()
    writer.session.data = Path(data.path)
    bring_back(config, writer.run_dir)
    newest = manifest.newest_whole(writer.run_dir.checkpoints)
    if newest is not None and newest.step == config.num_steps:
        return already_done(_ref(newest), f"step {newest.step} is committed")
    return _ref(writer.session.open())


@task(task_run_name="train[{ref.step}-{end}]", **WITH_TRAINER)
def train_chunk(config: RunConfig, ref: CheckpointRef, end: int) -> CheckpointRef:
    """Train from `ref` to step `end` and commit; less far where a callback ends training, which the ref then says.

    Killed at any moment and called again, it goes on from the newest commit. Where a spike was rolled back the ref is that of the
    earlier commit from which the run goes on. Raises DivergedError, with the documents of the batch, where it is to stop for one.
    """
    writer = current()
    try:
        reached = _ref(writer.session.train_until(end))
    except RolledBackError as e:
        log.warning("%s", e)
        return _ref(writer.session.open())
    except DivergedError as e:
        assert writer.session.data is not None
        raise DivergedError(f"{e}; {evidence(config, writer.run_dir, writer.session.data, e.step)}", step=e.step) from e
    return already_done(reached, f"training ended at step {ref.step}: {reached.stop}") if reached.step == ref.step else reached


@task(task_run_name="conclude[{config.name}]", **WITH_TRAINER)
def conclude(config: RunConfig) -> None:
    """Tell the trainer's callbacks that all is done, and see that its loggers have every row."""
    current().session.conclude()
