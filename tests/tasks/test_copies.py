"""Patience with a store: it is tried until it is back, and no longer than somebody waits for it."""

import threading
import time
from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from tasks import copies as module
from tasks.copies import Copies
from tasks.refs import CheckpointRef, DataRef
from tasks.stores.base import refused
from tasks.uploads import Uploads
from tasks.writer import writing
from trainer.errors import StorageError


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(module, "STORE_DELAYS", [0.01, 0.02])


def failing(times, error):
    left = [times]

    def work():
        left[0] -= 1
        if left[0] >= 0:
            raise error()
        return "done"

    return work


def test_a_store_that_is_away_is_tried_until_it_is_back_also_where_it_refuses(caplog):
    copies = Copies()
    for error in (lambda: StorageError("away"), lambda: refused("no rights")):
        assert copies.insist(failing(20, error)) == "done" and copies.trouble is None
    assert "away" in caplog.text


def test_at_the_end_what_does_not_pass_by_itself_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(module, "STORE_DELAYS", [60.0])
    copies, found = Copies(), []

    def insist():
        try:
            copies.insist(failing(9, lambda: refused("no rights")))
        except StorageError as e:
            found.append(e)

    thread = threading.Thread(target=insist)
    thread.start()
    while copies.trouble is None:
        time.sleep(0.01)
    copies.hurry()
    thread.join(5)
    assert not thread.is_alive() and found[0].args == ("no rights",)


def test_closing_cuts_a_pause_off():
    copies = Copies()
    threading.Timer(0.1, copies.close).start()
    began = time.monotonic()
    with pytest.raises(StorageError, match="away"):
        copies.insist(failing(10**9, lambda: StorageError("away")))
    assert time.monotonic() - began < 5


def test_what_is_told_is_why_the_store_failed_and_not_that_it_was_cut_off():
    copies, errors = Copies(), iter([StorageError("away"), StorageError("cut off")])

    def work():
        error = next(errors)
        if "cut" in str(error):
            copies.close()
        raise error

    with pytest.raises(StorageError, match="cut off"):
        copies.insist(work)
    assert str(copies.trouble) == "away"


def test_nothing_counts_as_published_before_the_store_was_asked():
    class Store:
        def published(self):
            return {10: "abc"}

    copies = Copies()
    assert copies.known == {}
    assert copies.ask(Store()) == copies.known == {10: "abc"}
    copies.add(20, "def")
    copies.remove(10)
    assert copies.ask(Store()) == {20: "def"}, "it is asked once"


def test_a_step_that_is_trained_again_while_its_old_copy_is_on_the_way_is_published_behind_it(monkeypatch, micro, tmp_path):
    flights = []

    class Flight:
        def __init__(self, ref):
            self.ref, self.wrapped_future = ref, Future()
            self.result = self.wrapped_future.result

    def submit(config, ref, data, run_dir):
        flights.append(Flight(ref))
        return flights[-1]

    monkeypatch.setattr("tasks.uploads.publish_checkpoint", SimpleNamespace(submit=submit))
    with writing(micro(), tmp_path / "run") as writer:
        uploads = Uploads(writer.config, writer)
        uploads.begin(DataRef(path="data", digest="d"), CheckpointRef(step=0, manifest_crc32c="0"))
        old, new = (CheckpointRef(step=2, manifest_crc32c=crc) for crc in "ab")
        for ref in (old, old, new):
            uploads.submit(ref)
        assert [f.ref for f in flights] == [old]
        flights[0].wrapped_future.set_result(None)
        uploads._settle_done()
        assert [f.ref for f in flights] == [old, new]
        flights[1].wrapped_future.set_result(None)
        uploads._settle_done()
        assert len(flights) == 2 and not uploads._flying
