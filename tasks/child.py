"""One trainer process and our end of its pipe: spawned, spoken with, found dead or silent, killed."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trainer.errors import TrainerDiedError, TrainerHungError

START_LIMIT = 180.0  # seconds for the imports of a new trainer process on a loaded machine
BEAT_LIMIT = 30.0  # seconds without a sign of life, after which a process hangs; it gives one a second
STOPPED_LIMIT = 10.0  # the same for a process that a signal has stopped

# The temporary arrays of a step are as large in every step. By default glibc gives them back to the system after each and
# the kernel clears every page again: 80 of 170 ms of a step of `tiny`. Kept, and in huge pages, they cost 1.
MALLOC = "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592:glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"


class Child:
    """A trainer process and our end of its pipe."""

    def __init__(self, lock_fd: int, log_path: Path):
        ours, theirs = socket.socketpair()
        with theirs, open(log_path, "ab") as log_file:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "trainer.worker", str(theirs.fileno()), str(os.getpid())],
                pass_fds=(theirs.fileno(), lock_fd),
                env={"GLIBC_TUNABLES": MALLOC, **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,  # a Ctrl-C in the terminal is for the command alone
            )
        self.connection = Connection(ours.detach())
        self.began = self.last_sign = time.monotonic()
        self.phase = "imports"

    @property
    def alive(self) -> bool:
        """Whether the process runs, as far as the kernel knows."""
        return self.process.poll() is None

    def send(self, kind: str, value: Any) -> None:
        """Send a request. Raises TrainerDiedError where nobody is there to read it."""
        try:
            self.connection.send_bytes(json.dumps([kind, value]).encode())
        except OSError as e:
            raise self.died() from e

    def receive(self, timeout: float) -> list[Any] | None:
        """The next message, None where none came in time. Raises TrainerDiedError where none will."""
        try:
            if not self.connection.poll(timeout):
                limit = STOPPED_LIMIT if self._is_stopped() else BEAT_LIMIT if self.phase != "imports" else START_LIMIT
                if time.monotonic() - self.last_sign > limit:
                    raise self.hung(limit)
                return None
            message = json.loads(self.connection.recv_bytes())
        except (EOFError, OSError) as e:
            raise self.died() from e
        self.last_sign = time.monotonic()
        if message[0] == "beat":
            self.phase = message[1]["phase"]
        return message

    def _is_stopped(self) -> bool:
        try:
            return Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
        except OSError:
            return False

    def died(self) -> TrainerDiedError:
        """What became of the process, as an error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        code = self.process.returncode
        how = "without a word" if code is None else f"with exit code {code}" if code >= 0 else f"by signal {-code} ({_signal_name(-code)})"
        hint = "; the system may have run out of memory: lower data.batch_size" if code == -signal.SIGKILL else ""
        return TrainerDiedError(f"the trainer process {self.process.pid} ended {how} in phase {self.phase}{hint}")

    def hung(self, limit: float) -> TrainerHungError:
        """The error of a process without signs of life, which is killed."""
        self.kill()
        return TrainerHungError(
            f"the trainer process {self.process.pid} gave no sign of life for {limit:.0f} s in phase {self.phase}; killed"
        )

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.connection.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "?"
