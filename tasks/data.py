"""The task that prepares data."""

import logging
from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.run import RunConfig

from .preparation import prepare
from .refs import DataRef
from .retry import STORE_DELAYS, STORE_RETRIES, can_help
from .writer import current

log = logging.getLogger(__name__)


@task(
    task_run_name="prepare[{config.name}]",
    retries=STORE_RETRIES,
    retry_delay_seconds=STORE_DELAYS,
    retry_condition_fn=can_help,
    cache_policy=NO_CACHE,
)
def prepare_data(config: RunConfig) -> DataRef:
    """Turn the documents that `config.data` names into rows of tokens, once."""
    data: Any = config.data
    with current().stops.interruptible():
        return prepare(data, on_progress=log.info)
