"""Data that was prepared before, wherever it lies: on a bucket, on another disk. It is trained on as it is."""

from typing import Literal

from pydantic import Field

from trainer.data import PackedConfig


class PackedDataConfig(PackedConfig):
    """A prepared folder. `seq_len` must be that of its rows; a tokenizer and a packing it has already."""

    kind: Literal["packed"] = "packed"
    path: str = Field(min_length=1)  # the folder, or an address of it that fsspec opens (gs://, s3://, ...)
    # Of shards from an address, on this machine, those of all runs together. Rows are drawn from all shards at random, so
    # a cache that does not hold them all fetches them again and again.
    cache_bytes: int = Field(50_000_000_000, ge=1)
    has_test: bool = True  # whether the data has a test split

    @property
    def test_fraction(self) -> float | None:
        """0 where there is no test split; what it is otherwise is in the data's manifest."""
        return None if self.has_test else 0.0
