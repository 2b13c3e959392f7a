"""The preparation of data as a Prefect flow of its own, for `everstep prepare`; a run's flow does the same in one of its tasks."""

import logging
from collections.abc import Callable
from typing import Any

from prefect import flow
from prefect.context import TagsContext

from configs.run import RunConfig
from tasks.artifacts import Artifacts
from tasks.data import run_preparation
from tasks.logs import show_in_run
from tasks.preparation.progress import Progress
from tasks.refs import DataRef
from tasks.stop import StopRequests

log = logging.getLogger(__name__)

# The flow's parameters are what the UI shows and a deployment takes; who listens in this process is none.
listeners: list[Callable[[Progress], None]] = []


@flow(name="prepare", flow_run_name="prepare {config.name}", validate_parameters=True)
def prepare(config: RunConfig) -> DataRef:
    """Prepare the data of a run's config: one task for each shard of the input, and for each of the output.

    Called again it goes on where it was. Raises StoppedError where a stop is asked for.
    """
    data: Any = config.data
    stops, artifacts = StopRequests(), Artifacts()
    with stops.held(), TagsContext(current_tags=set()):  # see tasks/__init__.py for why there are no tags
        show_in_run()
        try:
            return run_preparation(
                data,
                config.execution,
                stops=stops,
                artifacts=artifacts,
                on_advance=_tell,
            )
        finally:
            artifacts.close(timeout=5)


def _tell(progress: Progress) -> None:
    for listen in listeners:
        listen(progress)
