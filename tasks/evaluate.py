"""The tasks that evaluate committed weights: each writes one row of metrics, exactly once."""

from typing import Any

from prefect import task

from configs.run import RunConfig
from trainer import rows

from .refs import CheckpointRef, Report, already_done
from .retry import WITH_TRAINER
from .writer import current


@task(task_run_name="validate[{ref.step}]", **WITH_TRAINER)
def validate(config: RunConfig, ref: CheckpointRef) -> Report:
    """The validation row of a commit."""
    return _evaluate(ref.step, "val", row=ref.step)


@task(task_run_name="test[{ref.step}]", **WITH_TRAINER)
def test(config: RunConfig, ref: CheckpointRef, last: int) -> Report:
    """The test row of a run, from the weights of its best commit `ref`; it carries the run's last step."""
    return _evaluate(ref.step, "test", row=last)


def _evaluate(step: int, split: str, *, row: int) -> Any:
    writer = current()
    if there := rows.find(writer.run_dir.metrics, split, row):
        return already_done(Report(step=step, split=split, values=there), f"the {split} row of step {row} is written")
    return Report(step=step, split=split, values=writer.session.evaluate(step, split, row=row))
