"""A run from its published copies alone: what another machine needs to go on, brought into a run directory.

config.json is written last, so that a directory in which this was cut off is no run yet, and asking again goes on with it.
"""

import json
import logging
from pathlib import Path
from typing import Any, Literal

from configs.load import parse_config, to_json
from configs.publish import PublishConfig
from configs.run import RunConfig
from trainer import manifest
from trainer.errors import ConfigError, RunDirError
from trainer.files import write_atomic
from trainer.paths import cache_dir
from trainer.rundir import RunDir, WriterLock

from .stores.base import refused
from .stores.gcs import GcsStore, store_at
from .summary import best_of
from .writer import default_run_dir

log = logging.getLogger(__name__)

Weights = Literal["newest", "all", "none"]  # newest: with it the best, which a report is about


def is_address(run: str) -> bool:
    """Whether a run is named by an address and not by a directory."""
    return "://" in run


def adopt(address: str, run_dir: Path | None = None, *, weights: Weights = "newest", trust_code: bool = False) -> Path:
    """The run directory of the run published at `address`, made or brought up to date; what is newer here stays.

    Raises ConfigError for an address that is no bucket's or a config that names code of its own, RunDirError where another run
    lives in the directory, StorageError where nothing is published or the store failed.
    """
    if not address.startswith("gs://"):
        raise ConfigError(f"{address} is no address of a run; give gs://BUCKET/PREFIX/NAME-ID, or a run directory")
    store, identity, text = store_at(address)
    config = _at(store, _parse(text, address, trust_code=trust_code))
    place = RunDir(run_dir or default_run_dir(config))
    lock = WriterLock(place)
    lock.acquire(wait=2.0)
    try:
        _check_place(place, store)
        _fill(place, config, store, identity, weights=weights)
    finally:
        lock.release()
    return place.path


def look_at(address: str, *, weights: Weights = "newest") -> Path:
    """A directory below the cache with what is published at `address`, to be looked at."""
    return adopt(address, cache_dir() / "adopted" / address.rstrip("/").rpartition("/")[2], weights=weights)


def _parse(text: bytes, address: str, *, trust_code: bool) -> RunConfig:
    try:
        return parse_config(text.decode(errors="replace"), f"{address}/config.json", trust_code=trust_code)
    except ConfigError as e:
        raise ConfigError(f"{address}: {e}; if you trust whoever published it: everstep resume {address} --trust-code") from e


def _at(store: GcsStore, config: RunConfig) -> RunConfig:
    """The config of a run that goes on publishing to where it came from, though that may have been moved there."""
    parent, _, name = store.address.rpartition("/")
    if name != f"{config.name}-{store.run_id}":
        log.warning("%s is not named %s-%s; copies will go to %s", store.address, config.name, store.run_id, config.publish.url)
        return config
    here: dict[str, Any] = {"kind": "gcs", "url": parent, "wait_seconds": config.publish.wait_seconds}
    return config if (config.publish.url or "").rstrip("/") == parent else config.replace(publish=PublishConfig(**here))


def _check_place(place: RunDir, store: GcsStore) -> None:
    if place.identity.exists():
        try:
            found = json.loads(place.identity.read_text())["run_id"]
        except (OSError, ValueError, KeyError, TypeError):
            found = "of a name that cannot be read"
        if found != store.run_id:
            raise RunDirError(f"{place.path} holds run {found}, and {store.address} is run {store.run_id}; choose another --run-dir")
    elif place.config.exists() or manifest.steps_in(place.checkpoints):
        raise RunDirError(f"{place.path} holds something of another run; choose another --run-dir")


def _fill(place: RunDir, config: RunConfig, store: GcsStore, identity: bytes, *, weights: Weights) -> None:
    published = store.published()
    if not published:
        raise refused(f"{store.address} has no whole checkpoint yet; go on in the run directory itself, or begin anew")
    newest, here = max(published), manifest.newest_whole(place.checkpoints)
    write_atomic(place.identity, identity)
    if here is None or here.step < newest:
        write_atomic(place.metrics, _rows_of(store, newest))
    if weights != "none":
        wanted = set(published) if weights == "all" else {max(newest, here.step if here else 0), best_of(config, place)}
        for step in sorted(wanted & published.keys(), key=lambda step: step or 0, reverse=True):
            _bring(place, store, step)
    known = {e.get("step"): e.get("manifest_crc32c") for e in place.read_events() if e["event"] == "published"}
    for step, crc in published.items():
        if known.get(step) != crc:
            place.event("published", step=step, url=f"{store.address}/checkpoints/{manifest.name_of(step)}", manifest_crc32c=crc)
    if not place.config.exists():
        write_atomic(place.config, to_json(config).encode())


def _bring(place: RunDir, store: GcsStore, step: int | None) -> None:
    """Have the copy of a step here, unless it is here whole."""
    from .publish import set_aside

    assert step is not None
    folder = place.checkpoints / manifest.name_of(step)
    if folder.exists():
        if not (wrong := manifest.problems(folder, step)):
            return
        set_aside(place, step, wrong)
    place.checkpoints.mkdir(exist_ok=True)
    store.fetch(step, folder)
    place.event("fetched", step=step, url=store.address)
    log.info("fetched checkpoint %d from %s", step, store.address)


def _rows_of(store: GcsStore, step: int) -> bytes:
    """The published metrics up to a step."""
    lines = (store.bucket.read("metrics.jsonl") or b"").splitlines(keepends=True)
    return b"".join(line for line in lines if json.loads(line)["step"] <= step)
