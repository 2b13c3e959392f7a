"""Uploads in the background, beside training that may go back and make the same steps again."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from tasks import copies, uploads
from tasks.publish import is_published, publish_checkpoint
from tasks.refs import DataRef
from tasks.stores import LocalStore
from tasks.summary import commit_of
from tasks.uploads import Uploads
from tasks.writer import writing
from trainer import ledger, manifest
from trainer.errors import StorageError


@pytest.fixture(autouse=True)
def at_hand(monkeypatch):
    """One thread that publishes, as in a flow, without the server that a flow needs; short pauses."""
    pool = ThreadPoolExecutor(1)

    def submit(*args):
        future = pool.submit(publish_checkpoint.fn, *args)
        return SimpleNamespace(wrapped_future=future, result=future.result)

    monkeypatch.setattr(uploads, "publish_checkpoint", SimpleNamespace(submit=submit))
    monkeypatch.setattr(copies, "STORE_DELAYS", [0.01])
    yield
    pool.shutdown()


def data(run_dir):
    for name in ("tokenizer.json", "manifest.json"):
        run_dir.path.joinpath(name).write_text("{}")
    return DataRef(path=str(run_dir.path), digest="none")


def train_again(run_dir, step):
    """What a rollback does to a commit, and the commit that comes in its place."""
    folder, ref = run_dir.checkpoints / manifest.name_of(step), commit_of(run_dir, step)
    run_dir.event(ledger.EVENT, abandoned={str(step): ref.manifest_crc32c})
    folder.rename(run_dir.path / f"abandoned-{step}")
    folder.mkdir()
    (folder / "data").write_bytes(b"trained again")
    manifest.write(folder, step)


@pytest.mark.parametrize("fails", [True, False], ids=["in the middle of a copy", "when all was copied"])
def test_a_step_that_is_trained_again_while_its_copy_is_under_way_is_published_as_it_is_now(place, micro, monkeypatch, fails):
    config, run_dir, store = place([10, 20])
    publish, begun, again = LocalStore.publish, threading.Event(), threading.Event()

    def publish_slowly(self, step, *args):
        monkeypatch.setattr(LocalStore, "publish", publish)
        url = None if fails else publish(self, step, *args)
        begun.set()
        again.wait(10)
        if url is None:
            raise StorageError("files went away")
        return url

    monkeypatch.setattr(LocalStore, "publish", publish_slowly)
    with writing(config, run_dir.path) as writer, Uploads(config, writer) as running:
        running.begin(data(run_dir), commit_of(run_dir, 20))
        assert begun.wait(10)
        train_again(run_dir, 10)
        running.submit(commit_of(run_dir, 10))
        running.submit(commit_of(run_dir, 20))
        again.set()
        assert running.finish() is None
    assert all(is_published(run_dir, step, store.published()) for step in (10, 20))


def test_a_copy_of_what_was_removed_meanwhile_is_given_up(place, monkeypatch):
    config, run_dir, store = place([10, 20])
    publish = LocalStore.publish

    def publish_what_goes(self, step, *args):
        if step == 10:
            (run_dir.checkpoints / manifest.name_of(10)).rename(run_dir.path / "gone")
            raise StorageError("files went away")
        return publish(self, step, *args)

    monkeypatch.setattr(LocalStore, "publish", publish_what_goes)
    with writing(config, run_dir.path) as writer, Uploads(config, writer) as running:
        running.begin(data(run_dir), commit_of(run_dir, 20))
        running.submit(commit_of(run_dir, 20))
        assert running.finish() is None
    assert list(store.published()) == [20]


def test_a_newest_checkpoint_that_cannot_be_published_is_named_at_the_end(place):
    config, run_dir, store = place([10, 20])
    with writing(config, run_dir.path) as writer, Uploads(config, writer) as running:
        running.begin(data(run_dir), commit_of(run_dir, 20))
        ref = commit_of(run_dir, 20)
        (run_dir.checkpoints / manifest.name_of(20) / manifest.NAME).write_text("{")
        running.submit(ref)
        while not running._failed:
            running.look()
            time.sleep(0.01)
        late = running.finish()
    assert str(late).startswith("all is trained, but steps 20 are not published: checkpoint 20 is damaged")
    assert list(store.published()) == [10]
