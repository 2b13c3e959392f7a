"""What a run directory says of its run: read from files alone, without Prefect and without a trainer."""

import json
import logging
from collections.abc import Callable, Collection
from typing import Any

from configs.run import RunConfig, chunk_ends, config_digest
from trainer import manifest, rows
from trainer.errors import RunDirError, StorageError
from trainer.retention import best_step
from trainer.rundir import RunDir

from .refs import CheckpointRef
from .stores import Store, make_store
from .writer import is_trained, last_step

log = logging.getLogger(__name__)

ANSWER = 15.0  # seconds without progress after which a store counts as away


def store_of(
    config: RunConfig, run_dir: RunDir, *, cut_off: Callable[[], bool] = lambda: False, stall: float | None = None
) -> Store | None:
    """The store that the run is published to; None where it is published nowhere. See make_store on when its calls end."""
    try:
        run_id = json.loads(run_dir.identity.read_text())["run_id"]
    except (OSError, ValueError, KeyError, TypeError) as e:
        raise RunDirError(f"{run_dir.identity} cannot be read ({e}); bring it back from a published copy of the run") from e
    return make_store(config.publish, run_dir, run_name=config.name, run_id=run_id, cut_off=cut_off, stall=stall)


def best_of(config: RunConfig, run_dir: RunDir) -> int | None:
    """The run's best step by its validation rows."""
    found = ((row["step"], rows.values_of(row)) for row in rows.read(run_dir.metrics) if row["split"] == "val")
    return best_step(found, config.checkpoint)


def commit_of(run_dir: RunDir, step: int) -> CheckpointRef:
    """The ref of a committed step."""
    return CheckpointRef(step=step, manifest_crc32c=manifest.own_crc(run_dir.checkpoints / manifest.name_of(step)))


def best_commit(config: RunConfig, run_dir: RunDir, newest: CheckpointRef) -> CheckpointRef:
    """The best step that still has a whole checkpoint; the newest where no validation says which that is."""
    found = [(row["step"], rows.values_of(row)) for row in rows.read(run_dir.metrics) if row["split"] == "val"]
    while (step := best_step(found, config.checkpoint)) is not None:
        folder = run_dir.checkpoints / manifest.name_of(step)
        if not (wrong := manifest.problems(folder, step)):
            return commit_of(run_dir, step)
        log.warning("the best checkpoint, %d, cannot be used: %s; the next best is tested", step, "; ".join(wrong[:3]))
        found = [(at, values) for at, values in found if at != step]
    return newest


def has_test(config: RunConfig) -> bool:
    """Whether the run's data has a test split."""
    return config.data.get("test_fraction") != 0


def is_finished(config: RunConfig, run_dir: RunDir) -> bool:
    """Whether nothing is left to do: the last step is committed and whole, evaluated, published and reported."""
    if not (is_trained(config, run_dir) and run_dir.plot.exists() and run_dir.sample.exists()):
        return False
    try:
        if not run_dir.report.read_text().endswith(report_mark(config)):
            return False
    except OSError:
        return False
    last = last_step(config, run_dir)
    splits = {r["split"] for r in rows.read(run_dir.metrics) if r["step"] == last}
    validated = "val" in splits or last not in chunk_ends(config)
    return validated and ("test" in splits or not has_test(config)) and has_copy(config, run_dir, last)


def has_copy(config: RunConfig, run_dir: RunDir, step: int) -> bool:
    """Whether a step's checkpoint is published, or need not be. Where the store does not answer in time, what is on record counts."""
    store = store_of(config, run_dir, stall=ANSWER)
    if store is None:
        return True
    try:
        return step in store.published()
    except StorageError as e:
        log.warning("%s; whether step %d is published is taken from the run's own events", e, step)
    crc = commit_of(run_dir, step).manifest_crc32c
    done = [e for e in run_dir.read_events() if e["event"] == "published" and e.get("step") == step]
    return bool(done) and done[-1].get("manifest_crc32c") == crc and str(done[-1].get("url", "")).startswith(store.address)


def report_mark(config: RunConfig) -> str:
    """The last line of a report: of which config it is."""
    return f"<!-- config {config_digest(config)} -->\n"


def result_of(config: RunConfig, run_dir: RunDir) -> dict[str, Any]:
    """The result of a run in JSON terms, as `train --json` prints it."""
    found = rows.read(run_dir.metrics)
    vals = {r["step"]: rows.values_of(r) for r in found if r["split"] == "val"}
    steps, last = manifest.steps_in(run_dir.checkpoints), last_step(config, run_dir)
    return {
        "run_dir": str(run_dir.path),
        "status": "done" if steps and steps[-1] == last else "unfinished",
        "step": steps[-1] if steps else None,
        "val": vals[max(vals)] if vals else {},
        "test": next((rows.values_of(r) for r in found if r["split"] == "test" and r["step"] == last), {}),
        "best_step": best_of(config, run_dir),
        "report": str(run_dir.report),
    }


def validations(run_dir: RunDir) -> list[dict[str, Any]]:
    """One row per validation: step, loss, bits per byte, perplexity, accuracy."""
    wanted = ("loss", "bits_per_byte", "perplexity", "accuracy")
    found = [r for r in rows.read(run_dir.metrics) if r["split"] == "val"]
    return [{"step": r["step"], **{k: round(r[k], 4) for k in wanted if r.get(k) is not None}} for r in found]


def checkpoints(config: RunConfig, run_dir: RunDir, published: Collection[int]) -> list[dict[str, Any]]:
    """One row per committed checkpoint: step, size, whether it is among the published and the best."""
    best = best_of(config, run_dir)
    out = []
    for step in manifest.steps_in(run_dir.checkpoints):
        folder = run_dir.checkpoints / manifest.name_of(step)
        size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        out.append({"step": step, "MB": round(size / 1e6, 2), "published": step in published, "best": step == best})
    return out
