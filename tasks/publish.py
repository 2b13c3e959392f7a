"""The task that copies a commit to the store, and the removal of what nothing keeps any more."""

import itertools
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from prefect import task

from configs.run import RunConfig, chunk_ends
from trainer import manifest, rows
from trainer.errors import StorageError
from trainer.retention import steps_to_delete
from trainer.rundir import RunDir

from .refs import CheckpointRef, DataRef, PublishedRef, already_done
from .retry import WITH_STORE
from .summary import best_of, store_of

log = logging.getLogger(__name__)

TRASH = ".trash"


@task(task_run_name="publish[{ref.step}]", **WITH_STORE)
def publish_checkpoint(config: RunConfig, ref: CheckpointRef, data: DataRef, run_dir: str) -> PublishedRef:
    """Copy a commit to the store, verified, with what another machine needs to go on from it."""
    place = RunDir(run_dir)
    store = store_of(config, place)
    assert store is not None, "a run that publishes nothing has no task for it"
    if store.published().get(ref.step) == ref.manifest_crc32c:
        return already_done(PublishedRef(step=ref.step, url=str(ref.step)), f"step {ref.step} is published")
    folder = place.checkpoints / manifest.name_of(ref.step)
    history = [row for row in rows.read(place.metrics) if row["step"] <= ref.step]
    others: dict[str, bytes | Path] = {
        "config.json": place.config,
        "run.json": place.identity,
        "metrics.jsonl": "".join(json.dumps(row) + "\n" for row in history).encode(),
        "tokenizer.json": Path(data.path) / "tokenizer.json",
        "data.json": Path(data.path) / "manifest.json",
    }
    url = store.publish(ref.step, folder, others)
    place.event("published", step=ref.step, url=os.path.relpath(url, place.path) if Path(url).is_relative_to(place.path) else url)
    log.info("published step %d to %s", ref.step, url)
    return PublishedRef(step=ref.step, url=url)


def bring_back(config: RunConfig, run_dir: RunDir) -> list[int]:
    """Put published copies in the place of committed checkpoints that are damaged, or of all where none is whole; their steps.

    The newest whole checkpoint is where a run goes on from, so only newer ones and the best are looked at.
    """
    store = store_of(config, run_dir)
    if store is None:
        return []
    whole = manifest.newest_whole(run_dir.checkpoints)
    here = manifest.steps_in(run_dir.checkpoints)
    wanted = {step for step in here if whole is None or step > whole.step} | ({best_of(config, run_dir)} & set(here))
    if whole is None and rows.read(run_dir.metrics):
        wanted |= set(list(store.published())[-1:])
    back = []
    for step in sorted(step for step in wanted & store.published().keys() if step is not None):
        folder = run_dir.checkpoints / manifest.name_of(step)
        wrong = manifest.problems(folder, step)
        if folder.exists() and (not wrong or not (folder / manifest.NAME).exists()):
            continue  # whole, or never committed: training makes it
        try:
            if folder.exists():
                set_aside(run_dir, step, wrong)
            store.fetch(step, folder)
        except StorageError as e:
            log.warning("%s", e)
            continue
        run_dir.event("repaired", step=step, source="published")
        log.warning("checkpoint %d was damaged and is brought back from its published copy", step)
        back.append(step)
    return back


def set_aside(run_dir: RunDir, step: int, wrong: list[str]) -> None:
    """Move a damaged checkpoint to damaged/, where nothing reads it."""
    damaged = run_dir.path / "damaged"
    damaged.mkdir(exist_ok=True)
    target = next(t for n in itertools.count(1) if not (t := damaged / f"{step}-{n}").exists())
    os.rename(run_dir.checkpoints / manifest.name_of(step), target)
    log.warning("checkpoint %d was set aside in damaged/%s: %s", step, target.name, "; ".join(wrong[:3]))


def tidy(config: RunConfig, run_dir: RunDir) -> list[int]:
    """Remove the checkpoints that nothing keeps, here and in the store; returns their steps. Never the newest, never the best."""
    here = set(manifest.steps_in(run_dir.checkpoints))
    store = store_of(config, run_dir)
    published = store.published() if store else {}
    # Only ends of chunks are published. A copy of an earlier training of the step does not count.
    waiting = {step for step in here & set(chunk_ends(config)) if not is_published(run_dir, step, published)} if store else set()
    # A copy whose original was set aside as damaged counts like one that is here: it is what can repair it.
    steps = sorted(here | published.keys())
    gone = steps_to_delete(steps, best=best_of(config, run_dir), unpublished=waiting, config=config.checkpoint)
    trash = run_dir.checkpoints / TRASH
    shutil.rmtree(trash, ignore_errors=True)
    for step in gone:
        if step in here:
            trash.mkdir(exist_ok=True)
            os.rename(run_dir.checkpoints / manifest.name_of(step), trash / manifest.name_of(step))
        if store:
            store.delete(step)
    shutil.rmtree(trash, ignore_errors=True)
    return gone


def is_published(run_dir: RunDir, step: int, published: Mapping[int, str]) -> bool:
    """Whether the copy of a step is of the very checkpoint that is here."""
    try:
        return published.get(step) == manifest.own_crc(run_dir.checkpoints / manifest.name_of(step))
    except (OSError, ValueError, KeyError):
        return False
