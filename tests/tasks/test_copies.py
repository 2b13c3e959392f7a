"""Patience with a store: it is tried until it is back, and no longer than somebody waits for it."""

import threading
import time

import pytest

from tasks import copies as module
from tasks.copies import Copies
from tasks.stores.base import refused
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
