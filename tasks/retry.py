"""When a failed task is tried again: where its error says that this can help."""

from typing import Any

from prefect.cache_policies import NO_CACHE

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


# Options of tasks: what is done is found in the run directory, so no result is cached.
WITH_TRAINER: dict[str, Any] = {
    "retries": TRAINER_RETRIES,
    "retry_delay_seconds": TRAINER_DELAYS,
    "retry_condition_fn": can_help,
    "cache_policy": NO_CACHE,
}
# A shard of a preparation: the task around it begins again too, and finds what is done.
WITH_SHARD: dict[str, Any] = {**WITH_TRAINER, "retries": 3, "retry_delay_seconds": STORE_DELAYS[:3]}
WITH_STORE: dict[str, Any] = {**WITH_TRAINER, "retries": STORE_RETRIES, "retry_delay_seconds": STORE_DELAYS}
