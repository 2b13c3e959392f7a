"""The task that copies a commit to the store, and the removal of what nothing keeps any more."""

import json
import logging
import os
import shutil
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from configs.run import RunConfig
from trainer import manifest, rows
from trainer.retention import steps_to_delete
from trainer.rundir import RunDir

from .refs import CheckpointRef, DataRef, PublishedRef, already_done
from .retry import STORE_DELAYS, STORE_RETRIES, can_help
from .summary import best_of, store_of

log = logging.getLogger(__name__)

TRASH = ".trash"


@task(
    task_run_name="publish[{ref.step}]",
    retries=STORE_RETRIES,
    retry_delay_seconds=STORE_DELAYS,
    retry_condition_fn=can_help,
    cache_policy=NO_CACHE,
)
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


def tidy(config: RunConfig, run_dir: RunDir) -> list[int]:
    """Remove the checkpoints that nothing keeps, here and in the store; returns their steps. Never the newest, never the best."""
    here = set(manifest.steps_in(run_dir.checkpoints))
    store = store_of(config, run_dir)
    published = set(store.published()) if store else set()
    # Step 0 can be made again from the config, so it is not published; nothing waits for its copy.
    unpublished = here - published - {0} if store else set()
    # A copy whose original was set aside as damaged counts like one that is here: it is what can repair it.
    gone = steps_to_delete(sorted(here | published), best=best_of(config, run_dir), unpublished=unpublished, config=config.checkpoint)
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
