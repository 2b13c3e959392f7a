"""A folder in a bucket as a handful of calls that end: in time, by the caller's wish, or with a StorageError that says why.

gcsfs works in a thread of its own, so a call here is a wait that can be given up. What it answers is believed as far as it
carries a checksum. It tries each request six times; a stall that its socket limits do not see, such as a peer that takes no
bytes, is cut off here.
"""

import asyncio
import base64
import contextlib
import logging
import os
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping
from concurrent.futures import wait
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import google_crc32c

from trainer.errors import EverstepError, StorageError
from trainer.files import crc32c

from .reasons import as_ours

log = logging.getLogger(__name__)

POLL = 0.2  # seconds between looks at the caller's wish
STALL = 300.0  # seconds without any progress: above six tries of a request that hangs
CONNECT, READ = 10.0, 30.0  # seconds for a connection, and for the next bytes of an answer
WIDTH = 4  # files on their way at a time; with the chunk it bounds the memory
CHUNK = 1 << 23  # bytes of a large file sent at a time; a multiple of 256 KiB


class Facts(NamedTuple):
    """What is compared of a file."""

    size: int
    crc32c: str  # 8 hex digits


def facts_of(content: bytes | Path) -> Facts:
    """Of bytes, or of a file here."""
    if isinstance(content, Path):
        return Facts(content.stat().st_size, crc32c(content))
    return Facts(len(content), google_crc32c.Checksum(content).hexdigest().decode())


class Bucket:
    """The objects below `url` (gs://bucket/prefix), by their names relative to it."""

    def __init__(self, url: str, *, cut_off: Callable[[], bool] = lambda: False, stall: float | None = None):
        self.url = url.rstrip("/")
        self._root = self.url.removeprefix("gs://")
        self._cut_off, self._stall = cut_off, stall or STALL
        self._sign = 0.0  # when something moved last

    @cached_property
    def _fs(self) -> Any:
        """Made at the first call, since that looks for credentials."""
        import aiohttp
        from gcsfs.core import GCSFileSystem  # the package's own choice asks every bucket by gRPC first, a minute where that is closed

        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs a traceback for what is raised as well
        limits = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=READ)
        return GCSFileSystem(consistency="md5", use_listings_cache=False, requests_timeout=limits, token=os.environ.get("FSSPEC_GCS_TOKEN"))

    def listing(self, under: str = "") -> dict[str, Facts]:
        """Every object below `under`, by name. What is not there has none; a bucket that is not there is an error."""
        path = f"{self._root}/{under}".rstrip("/")
        found = self._run("cannot be listed", lambda: self._fs._find(path, detail=True, update_cache=False))
        return {
            name.removeprefix(f"{self._root}/"): Facts(int(o["size"]), base64.b64decode(o.get("crc32c") or "").hex())
            for name, o in found.items()
        }

    def read(self, name: str) -> bytes | None:
        """The bytes of a small object, checked; None where it is not there."""
        return self._run(f"{name} cannot be read", lambda: self._read(f"{self._root}/{name}"))

    async def _read(self, path: str) -> bytes | None:
        try:
            headers, data = await self._fs._call("GET", self._fs.url(path))
        except FileNotFoundError:
            return None
        hashes = dict(part.strip().split("=", 1) for part in headers.get("X-Goog-Hash", "").split(",") if "=" in part)
        if "crc32c" in hashes and base64.b64decode(hashes["crc32c"]).hex() != facts_of(data).crc32c:
            raise StorageError(f"{self.url}: what was read of {path} is not what is there; it is tried again")
        return data

    def send(self, files: Mapping[str, bytes | Path]) -> None:
        """Write objects; an answer that names other bytes than were sent is an error. Which were written then is not known."""
        self._run("cannot be written", lambda: self._each(self._send, files.items()))

    async def _send(self, item: tuple[str, bytes | Path]) -> None:
        from fsspec.callbacks import Callback

        name, content = item
        if isinstance(content, bytes):
            await self._fs._pipe_file(f"{self._root}/{name}", content)
        else:
            progress = Callback(hooks={"moved": self._moved})
            await self._fs._put_file(str(content), f"{self._root}/{name}", chunksize=CHUNK, callback=progress)

    def fetch(self, names: Iterable[str], place: Callable[[str], Path]) -> None:
        """Bring objects to where `place` says for each name."""

        async def one(name: str) -> None:
            from fsspec.callbacks import Callback

            target = place(name)
            target.parent.mkdir(parents=True, exist_ok=True)
            progress = Callback(hooks={"moved": self._moved})
            await self._fs._get_file(f"{self._root}/{name}", str(target), concurrency=1, callback=progress)  # straight to the disk

        self._run("cannot be read", lambda: self._each(one, names))

    def delete(self, names: Iterable[str]) -> None:
        """Remove objects; one that is gone is fine."""

        async def one(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                await self._fs._rm_file(f"{self._root}/{name}")

        self._run("has objects that cannot be deleted", lambda: self._each(one, names))

    async def _each(self, work: Callable[[Any], Coroutine[Any, Any, None]], items: Iterable[Any]) -> None:
        """Do the work for each, some at a time; the first error ends the others."""
        gate = asyncio.Semaphore(WIDTH)

        async def one(item: Any) -> None:
            async with gate:
                await work(item)
                self._moved()

        try:
            async with asyncio.TaskGroup() as group:
                for item in items:
                    group.create_task(one(item))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _moved(self, *_: Any, **__: Any) -> None:
        self._sign = time.monotonic()

    def _run(self, what: str, work: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
        """The result of work in gcsfs' thread. Raises StorageError for whatever went wrong, also where it was cut off."""
        try:
            future = asyncio.run_coroutine_threadsafe(work(), self._fs.loop)
        except Exception as e:  # no credentials
            raise as_ours(e, f"{self.url} {what}", self.url) from e
        self._moved()
        try:
            while not wait([future], timeout=POLL).done:
                if self._cut_off():
                    raise StorageError(f"{self.url} {what}: cut off")
                if time.monotonic() - self._sign > self._stall:
                    raise StorageError(f"{self.url} {what}: nothing moved for {self._stall:g} s; it is tried again")
            return future.result()
        except EverstepError:
            raise
        except Exception as e:  # an answer that was damaged on its way fails anywhere in there
            log.debug("%s %s", self.url, what, exc_info=True)
            raise as_ours(e, f"{self.url} {what}", self.url) from e
        finally:
            future.cancel()
