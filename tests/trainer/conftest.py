"""Lives of a run: each is what a process that has just started would have."""

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def trainers():
    return {}


@pytest.fixture
def life(micro, trainers):
    """`life(directory, *overrides)`: a new life of a run there, as a process that has just started would have it."""

    from tasks.session import training_config
    from trainer.assemble import TrainingConfig, assemble
    from trainer.run import Run
    from trainer.rundir import RunDir

    def begin(path, *overrides, **kwargs):
        config = micro(*overrides)
        training = TrainingConfig.model_validate(training_config(config))
        # The compiled functions are shared between lives, as the compilation cache would; the state is not.
        trainer = trainers.setdefault(training, None) or assemble(training)
        trainers[training] = trainer
        trainer.state = None
        path.mkdir(exist_ok=True)
        return Run(training, trainer, RunDir(path), _data(config), **kwargs)

    return begin


def _data(config):
    from tasks.preparation import prepare

    return Path(prepare(config.data).path)
