"""A disk that fills up in the middle of a run: a typed error, nothing damaged, and the same bits after."""

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from tasks.preparation import prepare
from tasks.stores import LocalStore
from tasks.writer import writing
from tests.faults.points import Harness
from trainer import manifest
from trainer.checkpoint import Checkpoints, verify
from trainer.errors import DiskError, StorageError
from trainer.rows import Rows
from trainer.rundir import RunDir

PAGE = 4096


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A small disk of its own, of which the kernel says when it is full."""
    folder = tmp_path_factory.mktemp("disk")
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("!!! no file system can be mounted here: what a full disk does is NOT tested")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(autouse=True)
def room(disk):
    """After each test there is some again."""
    yield
    (disk / "filler").unlink(missing_ok=True)


@pytest.fixture
def harness(micro):
    config = micro("chunk_steps=3", "checkpoint.keep_latest=2")
    return Harness(config, prepare(config.data), shared.get("trainer"), freezer=None)


shared = {}  # the compiled trainer, and how the run ends where nothing happens


def fill(disk):
    """Take all room there is, to the last page; a file's last page is full as well."""
    for path in disk.rglob("*.jsonl"):
        with open(path, "ab") as f:
            f.write(b"\n" * (-path.stat().st_size % PAGE))
    with contextlib.suppress(OSError), open(disk / "filler", "wb", buffering=0) as f:
        while True:
            f.write(bytes(PAGE))


def whole(harness, folder):
    if "whole" not in shared:
        harness.live(folder / "whole")
        shared["whole"], shared["trainer"] = harness.left(folder / "whole"), harness.trainer
    return shared["whole"]


AT = {  # what is about to be done, and at which call of it
    "save": (Checkpoints, "save", 2),
    "manifest": (manifest, "write", 2),
    "metrics": (Rows, "append", 2),
    "event": (RunDir, "event", 4),
    "publish": (LocalStore, "publish", 1),
}


@pytest.mark.parametrize("what", AT)
def test_a_disk_that_is_full_is_said_damages_nothing_and_with_room_the_run_ends_the_same(harness, disk, tmp_path, monkeypatch, what):
    want, path = whole(harness, tmp_path), disk / what
    place, name, at = AT[what]
    original, calls = getattr(place, name), []

    def filling(*args, **kwargs):
        calls.append(args)
        if len(calls) == at:
            fill(disk)
        return original(*args, **kwargs)

    monkeypatch.setattr(place, name, filling)
    with pytest.raises((DiskError, StorageError)) as error:
        harness.live(path)
    monkeypatch.undo()
    assert (isinstance(error.value, StorageError) and what == "publish") or not error.value.retryable
    assert "room" in str(error.value) or "No space left" in str(error.value)
    os.unlink(disk / "filler")
    assert all(row["ok"] or "never committed" in row["problems"][0] for row in verify(path))
    harness.trainer = shared["trainer"]
    harness.live(path)
    assert harness.left(path) == want


def test_the_trainers_process_says_that_the_disk_is_full_and_is_not_tried_again(micro, disk):
    config = micro("execution.mode=process", "publish.kind=none")
    path = disk / "process"
    with pytest.raises(DiskError, match=r"no room for .*everstep prune.*everstep resume"), writing(config, path) as writer:
        writer.session.data = Path(prepare(config.data).path)
        writer.session.open()
        fill(disk)
        writer.session.train_until(2)
    os.unlink(disk / "filler")
    assert [row["ok"] for row in verify(path) if "never committed" not in str(row["problems"])] == [True]
