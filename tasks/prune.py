"""What nothing keeps in a run directory and its store: found, shown, removed.

Never the newest whole checkpoint, the best, or one that waits for its copy; and while no checkpoint is whole, nothing that was set
aside, which may be all there is of the run.
"""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from configs.load import read_config
from configs.run import RunConfig, chunk_ends
from trainer import manifest
from trainer.errors import StorageError
from trainer.files import remove, size_of
from trainer.rundir import RunDir, WriterLock

from .aside import aside
from .publish import nothing_keeps
from .stores import Store
from .summary import store_of

log = logging.getLogger(__name__)

ANSWER = 60.0  # seconds without progress after which a store counts as away


@dataclass(frozen=True)
class Item:
    """Something that nothing keeps."""

    what: str
    path: str
    bytes: int | None  # None: not known
    remove: Callable[[], Any]

    def to_dict(self) -> dict[str, Any]:
        """In JSON terms."""
        return {"what": self.what, "path": self.path, "bytes": self.bytes}


def prune(path: Path, *, dry: bool = False) -> tuple[list[Item], list[str]]:
    """Remove what nothing keeps, `dry`: only find it; what it is, and what could not be looked at.

    Raises RunDirError where the run is being trained: what it is writing looks like what was left behind.
    """
    place, config = RunDir(path), read_config(path)
    lock = WriterLock(place)
    lock.acquire(wait=2.0)
    try:
        items, notes = _find(config, place)
        for item in [] if dry else items:
            try:
                item.remove()
            except StorageError as e:
                notes.append(f"{item.path} is not removed: {e}")
        if items and not dry:
            place.event("pruned", items=len(items), bytes=sum(item.bytes or 0 for item in items))
        return items, notes
    finally:
        lock.release()


def _find(config: RunConfig, place: RunDir) -> tuple[list[Item], list[str]]:
    items, notes = _leftovers(place), list[str]()
    published: dict[int, str] = {}
    store: Store | None = None
    try:
        if (store := store_of(config, place, stall=ANSWER)) is not None:
            published = store.published()
            waiting = set(chunk_ends(config)) & set(manifest.steps_in(place.checkpoints)) - published.keys()
            once = cache(partial(store.clear, frozenset(waiting)))  # removes them all
            items += [Item("leftover in the store", p, size, once) for p, size in store.clear(waiting, dry=True).items()]
    except StorageError as e:
        store, published = None, {}
        notes.append(f"the store was not looked at, and what may not be published is kept: {e}")
    newest = manifest.newest_whole(place.checkpoints)
    here = set(manifest.steps_in(place.checkpoints))
    for step in nothing_keeps(config, place, published):
        if newest is not None and step == newest.step:
            continue  # newer ones are damaged
        folder = place.checkpoints / manifest.name_of(step)
        if step in here:
            items.append(Item("checkpoint", str(folder), size_of(folder), partial(_remove, folder)))
        if store is not None and step in published:
            items.append(_copy(store, step))
    if newest is not None:
        items += [Item("set aside", str(p), size, partial(_remove, p)) for p, size in aside(place).items()]
    elif aside(place):
        notes.append("what is set aside is kept: no checkpoint is whole")
    return items, notes


def _copy(store: Store, step: int) -> Item:
    address = f"{store.address}/checkpoints/{manifest.name_of(step)}"
    size = None if "://" in address else size_of(Path(address))
    return Item("copy", address, size, partial(store.delete, step))


def _leftovers(place: RunDir) -> list[Item]:
    """Of saves, deletions and writes that were cut off: in checkpoints/ what has no step's name, elsewhere what was to be renamed."""
    found = [p for p in place.checkpoints.iterdir() if not p.name.isdigit()] if place.checkpoints.is_dir() else []
    found += place.path.glob("*.part")
    return [Item("leftover", str(p), size_of(p), partial(_remove, p)) for p in sorted(found)]


def _remove(path: Path) -> None:
    """A checkpoint goes at once: half deleted it must not look like one."""
    if path.name.isdigit():
        path = path.rename(path.with_name(f".trash-{path.name}"))
    remove(path)
    with contextlib.suppress(OSError):
        path.parent.rmdir() if path.parent.name in ("damaged", "abandoned") else None
