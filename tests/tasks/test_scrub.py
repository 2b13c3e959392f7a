"""Checkpoints and copies repair each other; what is trained is only read, and what nothing is known of is not believed."""

import os
import shutil

import pytest

from tasks.scrub import runs_under, scrub
from trainer import manifest
from trainer.rundir import WriterLock


@pytest.fixture
def run(place):
    """A run with three published checkpoints; damages may be done to either side, by step."""
    config, run_dir, store = place([10, 20, 30], [10, 20, 30])
    for step, crc in store.published().items():
        run_dir.event("published", step=step, url="published", manifest_crc32c=crc)
    return config, run_dir, store


def data(root, step):
    return root / manifest.name_of(step) / "params" / "data"


def rows(found):
    return {row.step: (row.local, row.copy, row.ok, row.done) for row in found.steps}


def whole(run_dir, store):
    return [s for s in manifest.steps_in(run_dir.checkpoints) if not manifest.problems(run_dir.checkpoints / manifest.name_of(s), s)], [
        s for s, wrong in store.check().items() if not wrong
    ]


def test_where_all_is_whole_nothing_is_done(run):
    _, run_dir, _ = run
    before = sorted((p, p.stat().st_mtime_ns) for p in run_dir.path.rglob("*") if p.is_file() and p != run_dir.lock)
    found = scrub(run_dir.path)
    assert found.ok and rows(found) == dict.fromkeys((10, 20, 30), ("ok", "ok", True, ""))
    assert sorted((p, p.stat().st_mtime_ns) for p in run_dir.path.rglob("*") if p.is_file() and p != run_dir.lock) == before


def test_each_side_is_repaired_from_the_other_and_what_both_lost_is_said(run):
    _, run_dir, store = run
    data(run_dir.checkpoints, 10).write_bytes(b"x" * 1000)
    data(store.checkpoints, 20).write_bytes(b"x" * 1000)
    data(run_dir.checkpoints, 30).unlink()
    data(store.checkpoints, 30).unlink()
    found = scrub(run_dir.path)
    assert rows(found) == {
        10: ("damaged", "ok", True, "brought back from its copy"),
        20: ("ok", "damaged", True, "published again"),
        30: ("damaged", "damaged", False, "nothing: neither it nor its copy is whole"),
    }
    assert not found.ok and whole(run_dir, store) == ([10, 20], [10, 20])
    assert (run_dir.path / "damaged" / "10-1").is_dir()
    assert [(e["step"], e["source"]) for e in run_dir.read_events() if e["event"] == "repaired"] == [(10, "published"), (20, "local")]
    assert rows(scrub(run_dir.path))[10] == ("ok", "ok", True, "")


def test_a_copy_that_is_gone_is_made_again_and_so_is_a_checkpoint(run):
    _, run_dir, store = run
    shutil.rmtree(store.checkpoints / manifest.name_of(10))
    (store.checkpoints / manifest.name_of(20) / manifest.NAME).unlink()
    shutil.rmtree(run_dir.checkpoints / manifest.name_of(30))
    found = scrub(run_dir.path)
    assert found.ok and [rows(found)[s][3] for s in (10, 20, 30)] == ["published again", "published again", "brought back from its copy"]
    assert whole(run_dir, store) == ([10, 20, 30], [10, 20, 30])


def test_a_copy_of_another_training_of_the_step_repairs_nothing_and_is_replaced(run):
    _, run_dir, store = run
    for step in (20, 30):
        folder = run_dir.checkpoints / manifest.name_of(step)
        data(run_dir.checkpoints, step).write_bytes(b"trained again")
        manifest.write(folder, step)
    data(run_dir.checkpoints, 30).write_bytes(b"then damaged.")
    found = scrub(run_dir.path)
    assert rows(found)[20] == ("ok", "missing", True, "published again")
    assert rows(found)[30][0] == "damaged" and not rows(found)[30][2]
    assert data(store.checkpoints, 20).read_bytes() == b"trained again"


def test_what_was_never_committed_is_not_brought_back_from_a_course_that_was_left(run):
    _, run_dir, _ = run
    run_dir.event("restored", step=10, seconds=0.1)
    shutil.rmtree(run_dir.checkpoints / manifest.name_of(20))
    (run_dir.checkpoints / manifest.name_of(30) / manifest.NAME).unlink()
    assert [row.step for row in scrub(run_dir.path).steps] == [10]


def test_a_run_that_is_being_trained_is_only_read(run):
    _, run_dir, store = run
    data(run_dir.checkpoints, 10).write_bytes(b"x" * 1000)
    shutil.rmtree(store.checkpoints / manifest.name_of(20))
    lock = WriterLock(run_dir)
    lock.acquire()
    try:
        found = scrub(run_dir.path)
    finally:
        lock.release()
    assert not found.ok and rows(found)[10] == ("damaged", "ok", False, "") and rows(found)[20] == ("ok", "none", True, "")
    assert str(os.getpid()) in found.notes[0] and not (run_dir.path / "damaged").exists()


def test_a_bucket_and_a_run_directory_repair_each_other_and_a_bucket_that_is_away_is_said(place, gcs):
    _, run_dir, store = place([10, 20, 30], [10, 20, 30], "publish.kind=gcs", "publish.url=gs://bucket/runs")
    prefix = store.address.removeprefix("gs://bucket/") + "/checkpoints/"
    objects = gcs.buckets["bucket"]
    objects[f"{prefix}{manifest.name_of(10)}/params/data"] = b"x" * 1000
    del objects[f"{prefix}{manifest.name_of(20)}/params/data"]
    data(run_dir.checkpoints, 30).unlink()
    assert scrub(run_dir.path).ok and whole(run_dir, store) == ([10, 20, 30], [10, 20, 30])
    objects[f"{prefix}{manifest.name_of(40)}/params/data"] = b"x"
    assert list(store.clear({40})) == [] and list(store.clear(set(), dry=True)) == list(store.clear(set())) != []
    assert whole(run_dir, store) == ([10, 20, 30], [10, 20, 30])
    gcs.fault = lambda method, path: "503"
    found = scrub(run_dir.path)
    assert not found.ok and "503" in found.notes[0] and all(row.ok for row in found.steps)


def test_the_flow_looks_at_all_runs_and_fails_where_something_stays_damaged(run, api_url):
    from flows.scrub import scrub as flow
    from trainer.errors import CheckpointError

    _, run_dir, store = run
    assert runs_under(run_dir.path.parent) == [run_dir.path]
    data(run_dir.checkpoints, 10).write_bytes(b"x" * 1000)
    (found,) = flow(str(run_dir.path.parent))
    assert found["ok"] and found["steps"][0]["done"] == "brought back from its copy"
    for root in (run_dir.checkpoints, store.checkpoints):
        data(root, 10).unlink()
    with pytest.raises(CheckpointError, match=run_dir.path.name):
        flow(str(run_dir.path.parent))
