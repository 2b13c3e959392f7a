"""A scrub: every local and published checkpoint of a run is read again, and one is repaired from the other.

A copy takes the place of a checkpoint only where it is known to be of that very training of the step. What is being trained is
looked at and not touched.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from configs.load import read_config
from configs.run import RunConfig, chunk_ends
from trainer import manifest
from trainer.errors import EverstepError, RunDirError
from trainer.paths import prepared_dir
from trainer.rundir import RunDir, WriterLock

from .publish import beside, fetch_copy
from .stores import Store
from .summary import store_of

log = logging.getLogger(__name__)

ANSWER = 60.0  # seconds without progress after which a store counts as away


@dataclass
class Step:
    """What was found of one step, and what was done about it."""

    step: int
    local: Literal["ok", "damaged", "missing"] = "ok"
    copy: Literal["ok", "damaged", "missing", "none"] = "none"  # none: there is none, and none is due
    problems: list[str] = field(default_factory=list)
    done: str = ""
    ok: bool = True  # now


@dataclass
class Scrub:
    """What was found of one run."""

    run_dir: str
    steps: list[Step] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # why nothing was repaired, or copies were not read
    ok: bool = True

    def to_dict(self) -> dict[str, Any]:
        """In JSON terms."""
        return asdict(self)


@dataclass(frozen=True)
class Copies:
    """What a store has of a run: what is wrong with each copy, and the crc32c of the manifests of those that can be read."""

    problems: Mapping[int, list[str]]
    crcs: Mapping[int, str]


def scrub(path: Path) -> Scrub:
    """Read every checkpoint of a run and every copy, and repair what can be. Raises ConfigError where the run's config cannot be read."""
    place, config = RunDir(path), read_config(path)
    lock, found = WriterLock(place), Scrub(str(place.path))
    try:
        lock.acquire(wait=0, wait_for_dying=0)
    except RunDirError as e:
        found.notes.append(f"nothing is repaired: {e}")
    try:
        _scrub(config, place, found, repair=not found.notes)
    finally:
        lock.release()
    found.ok = found.ok and all(row.ok for row in found.steps)
    return found


def _scrub(config: RunConfig, place: RunDir, found: Scrub, *, repair: bool) -> None:
    copies = Copies({}, {})
    store = None
    try:
        if (store := store_of(config, place, stall=ANSWER)) is not None:
            copies = Copies(store.check(), store.published())
    except (EverstepError, OSError) as e:
        store, found.ok = None, False
        found.notes.append(f"the copies could not be read: {e}")
    due = set(chunk_ends(config)) if store is not None and repair else set()  # what is being trained publishes by itself
    for step in sorted({*manifest.steps_in(place.checkpoints), *copies.problems}):
        row = _look(place, step, copies, is_due=step in due)
        if row is None:
            continue
        if store is not None and repair and not row.ok:
            _repair(place, store, row, newest=max([step, *copies.crcs]))
        found.steps.append(row)


def _look(place: RunDir, step: int, copies: Copies, *, is_due: bool) -> Step | None:
    """What there is of a step; None where that is no more than a save that was cut off or goes on, or a copy that nothing is known of."""
    folder, row = place.checkpoints / manifest.name_of(step), Step(step)
    row.problems = manifest.problems(folder, step)
    vouched = step in copies.crcs and copies.crcs[step] == _crc_of(place, step)
    if not (folder / manifest.NAME).exists():  # asked after it was read: training may have removed it meanwhile
        if not vouched:
            return None
        row.local = "missing"
    elif row.problems:
        row.local = "damaged"
    if step in copies.problems:
        row.copy = "damaged" if copies.problems[step] else "ok"
        row.problems += [f"copy: {line}" for line in copies.problems[step]]
    if row.copy == "ok" and not vouched:
        row.copy = "missing" if is_due else "none"
        row.problems.append("copy: of another training of this step")
    elif row.copy == "none" and is_due and row.local == "ok":
        row.copy = "missing"
        row.problems.append("copy: missing")
    row.ok = row.local == "ok" and row.copy in ("ok", "none")
    return row


def _crc_of(place: RunDir, step: int) -> str | None:
    """The crc32c that the manifest of a step's checkpoint ends with; where it cannot be read, that of its last copy by the events.

    A restore of an earlier step begins another course, of whose steps nothing is known before they are published again.
    """
    try:
        return manifest.parse((place.checkpoints / manifest.name_of(step) / manifest.NAME).read_bytes())["crc32c"]
    except (OSError, ValueError):
        pass
    crc = None
    for event in place.read_events():
        at = event.get("to", event.get("step"))  # a rollback's step is the one that it was for
        if event["event"] == "published" and at == step:
            crc = event.get("manifest_crc32c")
        elif event["event"] in ("restored", "rolled_back") and isinstance(at, int) and at < step:
            crc = None
    return crc


def _repair(place: RunDir, store: Store, row: Step, *, newest: int) -> None:
    """Make both sides whole from the one that is; what cannot be is said."""
    try:
        if row.local == "ok":
            _publish_again(place, store, row.step, newest=newest)
            row.done = "published again"
        elif row.copy == "ok":
            fetch_copy(place, store, row.step)
            row.done = "brought back from its copy"
        else:
            row.done = "nothing: neither it nor its copy is whole" if row.copy == "damaged" else "nothing: there is no copy of it"
            return
    except (EverstepError, OSError) as e:
        row.done = f"nothing: {e}"
        return
    row.ok = True
    log.info("step %d: %s", row.step, row.done)


def _publish_again(place: RunDir, store: Store, step: int, *, newest: int) -> None:
    folder = place.checkpoints / manifest.name_of(step)
    digest = json.loads((folder / "meta" / "metadata").read_text()).get("data_digest", "")
    others = beside(place, prepared_dir(digest), newest=newest)
    # The data may not be prepared on this machine; then what the store has of it stays.
    there = {name: content for name, content in others.items() if isinstance(content, bytes) or content.exists()}
    if missing := sorted(others.keys() - there.keys()):
        log.warning("%s of the data are not published again: the data is not prepared here", ", ".join(missing))
    url = store.publish(step, folder, there)
    shown = f"published/checkpoints/{folder.name}" if Path(url).is_relative_to(place.path) else url
    place.event("published", step=step, url=shown, manifest_crc32c=manifest.own_crc(folder))
    place.event("repaired", step=step, source="local")


def runs_under(root: Path) -> list[Path]:
    """The run directories right below `root`, by name."""
    return sorted(p.parent for p in root.glob("*/config.json"))
