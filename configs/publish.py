"""Where verified copies of checkpoints go."""

from typing import Literal

from pydantic import model_validator

from trainer.config import Config


class PublishConfig(Config):
    """The store that the run is published to."""

    kind: Literal["none", "local", "gcs"] = "local"
    url: str | None = None  # local: a folder, None: <run_dir>/published

    @model_validator(mode="after")
    def _available(self) -> "PublishConfig":
        if self.kind == "gcs":
            raise ValueError(f"kind 'gcs' (url {self.url!r}) is not available yet; use kind=local, which takes a mounted folder as url")
        if self.url is not None and self.kind == "none":
            raise ValueError(f"url {self.url!r} is set, but kind is 'none' and nothing is published; use kind=local or leave url null")
        if self.url is not None and "://" in self.url:
            raise ValueError(f"url {self.url!r} is not a folder, which is what kind 'local' publishes to; leave it null or name a folder")
        return self
