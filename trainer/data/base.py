"""What the trainer needs of a loader: batches in order, and its place among them in JSON terms.

A batch is a dictionary of int32 arrays of shape (batch, seq): `inputs`, `targets`, `segment_ids` (0 is padding; a new
number for each document stretch in a row) and `positions` (counted from 0 at the start of each stretch). Position i of a
row pairs the token that is read with the token to predict; both belong to the same document.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

Batch = dict[str, np.ndarray]
FIELDS = ("inputs", "targets", "segment_ids", "positions")


class Loader(Protocol):
    """An endless iterator of batches that can say where it stands, and go there in constant time."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __next__(self) -> Batch: ...

    def get_state(self) -> dict[str, Any]:
        """The place after the last batch handed out: `{"next_index": batches handed out}`."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Go to a place that `get_state` gave."""
