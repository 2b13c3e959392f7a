"""The main of the Prefect server process that `tasks/server.py` owns: `python -m tasks.server_main HOST PORT PARENT_PID`.

A first database takes seconds of migrations, and a kill amid them must not leave half a schema under the name that the
next start trusts. So it is made under another name and linked into place when it is whole.
"""

import sys

from trainer.lifeline import die_with_parent

if __name__ == "__main__":
    die_with_parent(int(sys.argv[3]))  # before the seconds of imports below

import asyncio
import contextlib
import fcntl
import os
import signal
import socket
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import uvicorn

from .server import STOP_SIGNAL

SHUTDOWN_SECONDS = 2  # for requests in flight, after which they are cut off


def main(host: str, port: int) -> None:
    """Serve Prefect's API, UI and services on `host:port` until STOP_SIGNAL.

    Signals that a service manager or a shell sends to a whole group are ignored: the flow process reports its end through
    this server, so it must be the last to go. It goes with its parent.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    from prefect.server.api.server import create_app
    from prefect.settings import get_current_settings

    database = sqlite_path(get_current_settings().server.database)
    if database is not None:
        make_database(database)
    config = uvicorn.Config(
        create_app(final=True),
        log_level="warning",
        timeout_keep_alive=get_current_settings().server.api.keepalive_timeout,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # the parent holds the port with a socket of its own
        sock.bind((host, port))
        _Server(config).run(sockets=[sock])


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        signal.signal(STOP_SIGNAL, self.handle_exit)
        yield


def sqlite_path(database) -> Path | None:
    """The file of Prefect's database settings; None where it is not SQLite, or in memory."""
    from sqlalchemy.engine import make_url

    url = make_url(database.connection_url.get_secret_value())
    if url.get_backend_name() != "sqlite" or not url.database or "memory" in url.database or url.database.startswith("file:"):
        return None
    return Path(url.database)


def make_database(path: Path) -> None:
    """Make Prefect's database at `path`, whole or not at all; one that is there is left alone.

    Of several processes that need it at once one makes it and the others wait. The kernel frees the lock of a dead one.
    """
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return
        for leftover in path.parent.glob(path.name + ".new-*"):  # of the dead: whoever makes one holds the lock
            leftover.unlink(missing_ok=True)
        new = path.with_name(f"{path.name}.new-{os.getpid()}")
        _migrate(new)
        for suffix in ("-wal", "-shm", "-journal"):  # a journal of a deleted database would be replayed into this one
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        try:
            os.link(new, path)  # unlike a rename it replaces nothing: another kind of server may have made one meanwhile
        except FileExistsError:
            pass
        except OSError:  # a file system without hard links
            os.rename(new, path)
        new.unlink(missing_ok=True)


def _migrate(path: Path) -> None:
    from prefect.server.database.configurations import AioSqliteConfiguration
    from prefect.server.database.dependencies import temporary_database_config

    with temporary_database_config(AioSqliteConfiguration(connection_url=f"sqlite+aiosqlite:///{path}")):
        asyncio.run(_fill())
    connection = sqlite3.connect(path)
    with contextlib.closing(connection):
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    assert not busy, f"{path} is still in use after its migration"
    with open(path, "rb") as f:
        os.fsync(f.fileno())


async def _fill() -> None:
    from prefect.server.database import provide_database_interface
    from prefect.server.models.block_registration import run_block_auto_registration

    db = provide_database_interface()
    await db.create_db()
    async with await db.session() as session:  # else servers that start at once on the new database insert the same rows
        await run_block_auto_registration(session=session)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
