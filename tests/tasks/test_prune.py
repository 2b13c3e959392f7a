"""What nothing keeps is found and removed, and nothing else is."""

import os

import pytest

from tasks.aside import keep_to_quota
from tasks.prune import prune
from tasks.publish import tidy
from trainer import manifest
from trainer.errors import RunDirError
from trainer.rows import Rows
from trainer.rundir import WriterLock


def litter(run_dir, store):
    """Leave behind what kills, damages and rollbacks do; the paths."""
    left = [
        run_dir.path / "damaged" / "20-1",
        run_dir.path / "abandoned" / "40",
        run_dir.checkpoints / ".trash",
        run_dir.checkpoints / ".part-00000050",
        store.checkpoints / ".part-00000030",
        store.checkpoints / ".part-00000010-deleted",
    ]
    for i, folder in enumerate(left):
        folder.mkdir(parents=True)
        (folder / "data").write_bytes(b"x" * 1000)
        os.utime(folder, (1000 + i, 1000 + i))
    (run_dir.path / "config.json.part").write_bytes(b"{")
    return [*left, run_dir.path / "config.json.part"]


def names(items):
    return {os.path.basename(item.path) for item in items}


def test_what_nothing_keeps_goes_and_the_newest_the_best_and_what_waits_for_its_copy_stay(place):
    _, run_dir, store = place([0, 10, 20, 30, 40, 50], [10, 20, 40, 50])
    Rows(run_dir.metrics).append("val", 20, {"loss": 1.0})
    left = litter(run_dir, store)
    shown, _ = prune(run_dir.path, dry=True)
    assert all(p.exists() for p in left) and manifest.steps_in(run_dir.checkpoints) == [0, 10, 20, 30, 40, 50]
    items, notes = prune(run_dir.path)
    assert [i.to_dict() for i in items] == [i.to_dict() for i in shown] and not notes
    assert names(items) == {p.name for p in left} | {manifest.name_of(0), manifest.name_of(10)}
    assert sum(item.bytes for item in items) >= 8 * 1000
    assert not any(p.exists() for p in left)
    assert manifest.steps_in(run_dir.checkpoints) == [20, 30, 40, 50] and list(store.published()) == [20, 40, 50]
    assert prune(run_dir.path) == ([], [])


def test_the_newest_whole_checkpoint_stays_where_newer_ones_are_damaged_and_without_one_so_does_what_is_aside(place):
    _, run_dir, store = place([10, 20, 30], [10, 20, 30])
    left = litter(run_dir, store)
    for step in (20, 30):
        (run_dir.checkpoints / manifest.name_of(step) / "params" / "data").write_bytes(b"x")
    prune(run_dir.path)
    assert manifest.newest_whole(run_dir.checkpoints).step == 10
    left[0].mkdir(parents=True)
    (run_dir.checkpoints / manifest.name_of(10) / "params" / "data").write_bytes(b"x")
    _, notes = prune(run_dir.path)
    assert left[0].exists() and "no checkpoint is whole" in notes[0]


def test_a_run_that_is_being_trained_is_not_pruned_and_a_store_that_is_away_keeps_what_may_not_be_published(place, gcs):
    _, run_dir, _ = place([0, 10, 20, 30], [10, 20, 30], "publish.kind=gcs", "publish.url=gs://bucket/runs")
    gcs.fault = lambda method, path: "503"
    items, notes = prune(run_dir.path)
    assert names(items) == {manifest.name_of(0)} and "503" in notes[0]
    gcs.fault = lambda method, path: None
    items, _ = prune(run_dir.path)
    assert [item.what for item in items] == ["checkpoint", "copy"] and manifest.steps_in(run_dir.checkpoints) == [20, 30]
    lock = WriterLock(run_dir)
    lock.acquire()
    try:
        with pytest.raises(RunDirError, match="being written"):
            prune(run_dir.path)
    finally:
        lock.release()


def test_tidy_keeps_what_is_aside_to_its_quota_the_oldest_first_and_forgets_deletions_that_were_cut_off(place, caplog):
    config, run_dir, store = place([10, 20], [10, 20], "checkpoint.quota_gb=0.0000015")
    left = litter(run_dir, store)
    tidy(config, run_dir, store.published())
    assert [p.exists() for p in left[:2]] == [False, True] and not left[5].exists() and left[4].exists()
    assert "damaged/20-1 removed" in caplog.text and "quota_gb=1.5e-06" in caplog.text
    assert keep_to_quota(config, run_dir) == []


def test_without_a_whole_checkpoint_the_quota_removes_nothing_and_a_run_may_change_it(place):
    from configs.run import config_digest, resume_conflicts

    config, run_dir, store = place([10], [], "checkpoint.quota_gb=0")
    other = config.replace(checkpoint=config.checkpoint.replace(quota_gb=None))
    assert not resume_conflicts(config, other) and config_digest(config) == config_digest(other)
    left = litter(run_dir, store)
    (run_dir.checkpoints / manifest.name_of(10) / "params" / "data").write_bytes(b"x")
    assert keep_to_quota(config, run_dir) == [] and left[0].exists()
    assert keep_to_quota(other, run_dir) == []
