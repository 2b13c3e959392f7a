"""One trainer process and our end of its pipe: spawned, spoken with, found dead or silent, killed."""

import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from trainer.errors import MEMORY_DIALS, TrainerDiedError, TrainerHungError
from trainer.progress import Place, Progress, shared_memory

from .watchdog import Watchdog, activity_of

log = logging.getLogger(__name__)

STACKS = 2.0  # seconds that a stuck process has to write its stacks down

# The temporary arrays of a step are as large in every step. By default glibc gives them back to the system after each and
# the kernel clears every page again: 80 of 170 ms of a step of `tiny`. Kept, and in huge pages, they cost 1.
MALLOC = "glibc.malloc.mmap_threshold=8589934592:glibc.malloc.trim_threshold=8589934592:glibc.malloc.arena_max=1:glibc.malloc.hugetlb=1"


class Child:
    """A trainer process and our end of its pipe. `seen` and `patience` are for its watchdog."""

    def __init__(self, lock_fd: int, log_path: Path, seen: dict[str, float], *, patience: float = 1.0):
        ours, theirs = socket.socketpair()
        memory = shared_memory()
        self._log_path, self._oom_kills = log_path, oom_kills()
        with theirs, open(log_path, "ab") as log_file:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", "trainer.worker", str(theirs.fileno()), str(os.getpid()), str(memory)],
                pass_fds=(theirs.fileno(), lock_fd, memory),
                env={"GLIBC_TUNABLES": MALLOC, **os.environ},
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=log_file,
                start_new_session=True,  # a Ctrl-C in the terminal is for the command alone
            )
        self.connection = Connection(ours.detach())
        self.progress = Progress(memory)
        os.close(memory)
        self._watchdog = Watchdog(self.progress.read, lambda: activity_of(self.process.pid), seen, patience=patience)

    @property
    def alive(self) -> bool:
        """Whether the process runs, as far as the kernel knows."""
        return self.process.poll() is None

    @property
    def place(self) -> Place:
        """Where it is, or was when it died."""
        return self.progress.read()

    def send(self, kind: str, value: Any) -> None:
        """Send a request. Raises TrainerDiedError where nobody is there to read it."""
        self._watchdog.forgive()
        try:
            self.connection.send_bytes(json.dumps([kind, value]).encode())
        except OSError as e:
            raise self.died() from e

    def receive(self, timeout: float) -> list[Any] | None:
        """The next message, None where none came in time. Raises TrainerDiedError where none will."""
        if why := self._watchdog.look():
            raise self.hung(why)
        try:
            return json.loads(self.connection.recv_bytes()) if self.connection.poll(timeout) else None
        except (EOFError, OSError) as e:
            raise self.died() from e

    def died(self) -> TrainerDiedError:
        """What became of the process, as an error."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        code = self.process.returncode
        how = "without a word" if code is None else f"with exit code {code}" if code >= 0 else f"by signal {-code} ({_signal_name(-code)})"
        if code == -signal.SIGKILL and oom_kills() > self._oom_kills:
            how += f": the system ran out of memory; {MEMORY_DIALS}"
        return TrainerDiedError(f"the trainer process {self.process.pid} ended {how} {self._where()}", cause=f"exit {code}")

    def hung(self, why: str) -> TrainerHungError:
        """The error of a process that goes on no more; its stacks are logged, and it is killed."""
        stacks = self._stacks()
        self.kill()
        if stacks:
            log.warning("stacks of the trainer process %d:\n%s", self.process.pid, stacks)
        return TrainerHungError(f"the trainer process {self.process.pid} was killed {self._where()}: {why}", cause="hung")

    def _where(self) -> str:
        place = self.place
        return f"in phase {place.phase}" + (f" after step {place.step}" if place.step >= 0 else "")

    def _stacks(self) -> str:
        """What its threads are at, as it writes it to its log when asked; nothing where it is stopped or blocks signals."""
        start = end = self._log_path.stat().st_size
        self.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + STACKS
        while time.monotonic() < deadline:
            time.sleep(0.2)
            before, end = end, self._log_path.stat().st_size
            if before == end > start:
                break
        with open(self._log_path, "rb") as f:
            f.seek(start)
            return f.read(end - start).decode(errors="replace").rstrip()

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(5)
        self.connection.close()


def oom_kills() -> int:
    """How many processes of this system were killed for want of memory since it started; 0 where it does not say."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/vmstat").read_text().splitlines():
            if line.startswith("oom_kill "):
                return int(line.split()[1])
    return 0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "?"
