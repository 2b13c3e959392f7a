"""The task that prepares data."""

import logging
from typing import Any

from prefect import task

from configs.run import RunConfig

from .preparation import prepare
from .refs import DataRef
from .retry import WITH_STORE
from .writer import current

log = logging.getLogger(__name__)


@task(task_run_name="prepare[{config.name}]", **WITH_STORE)
def prepare_data(config: RunConfig) -> DataRef:
    """Turn the documents that `config.data` names into rows of tokens, once."""
    data: Any = config.data
    with current().stops.interruptible():
        return prepare(data, on_progress=log.info)
