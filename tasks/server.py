"""The Prefect server that one command owns, where the user has none (no PREFECT_API_URL).

It is there for as long as the command and not longer: the kernel kills it with its parent, and a thread here replaces it
when it dies or hangs. Its address never changes meanwhile, because the parent keeps a bound, never listening socket on
the port: nobody else can take it, and between two lives of the server a call is refused at once instead of hanging.

Nothing here imports Prefect before the server was spawned, so both load at the same time.
"""

import contextlib
import http.client
import importlib
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import EverstepError

log = logging.getLogger(__name__)

STOP_SIGNAL = signal.SIGUSR1  # SIGTERM, which service managers send to everything at once, is ignored by the server

# How long a report waits for a server that is away or hangs. Prefect tries again after 2, 4 and 8 s: a killed server is back
# by then (14 s), a hung one is killed by the watcher while the first try waits. A shorter timeout would gain nothing, and a
# server that is merely slow would do twice what the client gave up on (create a flow run).
# Read by Prefect when it is imported; what the user has set stands.
CLIENT_SETTINGS = {
    "PREFECT_API_REQUEST_TIMEOUT": "10",
    "PREFECT_CLIENT_MAX_RETRIES": "3",
    "PREFECT_CLIENT_RETRY_JITTER_FACTOR": "0",
    "PREFECT_CLIENT_SERVER_VERSION_CHECK_ENABLED": "false",  # the server is from this very installation
    "PREFECT_CLIENT_CSRF_SUPPORT_ENABLED": "false",  # one more call per client, and the server has it off
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
    "DO_NOT_TRACK": "1",
}

_SERVER_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_CSRF_PROTECTION_ENABLED": "false",
    "PREFECT_LOGGING_LEVEL": "WARNING",
    "PREFECT_SERVER_LOGGING_LEVEL": "WARNING",
}

_MAX_LOG_BYTES = 5_000_000
_FAILED_STARTS = 3  # exits in a row, by itself and before it ever answered: it will not work
_MAX_BACKOFF = 30.0


class ServerError(EverstepError):
    """The Prefect server this command owns did not come up."""

    retryable = True


class OwnedServer:
    """A Prefect server in a child process, restarted on the same port whenever it dies or hangs.

    Times are in seconds. `hung_after` counts from the first unanswered question of a server that had answered before, or that
    a signal has stopped; `start_timeout` bounds the start of one that had not answered yet.
    """

    def __init__(
        self,
        log_path: Path | None = None,
        *,
        port: int = 0,
        poll_interval: float = 1.0,
        answer_timeout: float = 2.0,
        hung_after: float = 10.0,
        start_timeout: float = 120.0,
        stop_timeout: float = 3.0,
    ):
        self.log_path = log_path or Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser() / "everstep-server.log"
        self.host = "127.0.0.1"
        self.port = port  # 0: a free one, chosen by start()
        self._poll_interval = poll_interval
        self._answer_timeout = answer_timeout
        self._hung_after = hung_after
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._reservation: socket.socket | None = None
        self._child: subprocess.Popen | None = None
        self._watcher: threading.Thread | None = None
        self._lock = threading.Lock()  # spawning and killing, against close()
        self._closing = threading.Event()
        self._ready = threading.Event()
        self._failed_starts: list[str] = []

    @property
    def api_url(self) -> str:
        return f"http://{self.host}:{self.port}/api"

    @property
    def ui_url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        """Of the server's present life."""
        return self._child.pid if self._child else None

    def start(self) -> None:
        """Choose a port and spawn the server; returns before it answers. Main thread only: the child dies with its thread."""
        assert threading.current_thread() is threading.main_thread()
        assert self._watcher is None, "a server is started once"
        self._reservation = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # so that the server can bind it too
        self._bind(self._reservation)
        self.port = self._reservation.getsockname()[1]
        self._spawn()
        # A daemon that returns only after close(): the servers it spawns die with this thread.
        self._watcher = threading.Thread(target=self._watch, name="prefect-server-watcher", daemon=True)
        self._watcher.start()

    def _bind(self, reservation: socket.socket) -> None:
        try:
            if self.port:
                with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:  # SO_REUSEPORT would share it with a stranger
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    probe.bind((self.host, self.port))
            reservation.bind((self.host, self.port))
        except OSError as e:
            raise ServerError(f"port {self.port} is taken ({e.strerror}); choose another by --port, or look what is served there") from e

    def wait_ready(self, timeout: float = 180.0) -> None:
        """Block until the server has answered once; ServerError with the end of its log if it does not."""
        deadline = time.monotonic() + timeout
        while not self._ready.wait(0.1):
            if len(self._failed_starts) >= _FAILED_STARTS:
                raise ServerError(f"the Prefect server ended at every start ({self._failed_starts[-1]}); {self._log_hint()}")
            if time.monotonic() > deadline:
                raise ServerError(f"the Prefect server did not answer on port {self.port} within {timeout:g} s; {self._log_hint()}")

    def close(self) -> None:
        """End the server within `stop_timeout`, gently first so that it writes what it has received. Never raises."""
        self._closing.set()
        try:
            with self._lock:  # a spawn in flight is done, and no other follows
                child = self._child
            if child is not None and child.poll() is None:
                child.send_signal(STOP_SIGNAL)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    child.wait(self._stop_timeout)
                child.kill()
                child.wait(1)
            if self._watcher is not None:
                self._watcher.join(self._answer_timeout + 1)
            if self._reservation is not None:
                self._reservation.close()
        except Exception:
            log.warning("prefect server could not be ended in order; it ends with this process", exc_info=True)

    def __enter__(self) -> "OwnedServer":
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _spawn(self) -> None:
        with self._lock:
            if self._closing.is_set():
                return
            self.log_path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.log_path, "ab") as output:
                if output.tell() > _MAX_LOG_BYTES:
                    output.truncate(0)
                self._child = subprocess.Popen(
                    # -P: a `tasks` folder in the working directory is the user's, not ours
                    [sys.executable, "-P", "-m", "tasks.server_main", self.host, str(self.port), str(os.getpid())],
                    env=self._environment(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,  # a Ctrl-C in the terminal is for the flow
                )

    def _environment(self) -> dict[str, str]:
        env = {k: v for k, v in os.environ.items() if k not in ("PREFECT_API_URL", "PREFECT_UI_API_URL")}
        return env | _SERVER_SETTINGS | {"PREFECT_SERVER_UI_API_URL": self.api_url}

    def _watch(self) -> None:
        silent_lives = 0  # in a row, without one answer
        while (end := self._watch_one_life()) is not None:
            reason, answered = end
            silent_lives = 0 if answered else silent_lives + 1
            pause = 0.0 if silent_lives < 2 else min(2.0 ** (silent_lives - 2), _MAX_BACKOFF)
            if self._closing.wait(pause):
                return
            try:
                self._spawn()
            except OSError as e:  # no memory or processes now; the dead child stays the present one
                log.warning("prefect server %s; no restart on port %d: %s", reason, self.port, e)
                continue
            if not self._closing.is_set():
                log.warning("prefect server %s; restarted on port %d", reason, self.port)

    def _watch_one_life(self) -> tuple[str, bool] | None:
        """Watch the present child until it is dead: why it is, and whether it had ever answered. None when closing."""
        child = self._child
        assert child is not None
        born, answered, silent_since = time.monotonic(), False, None
        while not self._closing.is_set():
            code = child.poll()
            if code is not None:
                reason = f"died (signal {-code})" if code < 0 else f"died (exit code {code})"
                if code >= 0 and not self._ready.is_set():
                    self._failed_starts.append(reason)
                return reason, answered
            asked = time.monotonic()
            if self._answers():
                answered, silent_since = True, None
                self._ready.set()
            elif answered or _is_stopped(child.pid):
                silent_since = silent_since or asked
                if time.monotonic() - silent_since >= self._hung_after and self._kill(child):
                    return f"gave no answer for {self._hung_after:g} s and was killed", answered
            elif time.monotonic() - born >= self._start_timeout and self._kill(child):
                return f"was not ready after {self._start_timeout:g} s and was killed", answered
            with contextlib.suppress(subprocess.TimeoutExpired):  # a death ends the pause
                child.wait(self._poll_interval if answered else min(self._poll_interval, 0.2))
        return None

    def _kill(self, child: subprocess.Popen) -> bool:
        """Kill and reap; False if close() has the say, or if the kernel holds the process (it is tried again)."""
        with self._lock:
            if self._closing.is_set() or child.poll() is not None:  # dead by now: the caller's next look says of what
                return False
            child.kill()
            try:
                child.wait(5)
            except subprocess.TimeoutExpired:
                return False
        return True

    def _answers(self) -> bool:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=self._answer_timeout)
        try:
            connection.request("GET", "/api/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def _log_hint(self) -> str:
        with contextlib.suppress(OSError):
            if tail := self.log_path.read_text(errors="replace").strip().splitlines()[-5:]:
                return f"the end of its log {self.log_path}:\n" + "\n".join(tail)
        return f"its log {self.log_path} is empty; set PREFECT_API_URL to use another server"


def _is_stopped(pid: int) -> bool:
    """Whether a SIGSTOP holds the process; not known without /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    except OSError:
        return False


@contextlib.contextmanager
def server(log_path: Path | None = None) -> Iterator[str]:
    """The API address to report to: the user's own server where one is configured, else of one that lives as long as this context.

    Where we own it, it answers when this returns; PREFECT_API_URL and CLIENT_SETTINGS are in the environment and Prefect is
    imported. At the end, reports still on their way get a few seconds, the server ends and the environment is restored.
    """
    if (url := configured_api_url()) is not None:
        yield url
        return
    owned = OwnedServer(log_path)
    owned.start()
    settings = {"PREFECT_API_URL": owned.api_url} | {k: v for k, v in CLIENT_SETTINGS.items() if k not in os.environ} | _past_proxies()
    before = {name: os.environ.get(name) for name in settings}
    answered = False
    try:
        os.environ.update(settings)
        importlib.import_module("prefect.flows")  # takes as long as the server needs for its own imports
        importlib.import_module("prefect.context").refresh_global_settings_context()  # it may have been imported earlier
        owned.wait_ready()
        answered = True
        yield owned.api_url
    finally:
        if answered and not drain_reports():
            log.warning("some reports did not reach the prefect server; the run itself is not affected")
        owned.close()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def drain_reports(timeout: float = 5.0) -> bool:
    """Wait until log lines and events (which carry the states of task runs) have left this process; whether they have.

    `timeout` seconds at most. Where they have not, Prefect goes on trying as the interpreter ends, 7 s for every event: a
    command that must not wait leaves by `os._exit`.
    """
    deadline = time.monotonic() + timeout
    drained = True
    if "prefect.events.worker" in sys.modules:
        # The client keeps what a dead server did not confirm, and sends it again when the next event finds the connection
        # broken: without one more event the last states of task runs would be lost.
        with contextlib.suppress(Exception):
            importlib.import_module("prefect.events").emit_event(
                event="everstep.command.ended", resource={"prefect.resource.id": f"everstep.command.{os.getpid()}"}
            )
    for module, worker in (("prefect.events.worker", "EventsWorker"), ("prefect.logging.handlers", "APILogWorker")):
        if module in sys.modules:
            try:
                _, left = getattr(sys.modules[module], worker).drain_all(timeout=max(0.1, deadline - time.monotonic()))
                drained &= not left
            except Exception:
                log.warning("last reports to the prefect server were lost", exc_info=True)
                drained = False
    return drained


def configured_api_url() -> str | None:
    """Where the user's own Prefect server is, by Prefect's rules: environment, `.env`, prefect.toml, pyproject.toml, active profile.

    Prefect is not asked: importing its settings imports most of it (2 s) and freezes what the environment says.
    """
    dotenv = _dotenv()

    def variable(name: str) -> str | None:
        return os.environ.get(name) or dotenv.get(name)

    if url := variable("PREFECT_API_URL"):
        return url
    for table in (_toml(Path("prefect.toml")), _toml(Path("pyproject.toml")).get("tool", {}).get("prefect", {})):
        if url := table.get("api", {}).get("url"):
            return url
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    profiles = _toml(Path(variable("PREFECT_PROFILES_PATH") or home / "profiles.toml"))
    active = os.environ.get("PREFECT_PROFILE") or profiles.get("active")
    return profiles.get("profiles", {}).get(active, {}).get("PREFECT_API_URL")


def _toml(path: Path) -> dict:
    try:
        return tomllib.loads(path.read_text())
    except (OSError, ValueError):  # a broken file is Prefect's to complain of
        return {}


def _dotenv() -> dict[str, str | None]:
    if not Path(".env").is_file():
        return {}
    import dotenv

    return dotenv.dotenv_values(".env")


def _past_proxies() -> dict[str, str]:
    """What makes HTTP clients reach 127.0.0.1 itself where the environment names a proxy."""
    if not any(os.environ.get(name) for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy")):
        return {}
    return {name: ",".join(filter(None, [os.environ.get(name), "127.0.0.1"])) for name in ("NO_PROXY", "no_proxy")}
