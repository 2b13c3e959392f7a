"""No damage of a checkpoint's files passes unseen; `make damages` tries 10,000."""

import json

import pytest

from tests.faults.damages import OTHER, STEP, campaign, checkpoints
from trainer import manifest
from trainer.files import crc32c, seal


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("damages")
    checkpoints(run_dir)
    return run_dir


def test_no_damage_passes_unseen(place):
    tried, unseen = campaign(place, trials=300, seed=20)
    assert not unseen and len(tried) > 15


def test_files_that_end_with_their_own_crc32c_have_one_crc32c_and_are_told_apart_by_another_sum(place):
    folders = [place / "checkpoints" / manifest.name_of(step) for step in (STEP, OTHER)]
    mine, other = (folder / "params" / "manifest.ocdbt" for folder in folders)
    data = mine.read_bytes()
    assert data != other.read_bytes() and crc32c(mine) == crc32c(other) and len(data) == other.stat().st_size
    mine.write_bytes(other.read_bytes())
    assert manifest.problems(folders[0], STEP) == ["params/manifest.ocdbt: other bytes (crc32)"]
    mine.write_bytes(data)
    assert not manifest.problems(folders[0], STEP)


def test_a_manifest_of_the_version_before_is_still_read_and_one_of_a_later_version_is_named(place):
    folder = place / "checkpoints" / manifest.name_of(STEP)
    whole = (folder / manifest.NAME).read_bytes()
    files = json.loads(whole)["files"]
    old = {name: {"size": facts["size"], "crc32c": facts["crc32c"]} for name, facts in files.items()}
    (folder / manifest.NAME).write_bytes(seal({"files": old, "step": STEP, "version": 1}))
    assert not manifest.problems(folder, STEP)
    (folder / manifest.NAME).write_bytes(seal({"files": files, "step": STEP, "version": 3}))
    assert "version 3" in manifest.problems(folder, STEP)[0]
    (folder / manifest.NAME).write_bytes(whole)
