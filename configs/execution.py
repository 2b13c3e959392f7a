"""How the trainer is run: in which process, how exactly, and how patiently."""

from typing import Literal

from pydantic import Field

from trainer.config import Config


class ExecutionConfig(Config):
    """What surrounds the training and never changes what is trained, as far as the machine allows."""

    mode: Literal["process", "inline"] = "process"  # inline: in the flow's own process, for notebooks and debugging
    numerics: Literal["exact", "fast"] = "exact"  # exact: deterministic operations and kept autotuning on accelerators
    prepare: Literal["threads", "processes"] = "threads"  # who prepares data; threads share Python's lock, processes do not
    prepare_workers: int | None = Field(None, ge=1)  # how many; None: one per visible core
    grace_seconds: float = Field(30.0, ge=0)  # how long a stop request may take; after it the last commit stands
