"""One retryable unit of work each: Prefect tasks, storage, the trainer's process.

No task has tags: Prefect asks its server about the tags of a task run before that begins, and fails it where the server is
away. Training waits for no server, so the flow run carries the tags, and tasks are told apart by their names.
"""
