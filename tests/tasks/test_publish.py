"""Copies of checkpoints: whole or not there, what repairs a damaged original, and what is removed when."""

import shutil

import pytest

from tasks.publish import bring_back, is_published, tidy
from tasks.stores import LocalStore
from tasks.summary import best_commit, commit_of, store_of
from tasks.writer import writing
from trainer import manifest
from trainer.errors import CheckpointError, DamagedError, RunDirError, StorageError
from trainer.rows import Rows


def damage(run_dir, *steps):
    for step in steps:
        (run_dir.checkpoints / manifest.name_of(step) / "params" / "data").write_bytes(b"x" * 1000)


def test_a_copy_is_the_original_byte_for_byte_and_a_repeat_replaces_it(place):
    _, run_dir, store = place([10], [10])
    assert not manifest.problems(store.checkpoints / manifest.name_of(10), 10)
    assert (store.root / "config.json").read_bytes() == run_dir.config.read_bytes()
    assert is_published(run_dir, 10, store.published())
    shutil.rmtree(run_dir.checkpoints / manifest.name_of(10))
    folder = run_dir.checkpoints / manifest.name_of(10)
    folder.mkdir(parents=True)
    (folder / "other").write_bytes(b"trained again")
    manifest.write(folder, 10)
    assert not is_published(run_dir, 10, store.published())  # a copy of an earlier training does not count
    store.publish(10, folder, {})
    assert is_published(run_dir, 10, store.published())


def test_a_copy_that_does_not_arrive_whole_is_no_copy(place, monkeypatch):
    _, run_dir, store = place([10])
    monkeypatch.setattr("tasks.stores.local.fsync_tree", lambda part: (part / "params" / "data").write_bytes(b"\0" * 1000))
    with pytest.raises(StorageError, match="not whole") as refused:
        store.publish(10, run_dir.checkpoints / manifest.name_of(10), {})
    assert refused.value.retryable and store.published() == {}
    monkeypatch.undo()
    store.publish(10, run_dir.checkpoints / manifest.name_of(10), {})
    assert list(store.published()) == [10]


def test_a_damaged_original_is_not_copied_over_a_good_copy(place):
    _, run_dir, store = place([10], [10])
    damage(run_dir, 10)
    with pytest.raises(DamagedError, match="params/data: other bytes"):
        store.publish(10, run_dir.checkpoints / manifest.name_of(10), {})
    assert list(store.published()) == [10]


def test_a_place_of_another_run_is_refused(place):
    _, run_dir, store = place([10], [10])
    store.root.joinpath("run.json").write_text('{"run_id": "other"}')
    for call in (store.published, lambda: store.publish(10, run_dir.checkpoints / manifest.name_of(10), {})):
        with pytest.raises(StorageError, match="copies of run other"):
            call()


def test_a_bucket_repairs_what_is_damaged_and_where_it_is_away_the_run_goes_on_without(place, gcs):
    config, run_dir, _ = place([10, 20, 30], [10, 20, 30], "publish.kind=gcs", "publish.url=gs://bucket/runs")
    gcs.log.clear()
    assert bring_back(config, run_dir) == [] and not gcs.log, "where all is whole the store is not asked"
    damage(run_dir, 30)
    gcs.fault = lambda method, path: "503"
    assert bring_back(config, run_dir) == []
    gcs.fault = lambda method, path: None
    assert bring_back(config, run_dir) == [30]
    assert manifest.newest_whole(run_dir.checkpoints).step == 30
    damage(run_dir, 10, 20, 30)
    gcs.fault = lambda method, path: "503"
    Rows(run_dir.metrics).append("val", 30, {"loss": 1.0})
    with pytest.raises(StorageError, match="503"):  # without a whole one here nothing is begun anew
        bring_back(config, run_dir)


def test_a_folder_that_cannot_be_written_is_a_retryable_error_with_its_name(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="file"):
        LocalStore(tmp_path / "file", run_id="r").publish(1, tmp_path, {})


def test_the_newest_the_best_and_what_waits_for_its_copy_stay_and_copies_go_with_their_originals(place):
    config, run_dir, store = place([0, 10, 20, 30, 40, 50], [10, 20, 40, 50])
    rows = Rows(run_dir.metrics)
    for step, loss in [(10, 3.0), (20, 1.0), (30, 2.0), (40, 2.5), (50, 2.5)]:
        rows.append("val", step, {"loss": loss})
    assert tidy(config, run_dir, store.published()) == [0, 10]
    assert manifest.steps_in(run_dir.checkpoints) == [20, 30, 40, 50]  # best, unpublished, the newest two
    store.delete(10)
    assert sorted(store.published()) == [20, 40, 50]
    assert tidy(config, run_dir, {}) == [], "what is not known to have a copy is kept"


def test_commits_within_a_chunk_are_not_kept_for_ever(place):
    config, run_dir, store = place([10, 13, 16, 20], [10, 20])
    assert tidy(config, run_dir, store.published()) == [10, 13]


def test_a_damaged_newest_checkpoint_is_brought_back_from_its_copy(place):
    config, run_dir, _ = place([10, 20, 30], [10, 20, 30])
    before = manifest.own_crc(run_dir.checkpoints / manifest.name_of(30))
    damage(run_dir, 30)
    assert bring_back(config, run_dir) == [30]
    assert manifest.newest_whole(run_dir.checkpoints) == manifest.Commit(30, before)
    assert (run_dir.path / "damaged" / "30-1").is_dir()


def test_where_nothing_is_whole_the_copies_are_brought_back_and_what_was_never_committed_is_not(place):
    config, run_dir, store = place([10, 20, 30], [10, 20, 30])
    damage(run_dir, 10, 20, 30)
    (store.checkpoints / manifest.name_of(30) / "params" / "data").write_bytes(b"y" * 1000)  # the newest copy is damaged too
    (run_dir.checkpoints / manifest.name_of(40)).mkdir()
    assert bring_back(config, run_dir) == [10, 20]
    assert manifest.newest_whole(run_dir.checkpoints).step == 20


def test_a_damaged_best_is_brought_back_and_where_that_cannot_be_the_next_best_is_taken(place):
    config, run_dir, _ = place([10, 20, 30], [10, 20, 30])
    rows = Rows(run_dir.metrics)
    for step, loss in [(10, 1.0), (20, 2.0), (30, 3.0)]:
        rows.append("val", step, {"loss": loss})
    newest = commit_of(run_dir, 30)
    damage(run_dir, 10)
    assert best_commit(config, run_dir, newest).step == 20
    assert bring_back(config, run_dir) == [10]
    assert best_commit(config, run_dir, newest).step == 10


def test_a_run_whose_checkpoints_are_all_damaged_and_nowhere_copied_is_refused_not_begun_anew(micro, tmp_path):
    from pathlib import Path

    from tasks.preparation import prepare

    config = micro("publish.kind=none")

    def open_run():
        with writing(config, tmp_path / "run") as writer:
            writer.session.data = Path(prepare(config.data).path)
            writer.session.open()
            return writer

    writer = open_run()
    folder = writer.run_dir.checkpoints / manifest.name_of(0)
    victim = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1])
    for _ in range(2):  # also when asked again
        with pytest.raises(CheckpointError, match="begin anew"):
            open_run()
    assert list((tmp_path / "run" / "damaged").iterdir())


def test_a_run_without_its_name_in_the_store_is_refused_with_a_way_out(place, micro, tmp_path):
    config, run_dir, _ = place([10])
    run_dir.identity.write_text("{")
    with pytest.raises(RunDirError, match="published copy"):
        store_of(config, run_dir)
