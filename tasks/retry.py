"""When a failed task is tried again: where its error says that this can help."""

from typing import Any

from trainer.errors import EverstepError

# The first new trainer comes at once; whatever kills one after another is given time to pass.
TRAINER_DELAYS = [0.0, 1.0, 2.0, 4.0, 8.0, 15.0, *[30.0] * 14]
TRAINER_RETRIES = len(TRAINER_DELAYS)
STORE_DELAYS = [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 60.0, 60.0]
STORE_RETRIES = len(STORE_DELAYS)


def can_help(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's `retry_condition_fn`: reads `retryable` of the error that failed the task."""
    try:
        state.result()
    except EverstepError as e:
        return e.retryable
    except Exception:
        return False
    return False
