"""Where verified copies of checkpoints go."""

import re
from typing import Literal

from pydantic import Field, model_validator

from trainer.config import Config

BUCKET = re.compile(r"gs://(?P<bucket>[a-z0-9][a-z0-9._-]{1,220}[a-z0-9])(?P<prefix>/.*)?")


class PublishConfig(Config):
    """The store that the run is published to."""

    kind: Literal["none", "local", "gcs"] = "local"
    url: str | None = None  # local: a folder, None: <run_dir>/published; gcs: gs://bucket/prefix, below which each run has its folder
    wait_seconds: float = Field(600, ge=0)  # for the last copies when all is trained; `everstep resume` makes those that are missing

    @model_validator(mode="after")
    def _fits(self) -> "PublishConfig":
        if self.kind == "gcs":
            if self.url is None or not BUCKET.fullmatch(self.url):
                raise ValueError(
                    f"url {self.url!r} is no bucket, which is what kind 'gcs' publishes to; set publish.url=gs://BUCKET/PREFIX (names of "
                    "buckets are lower-case letters, digits, '-', '_' and '.')"
                )
            return self
        if self.url is not None and self.kind == "none":
            raise ValueError(f"url {self.url!r} is set, but kind is 'none' and nothing is published; use kind=local or leave url null")
        if self.url is not None and "://" in self.url:
            raise ValueError(
                f"url {self.url!r} is not a folder, which is what kind 'local' publishes to; leave it null, name a folder, or set "
                "publish.kind=gcs for a bucket"
            )
        return self
