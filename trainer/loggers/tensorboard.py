"""Rows as scalars for TensorBoard, tagged `<split>/<name>`, in `tensorboard/`.

Event files are only ever added: each life writes its own, and opens it with the step from which on TensorBoard forgets
what earlier files say. tensorboardX's SummaryWriter would say the same, but hands rows to a thread that brings them to the
file every two minutes: killed before, a life has left none. So the layer below it is used, which writes at once.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ..files import fsync
from .base import Gate, LoggerPartConfig

FLOAT32_MAX = 3.4028234663852886e38  # scalars are stored in single precision


class TensorBoardLoggerConfig(LoggerPartConfig):
    """One scalar per value; None and what is not finite in single precision are left out."""

    kind: Literal["tensorboard"] = "tensorboard"

    def build(self, folder: Path) -> "TensorBoardLogger":
        """The logger that writes event files in `folder`/tensorboard."""
        return TensorBoardLogger(folder / "tensorboard")


class TensorBoardLogger:
    """Each row is one record, on the disk when `row` returns: all its values or none survive a crash."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.gate = Gate("tensorboard")
        self.writer: Any = None

    def start(self, step: int, info: Mapping[str, Any]) -> None:
        """Open this life's file, and void what earlier ones say of later steps."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import SessionLog

        self._close()
        self.folder.mkdir(exist_ok=True)
        earlier = len(list(self.folder.glob("events.out.tfevents.*")))
        # A file's name has its second and host only: two lives within a second would be one file, the first one lost.
        self.writer = EventsWriter(str(self.folder / "events"), f".{earlier:06}")
        if earlier:  # SummaryWriter's purge_step: events of this step and later are forgotten
            self._write(step=step + 1, session_log=SessionLog(status=SessionLog.START))
        fsync(self.folder)
        fsync(self.folder.parent)
        self.gate.open()

    def row(self, split: str, step: int, values: Mapping[str, Any]) -> None:
        """Write the row's finite values."""
        from tensorboardX.proto.summary_pb2 import Summary

        self.gate.check(split, step)
        finite = {name: value for name, value in values.items() if value is not None and abs(value) <= FLOAT32_MAX}
        if finite:
            scalars = [Summary.Value(tag=f"{split}/{name}", simple_value=value) for name, value in finite.items()]
            self._write(step=step, summary=Summary(value=scalars))

    def finalize(self, status: str) -> None:
        """Close the file."""
        if self.gate.close(status):
            self._close()

    def _write(self, **fields: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self.writer.write_event(Event(wall_time=time.time(), **fields))
        self.writer.flush()  # fsync included

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
