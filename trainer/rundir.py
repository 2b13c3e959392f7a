"""The run directory: what lies where in it, its one writer, and its log of events.

The writer is whoever holds a kernel lock on `run.lock`. The flow process and its trainer share one open descriptor of it,
so the lock is free exactly when both are dead, however they died.
"""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import RunDirError

EARLY_STOP = "early_stop"  # the event of a run whose training a callback ended before num_steps: step, reason, config_digest


class RunDir:
    """Paths in a run directory. Making one touches nothing; nothing inside points to itself by an absolute path."""

    def __init__(self, path: Path | str):
        self.path = Path(path).absolute()
        self.config = self.path / "config.json"
        self.identity = self.path / "run.json"
        self.lock = self.path / "run.lock"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.events = self.path / "events.jsonl"
        self.published = self.path / "published"
        self.logs = self.path / "logs"
        self.books = self.logs / "books"  # what its time went to; see tasks.goodput
        self.report = self.path / "report.md"
        self.plot = self.path / "loss.png"
        self.sample = self.path / "sample.json"

    def event(self, name: str, **fields: Any) -> None:
        """Append one event; a line is one write, so that processes do not tear each other's lines."""
        line = json.dumps({"time": round(time.time(), 3), "event": name, **fields}) + "\n"
        fd = os.open(self.events, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            if _torn(self.events):
                line = "\n" + line
            data = line.encode()
            if (written := os.write(fd, data)) < len(data):
                os.write(fd, data[written:])  # a disk that fills up takes a part, and is an error at the next
        finally:
            os.close(fd)

    def read_events(self) -> list[dict[str, Any]]:
        """All events, oldest first; a line torn by a crash is left out."""
        return list(read_lines(self.events))


def _torn(path: Path) -> bool:
    """Whether the file's last line has no end, because its writer was cut off."""
    with open(path, "rb") as f:
        size = f.seek(0, os.SEEK_END)
        if not size:
            return False
        f.seek(size - 1)
        return f.read(1) != b"\n"


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON objects of a file of lines, without those that cannot be read. A missing file has none."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return
    yield from (row for line in data.split(b"\n") if (row := _parse(line)) is not None)


def lines_after(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The JSON objects of whole lines from byte `offset` on, each with where its line ends; without those that cannot be read."""
    if not path.exists():
        return
    with open(path, "rb") as f:
        f.seek(offset)
        for line in f:
            if line.endswith(b"\n") and (row := _parse(line)) is not None:
                yield row, f.tell()


def damaged_lines(path: Path) -> list[int]:
    """The numbers, from 1, of lines that cannot be read though a line end follows: a crash only tears the last."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [number for number, line in enumerate(lines, 1) if line and _parse(line) is None]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


class WriterLock:
    """The exclusive right to write to a run directory, until `release` or the death of all who share the descriptor."""

    def __init__(self, run_dir: RunDir):
        self.run_dir = run_dir
        self.fd = -1

    def acquire(self, *, wait: float = 5.0, wait_for_dying: float = 60.0) -> None:
        """Take the lock. Raises RunDirError if another process keeps it for `wait` seconds.

        A holder whose command is dead already may still be saving: `wait_for_dying` seconds are given to it.
        """
        try:
            self.run_dir.path.mkdir(parents=True, exist_ok=True)
            fd = os.open(self.run_dir.lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as e:
            raise RunDirError(f"run directory {self.run_dir.path} cannot be written: {e.strerror}; choose another by --run-dir") from e
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pid = os.pread(fd, 32, 0).decode(errors="replace").strip()
                limit = wait if _alive(pid) else wait_for_dying
                if time.monotonic() - began > limit:
                    os.close(fd)
                    raise RunDirError(
                        f"run directory {self.run_dir.path} is being written by process {pid or '?'}; wait for it, stop it, or choose "
                        "another directory by --run-dir"
                    ) from None
                time.sleep(0.1)
        self.fd = fd
        with contextlib.suppress(OSError):  # for people only: a full disk must let who makes room in
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)

    def release(self) -> None:
        """Give this process's share of the lock back."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _alive(pid: str) -> bool:
    if not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
