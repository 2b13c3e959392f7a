"""metrics.jsonl: one row per logging window and per evaluation, each (split, step) exactly once.

Rows up to a step are on the disk before that step's manifest, and going back to a step cuts what is later. An evaluation
is a pure function of its checkpoint, so its row is fsynced when written and stays as long as the checkpoint does.
"""

import itertools
import json
import logging
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import fsync, write_atomic
from .rundir import damaged_lines, read_lines

log = logging.getLogger(__name__)

VOLATILE = ("time", "throughput", "mfu", "memory")  # first word of the names of values that depend on clock or machine


def read(path: Path) -> list[dict[str, Any]]:
    """All whole rows, in the order they were written."""
    return [row for row in read_lines(path) if "step" in row and "split" in row]


def values_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a row, without its step and split."""
    return {k: v for k, v in row.items() if k not in ("step", "split")}


def find(path: Path, split: str, step: int) -> dict[str, Any] | None:
    """The values of one row, if it is there."""
    return next((values_of(r) for r in read(path) if r["split"] == split and r["step"] == step), None)


def as_recorded(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values as a row holds them: Python's own numbers, and null for what is not finite. JSON has no NaN, and a hole should be seen."""
    plain = {k: v.item() if hasattr(v, "item") else v for k, v in values.items()}  # a scalar of NumPy's or of a device
    return {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in plain.items()}


class Rows:
    """The writer of metrics.jsonl; one at a time."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """Add a row, its values as `as_recorded` gives them."""
        line = json.dumps({"step": step, "split": split, **as_recorded(values)}) + "\n"
        with open(self.path, "ab") as f:
            f.write(line.encode())

    def sync(self) -> None:
        """Bring all rows to the disk."""
        if self.path.exists():
            fsync(self.path)
            fsync(self.path.parent)

    def cut(self, step: int) -> None:
        """Drop the rows of later steps than `step`, and a torn last line."""
        if not self.path.exists():
            return
        if bad := damaged_lines(self.path):
            copy = next(c for n in itertools.count(1) if not (c := self.path.with_name(f"damaged-metrics-{n}.jsonl")).exists())
            shutil.copyfile(self.path, copy)
            log.warning("lines %s of %s cannot be read; the file as it was is kept as %s", bad, self.path, copy.name)
        kept = [row for row in read(self.path) if row["step"] <= step]
        data = "".join(json.dumps(row) + "\n" for row in kept).encode()
        if data != self.path.read_bytes():
            write_atomic(self.path, data)

    def drop(self, step: int, *splits: str) -> None:
        """Drop the rows of one step and these splits."""
        found = read(self.path)
        kept = [row for row in found if row["step"] != step or row["split"] not in splits]
        if len(kept) < len(found):
            write_atomic(self.path, "".join(json.dumps(row) + "\n" for row in kept).encode())


def is_volatile(name: str) -> bool:
    """Whether a value of this name may differ between two runs that are otherwise equal."""
    return name.split("_")[0] in VOLATILE


def stable(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values that must be equal in equal runs."""
    return {k: v for k, v in values.items() if not is_volatile(k)}
