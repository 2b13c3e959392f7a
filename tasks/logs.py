"""Log records of the trainer and the tasks, shown in the Prefect run they belong to."""

import logging

LOGGERS = ("trainer", "tasks", "flows")


def show_in_run() -> None:
    """Hand the records of our loggers to the Prefect API as well, as long as there is a run. Called in a flow's body."""
    from prefect.logging.handlers import APILogHandler

    for name in LOGGERS:
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.INFO)
        if not any(isinstance(handler, APILogHandler) for handler in logger.handlers):
            handler = APILogHandler()
            handler.addFilter(_in_a_run)
            logger.addHandler(handler)


def _in_a_run(record: logging.LogRecord) -> bool:
    from prefect.context import FlowRunContext, TaskRunContext

    return FlowRunContext.get() is not None or TaskRunContext.get() is not None
