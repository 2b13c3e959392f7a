"""A look at a place for copies: writes, lists, reads and deletes a small file there, and says what of that is refused and why."""

import os
import secrets
import time
from collections.abc import Callable
from typing import Any

from configs.publish import BUCKET
from trainer.errors import EverstepError
from trainer.storage import file_system

from .bucket import Bucket
from .reasons import reason_of

ANSWER = 60.0  # seconds without progress


class Unusable(Exception):
    """What was found at an address, and the cure."""


def probe(address: str) -> str:
    """What was done at `address`, a bucket, a folder or anything fsspec opens. Raises Unusable where it cannot be used; leaves nothing."""
    if address.startswith("gs://") and not BUCKET.fullmatch(address):
        raise Unusable(
            f"{address} does not name a bucket", "names are 3 to 63 lower-case letters, digits, '-', '_' and '.': gs://BUCKET/PREFIX"
        )
    began = time.monotonic()
    name, data = f".everstep-probe-{secrets.token_hex(4)}", os.urandom(1024)
    place: Any = Bucket(address, stall=ANSWER) if address.startswith("gs://") else _Folder(address)
    _try("written to", lambda: place.send({name: data}), address)
    try:
        if name not in _try("listed", place.listing, address):
            raise Unusable(f"{address} does not list what was written just now", "use a store that lists what it has")
        if _try("read", lambda: place.read(name), address) != data:
            raise Unusable(f"{address} gives back other bytes than were written", "see to the disk or the network; do not publish there")
    finally:
        _try("deleted from (retention needs that)", lambda: place.delete([name]), address)
    return f"{address}: wrote, listed, read and deleted a file in {time.monotonic() - began:.1f} s"


def _try(what: str, work: Callable[[], Any], address: str) -> Any:
    try:
        return work()
    except Exception as e:
        cause = e.__cause__ if isinstance(e, EverstepError) and e.__cause__ else e
        reason = reason_of(cause, address)
        cure = "see to it, then try again" if reason.passes else reason.cure
        raise Unusable(f"{address} cannot be {what}: {reason.found}", cure) from e


class _Folder:
    """A folder as fsspec opens it, with the calls of Bucket that a probe makes."""

    def __init__(self, address: str):
        try:
            self._fs, self._root = file_system(address, "--storage")
        except EverstepError as e:
            raise Unusable(str(e), "give gs://BUCKET/PREFIX or a folder, or install what opens the address") from e

    def send(self, files: dict[str, bytes]) -> None:
        for name, data in files.items():
            self._fs.pipe_file(f"{self._root}/{name}", data)

    def listing(self) -> set[str]:
        self._fs.invalidate_cache()
        return {path.rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)}

    def read(self, name: str) -> bytes:
        return self._fs.cat_file(f"{self._root}/{name}")

    def delete(self, names: list[str]) -> None:
        for name in names:
            self._fs.rm_file(f"{self._root}/{name}")
