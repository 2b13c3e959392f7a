"""Refs: the small records that cross a task boundary instead of arrays. Each names files and carries their digest."""

from typing import Any

from trainer.config import Config


class DataRef(Config):
    """Prepared data: a directory with `manifest.json`, shards and the tokenizer."""

    path: str  # absolute path of the directory
    digest: str  # sha256 of everything that went in


class CheckpointRef(Config):
    """A committed checkpoint of a run."""

    step: int
    manifest_crc32c: str  # of MANIFEST.json, which names every file with its own
    stop: str | None = None  # why training ends here, where a callback said so


class PublishedRef(Config):
    """A verified copy of a checkpoint."""

    step: int
    url: str


class Report(Config):
    """What an evaluation found: values of one split at one step."""

    step: int  # of the weights that were evaluated
    split: str
    values: dict[str, Any]


def value_of(result: Any) -> Any:
    """What a task called directly gave. A task that found its work done gives a State, whose name the UI shows."""
    from prefect import State

    return result.result() if isinstance(result, State) else result


def already_done(ref: Config, message: str) -> Any:
    """The state of a task that found its work done: shown as AlreadyDone, with `ref` as its result."""
    from prefect.states import Completed

    return Completed(name="AlreadyDone", message=message, data=ref)
