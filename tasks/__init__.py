"""One retryable unit of work each: Prefect tasks, storage, the trainer's process."""
