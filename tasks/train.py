"""The tasks that make and train weights."""

from pathlib import Path

from prefect import task

from configs.run import RunConfig
from trainer import manifest
from trainer.manifest import Commit

from .publish import bring_back
from .refs import CheckpointRef, DataRef, already_done
from .retry import WITH_TRAINER
from .writer import current


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

    Killed at any moment and called again, it goes on from the newest commit.
    """
    reached = _ref(current().session.train_until(end))
    return already_done(reached, f"training ended at step {ref.step}: {reached.stop}") if reached.step == ref.step else reached


@task(task_run_name="conclude[{config.name}]", **WITH_TRAINER)
def conclude(config: RunConfig) -> None:
    """Tell the trainer's callbacks that all is done, and see that its loggers have every row."""
    current().session.conclude()
