"""The tasks that copy commits to the store and remove copies from it, and the removal here of what nothing keeps any more."""

import functools
import itertools
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.run import RunConfig, chunk_ends
from trainer import manifest, rows
from trainer.errors import DamagedError, StorageError
from trainer.ledger import abandoned_copies
from trainer.retention import steps_to_delete
from trainer.rundir import RunDir

from .aside import keep_to_quota
from .refs import CheckpointRef, DataRef, PublishedRef, already_done
from .stores import LocalStore, Store
from .summary import best_of, store_of
from .writer import current

log = logging.getLogger(__name__)

TRASH = ".trash"
PATIENCE = 20.0  # seconds without progress after which a run that can go on without the store does so


@task(task_run_name="publish[{ref.step}]", cache_policy=NO_CACHE)
def publish_checkpoint(config: RunConfig, ref: CheckpointRef, data: DataRef, run_dir: str) -> PublishedRef:
    """Copy a commit to the store, verified, with what another machine needs to go on from it.

    A store that is away is waited for in here and not by Prefect's retries, whose pauses could not be cut off.
    """
    place, copies = RunDir(run_dir), current().copies
    store = store_of(config, place, cut_off=lambda: copies.closed)
    assert store is not None, "a run that publishes nothing has no task for it"
    known = copies.insist(lambda: copies.ask(store))
    for step in known.keys() - standing(place, known).keys():  # before anything else: nobody is to go on from them
        copies.insist(functools.partial(store.delete, step))
        copies.remove(step)
    known = copies.known
    if not standing(place, {ref.step: ref.manifest_crc32c}):
        raise DamagedError(f"step {ref.step} was rolled back before it was published")
    if known.get(ref.step) == ref.manifest_crc32c:
        return already_done(PublishedRef(step=ref.step, url=store.address), f"step {ref.step} is published")
    folder = place.checkpoints / manifest.name_of(ref.step)
    others = beside(place, Path(data.path), newest=max([ref.step, *known]))  # one made again must not take rows from newer ones

    def publish() -> str:
        if not (folder / manifest.NAME).exists() or not standing(place, {ref.step: ref.manifest_crc32c}):
            # A copy that was begun may fail because of this, and would fail for ever.
            raise DamagedError(f"checkpoint {ref.step} is no longer here: it was rolled back or removed before it was published")
        return store.publish(ref.step, folder, others)

    try:
        url = copies.insist(publish)
    except DamagedError:
        stands = folder.exists() and standing(place, {ref.step: ref.manifest_crc32c})
        # The run does not need it; kept here, no end of the run would be well.
        if stands and ref.step < manifest.steps_in(place.checkpoints)[-1]:
            set_aside(place, ref.step, manifest.problems(folder, ref.step))
        raise
    copies.add(ref.step, ref.manifest_crc32c)
    shown = os.path.relpath(url, place.path) if Path(url).is_relative_to(place.path) else url
    place.event("published", step=ref.step, url=shown, manifest_crc32c=ref.manifest_crc32c)
    log.info("published step %d to %s", ref.step, url)
    return PublishedRef(step=ref.step, url=url)


def beside(run_dir: RunDir, data: Path, *, newest: int) -> dict[str, bytes | Path]:
    """What another machine needs besides a checkpoint to go on, by its name in the store: rows up to step `newest`, and more."""
    history = [row for row in rows.read(run_dir.metrics) if row["step"] <= newest]
    return {
        "config.json": run_dir.config,
        "run.json": run_dir.identity,
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in history).encode(),
        "tokenizer.json": data / "tokenizer.json",
        "data.json": data / "manifest.json",
    }


@task(task_run_name="withdraw", cache_policy=NO_CACHE)
def withdraw_copies(config: RunConfig, steps: dict[int, str], run_dir: str) -> None:
    """Remove copies that nothing keeps, given by the crc32c of their manifests. One that stays is tried again with the next."""
    copies = current().copies
    store = store_of(config, RunDir(run_dir), cut_off=lambda: copies.closed)
    assert store is not None
    for step, crc in steps.items():
        try:
            store.delete(step)
        except StorageError as e:
            copies.add(step, crc)
            log.warning("the copy of step %d is not removed: %s", step, e)


def bring_back(config: RunConfig, run_dir: RunDir) -> list[int]:
    """Put published copies in the place of committed checkpoints that are damaged, or of all where none is whole; their steps.

    The newest whole checkpoint is where a run goes on from, so only newer ones and the best are looked at.
    """
    store = store_of(config, run_dir, stall=PATIENCE)
    if store is None:
        return []
    whole = manifest.newest_whole(run_dir.checkpoints)
    here = manifest.steps_in(run_dir.checkpoints)
    wanted = {step for step in here if whole is None or step > whole.step} | ({best_of(config, run_dir)} & set(here))
    # What was never committed has no copy: training makes it.
    lost = {step for step in wanted if step is not None and _is_damaged(run_dir, step)}
    forgotten = whole is None and bool(rows.read(run_dir.metrics))
    if not (lost or forgotten):
        return []  # the usual case, in which the store is not asked
    try:
        published = store.published()
    except StorageError as e:
        if whole is None:
            raise
        log.warning("%s; the run goes on from step %d, which is whole here", e, whole.step)
        return []
    published = standing(run_dir, published)
    if forgotten:
        lost |= set(list(published)[-1:])
    back = []
    for step in sorted(lost & published.keys()):
        try:
            fetch_copy(run_dir, store, step)
        except StorageError as e:
            log.warning("%s", e)
            continue
        back.append(step)
    return back


def fetch_copy(run_dir: RunDir, store: Store, step: int) -> None:
    """Put the published copy of a step in the place of its checkpoint, which is set aside. Raises StorageError."""
    folder = run_dir.checkpoints / manifest.name_of(step)
    if folder.exists():
        set_aside(run_dir, step, manifest.problems(folder, step))
    run_dir.checkpoints.mkdir(exist_ok=True)
    store.fetch(step, folder)
    run_dir.event("repaired", step=step, source="published")
    log.warning("checkpoint %d was damaged and is brought back from its published copy", step)


def _is_damaged(run_dir: RunDir, step: int) -> bool:
    folder = run_dir.checkpoints / manifest.name_of(step)
    return (folder / manifest.NAME).exists() and bool(manifest.problems(folder, step))


def set_aside(run_dir: RunDir, step: int, wrong: list[str]) -> None:
    """Move a damaged checkpoint to damaged/, where nothing reads it."""
    damaged = run_dir.path / "damaged"
    damaged.mkdir(exist_ok=True)
    target = next(t for n in itertools.count(1) if not (t := damaged / f"{step}-{n}").exists())
    os.rename(run_dir.checkpoints / manifest.name_of(step), target)
    log.warning("checkpoint %d was set aside in damaged/%s: %s", step, target.name, "; ".join(wrong[:3]))


def tidy(config: RunConfig, run_dir: RunDir, published: Mapping[int, str]) -> list[int]:
    """Remove the checkpoints that nothing keeps; returns their steps, and those of copies that nothing keeps. Never the newest or best.

    `published` are the copies that are known of; what is not known to have one is kept. What is set aside is kept to its quota.
    """
    here = set(manifest.steps_in(run_dir.checkpoints))
    published = standing(run_dir, published)
    gone = nothing_keeps(config, run_dir, published)
    trash = run_dir.checkpoints / TRASH
    shutil.rmtree(trash, ignore_errors=True)
    for step in here.intersection(gone):
        trash.mkdir(exist_ok=True)
        os.rename(run_dir.checkpoints / manifest.name_of(step), trash / manifest.name_of(step))
    shutil.rmtree(trash, ignore_errors=True)
    if isinstance(store := store_of(config, run_dir), LocalStore):
        store.clear_deleted()
    keep_to_quota(config, run_dir)
    return gone


def nothing_keeps(config: RunConfig, run_dir: RunDir, published: Mapping[int, str]) -> list[int]:
    """The steps that have a checkpoint, or a copy among the `published`, and that nothing keeps, oldest first."""
    here = set(manifest.steps_in(run_dir.checkpoints))
    publishes = config.publish.kind != "none"
    # Only ends of chunks are published. A copy of an earlier training of the step does not count.
    waiting = {step for step in here & set(chunk_ends(config)) if not is_published(run_dir, step, published)} if publishes else set()
    # A copy whose original was set aside as damaged counts like one that is here: it is what can repair it.
    steps = sorted(here | published.keys())
    reach = config.trainer.spike.steps_before if config.trainer.on_spike == "rollback" else 0
    return steps_to_delete(steps, best=best_of(config, run_dir), unpublished=waiting, config=config.checkpoint, reach=reach)


def standing(run_dir: RunDir, copies: Mapping[int, str]) -> dict[int, str]:
    """Those of some copies, given by the crc32c of their manifests, that are of no commit that was rolled back."""
    rolled_back = abandoned_copies(run_dir)
    return {step: crc for step, crc in copies.items() if crc not in rolled_back.get(step, ())}


def is_published(run_dir: RunDir, step: int, published: Mapping[int, str]) -> bool:
    """Whether the copy of a step is of the very checkpoint that is here."""
    try:
        return published.get(step) == manifest.own_crc(run_dir.checkpoints / manifest.name_of(step))
    except (OSError, ValueError, KeyError):
        return False
