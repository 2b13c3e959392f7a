"""Copies in a bucket: whole or not there whatever the network does, sent once, and every refusal explained."""

import json
import os
import random
import threading
import time

import pytest

from tasks.stores import GcsStore
from tasks.stores.gcs import store_at
from tests.faults.gcs import ACTIONS
from trainer import manifest
from trainer.errors import DamagedError, StorageError

URL = "gs://bucket/runs/mine-r1"
FOLDER = "runs/mine-r1/checkpoints/00000010"


def checkpoint(folder, files, step=10):
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    manifest.write(folder, step)
    return folder


def others(run_id="r1"):
    return {"run.json": json.dumps({"run_id": run_id}).encode(), "config.json": b"{}", "metrics.jsonl": b'{"step": 1}\n' * 9}


def names(gcs):
    return {name.removeprefix("runs/mine-r1/") for name in gcs.buckets["bucket"]}


def sent(gcs):
    return [path for method, path in gcs.log if method == "POST" and "upload_id" not in path]


def test_a_copy_has_the_layout_of_the_run_directory_and_its_marker_comes_last(gcs, tmp_path):
    folder = checkpoint(tmp_path / "a", {"params/d/0": b"x" * 9000, "meta/metadata": b"{}", "empty": b"", "odd": b"\r\n--==0==--\r\n\n"})
    store = GcsStore(URL, run_id="r1")
    assert store.published() == {} and store.publish(10, folder, others()) == f"gs://bucket/{FOLDER}"
    inside = {"params/d/0", "meta/metadata", "empty", "odd", "commit_success.txt", "MANIFEST.json"}
    assert names(gcs) == {f"checkpoints/00000010/{name}" for name in inside} | others().keys()
    writes = list(gcs.buckets["bucket"])  # in the order in which they came
    assert writes[-2:] == [f"{FOLDER}/commit_success.txt", f"{FOLDER}/MANIFEST.json"]
    assert store.published() == {10: manifest.own_crc(folder)}
    store.fetch(10, tmp_path / "b")
    assert not manifest.problems(tmp_path / "b", 10) and not (tmp_path / "b" / "commit_success.txt").exists()
    store.delete(10)
    deleted = [path for method, path in gcs.log if method == "DELETE"]
    assert "MANIFEST.json" in deleted[0] and names(gcs) == others().keys()


def test_what_lies_there_whole_is_not_sent_again_and_a_step_trained_again_replaces_its_copy(gcs, tmp_path):
    files = {"a": b"a" * 5000, "b": b"b" * 5000, "c": b"c" * 5000}
    folder = checkpoint(tmp_path / "one", files)
    store = GcsStore(URL, run_id="r1")
    gcs.fault = lambda method, path: "500" if len(sent(gcs)) > 2 else None
    with pytest.raises(StorageError):
        store.publish(10, folder, others())
    there = {name for name in files if gcs.buckets["bucket"].get(f"{FOLDER}/{name}") == files[name]}
    assert there and store_is_empty(gcs)
    gcs.fault = lambda method, path: None
    gcs.log.clear()
    store.publish(10, folder, others())
    assert len(sent(gcs)) == 3 - len(there) + 3 + 2  # what was missing, the others, the two marks
    gcs.log.clear()
    store.publish(10, folder, others())
    assert not sent(gcs)
    again = checkpoint(tmp_path / "two", {"a": files["a"], "d": b"d" * 5000})
    store.publish(10, again, others())
    assert store.published() == {10: manifest.own_crc(again)}
    assert {n for n in names(gcs) if "00000010" in n} == {
        f"checkpoints/00000010/{n}" for n in ("a", "d", "commit_success.txt", "MANIFEST.json")
    }
    gcs.buckets["bucket"][f"{FOLDER}/d"] = b"D" * 5000
    assert store.published() == {}, "a copy that is damaged since is none"


def store_is_empty(gcs):
    return f"{FOLDER}/MANIFEST.json" not in gcs.buckets["bucket"]


def test_a_damaged_original_is_not_published(gcs, tmp_path):
    folder = checkpoint(tmp_path / "a", {"data": b"x" * 100})
    (folder / "data").write_bytes(b"y" * 100)
    with pytest.raises(DamagedError, match="data: other bytes"):
        GcsStore(URL, run_id="r1").publish(10, folder, others())
    assert store_is_empty(gcs)


def test_another_runs_place_is_refused_and_left_as_it_is(gcs, tmp_path):
    folder = checkpoint(tmp_path / "a", {"data": b"x"})
    GcsStore(URL, run_id="r1").publish(10, folder, others())
    before = dict(gcs.buckets["bucket"])
    other = GcsStore(URL, run_id="r2")
    for call in (other.published, lambda: other.publish(10, folder, others("r2")), lambda: other.delete(10)):
        with pytest.raises(StorageError, match=r"copies of run r1, and this is run r2; set publish\.url") as refused:
            call()
        assert not refused.value.retryable
    assert gcs.buckets["bucket"] == before


REFUSALS = {
    "401": r"no credentials.*gcloud auth application-default login",
    "403": r"may not do that.*roles/storage\.objectAdmin on gs://bucket",
    "404": r"no bucket 'bucket'.*buckets create",
}


@pytest.mark.parametrize("status", REFUSALS)
def test_a_refusal_says_why_and_what_to_do_and_a_failure_may_be_tried_again(gcs, tmp_path, status):
    folder = checkpoint(tmp_path / "a", {"data": b"x"})
    store = GcsStore(URL, run_id="r1")
    gcs.fault = lambda method, path: status
    with pytest.raises(StorageError, match=REFUSALS[status]) as refused:
        store.publish(10, folder, others())
    assert not refused.value.retryable
    gcs.fault = lambda method, path: "503"
    with pytest.raises(StorageError, match="503") as failed:
        store.publish(10, folder, others())
    assert failed.value.retryable


def test_a_call_ends_when_it_is_cut_off_and_when_nothing_moves(gcs, monkeypatch):
    monkeypatch.setattr("tasks.stores.bucket.POLL", 0.01)
    gcs.fault = lambda method, path: "hang"
    cut = threading.Event()
    threading.Timer(0.2, cut.set).start()
    began = time.monotonic()
    with pytest.raises(StorageError, match="cut off"):
        GcsStore(URL, run_id="r1", cut_off=cut.is_set).published()
    with pytest.raises(StorageError, match=r"nothing moved for 0\.2 s"):
        GcsStore(URL, run_id="r1", stall=0.2).published()
    assert time.monotonic() - began < 3


def test_a_manifest_that_names_a_file_outside_is_refused(gcs, tmp_path):
    folder = checkpoint(tmp_path / "a", {"data": b"x"})
    GcsStore(URL, run_id="r1").publish(10, folder, others())
    files = {"../../out": {"size": 1, "crc32c": "0" * 8, "crc32": "0" * 8}}
    gcs.buckets["bucket"][f"{FOLDER}/MANIFEST.json"] = manifest._encode(10, files)
    with pytest.raises(StorageError, match="out"):
        GcsStore(URL, run_id="r1").fetch(10, tmp_path / "b")


def test_an_address_without_a_run_says_which_runs_are_below_it(gcs, tmp_path):
    GcsStore(URL, run_id="r1").publish(10, checkpoint(tmp_path / "a", {"data": b"x"}), others())
    with pytest.raises(StorageError, match=r"no published run; there are gs://bucket/runs/mine-r1"):
        store_at("gs://bucket/runs/")
    store, identity, config = store_at(URL + "/")
    assert (store.address, store.run_id, identity, config) == (URL, "r1", others()["run.json"], b"{}")


SIZES = [0, 1, 100, 5000, 70_000]


def is_torn(gcs):
    """Whether a marker stands before files that are not as it says."""
    objects = gcs.buckets["bucket"]
    marker = objects.get(f"{FOLDER}/MANIFEST.json")
    if marker is None:
        return False
    try:
        files = manifest.parse(marker)["files"]
    except ValueError:
        return False  # no marker yet: its bytes were damaged on their way
    from tasks.stores.bucket import facts_of

    return any(tuple(facts_of(objects.get(f"{FOLDER}/{name}", b"?"))) != (f["size"], f["crc32c"]) for name, f in files.items())


def until_it_works(call, after_each, tries=300):
    for attempt in range(1, tries):
        try:
            call()
            return attempt
        except StorageError as e:
            assert e.retryable, e
        finally:
            after_each()
    raise AssertionError(f"lost: {tries} tries were in vain")


@pytest.mark.parametrize("seed", range(int(os.environ.get("EVERSTEP_UPLOADS", "8"))))
def test_hostile_a_copy_arrives_whole_is_never_torn_and_comes_back_through_any_fault(gcs, tmp_path, monkeypatch, seed):
    """Three requests in ten fail in one of eight ways, and uploads are cut off at random; the last of three is of a step trained again."""
    rng, lock = random.Random(seed), threading.Lock()
    monkeypatch.setattr("tasks.stores.bucket.POLL", 0.01)
    monkeypatch.setattr("tasks.stores.bucket.READ", 0.15)
    monkeypatch.setattr("tasks.stores.bucket.CHUNK", 1 << 20)

    def draw():
        with lock:
            return rng.random()

    def hostile(method, path):
        return ACTIONS[int(draw() * len(ACTIONS))] if draw() < 0.3 else None

    torn = []
    for life in range(2):
        marked = {"commit_success.txt": b"as Orbax says it"} if rng.random() < 0.5 else {}
        sizes = [rng.choice(SIZES) for _ in range(rng.randint(1, 6))] + ([(5 << 20) + 12345] if seed % 12 == 0 else [])
        folder = checkpoint(tmp_path / f"made{life}", {f"d{i % 2}/{i}": rng.randbytes(size) for i, size in enumerate(sizes)} | marked)

        def publish(folder=folder):
            cutting = draw() < 0.3
            GcsStore(URL, run_id="r1", cut_off=lambda: cutting and draw() < 0.05).publish(10, folder, others())

        gcs.fault = hostile
        until_it_works(publish, lambda: torn.append(is_torn(gcs)))
        until_it_works(
            lambda life=life: GcsStore(URL, run_id="r1").fetch(10, tmp_path / f"back{life}"),
            lambda: None,
        )
        gcs.fault = lambda method, path: None
        time.sleep(2 * gcs.slow)  # what was on its way when it was cut off
        assert GcsStore(URL, run_id="r1").published() == {10: manifest.own_crc(folder)}
        for path in (p for p in folder.rglob("*") if p.is_file()):
            assert gcs.buckets["bucket"][f"{FOLDER}/{path.relative_to(folder)}"] == path.read_bytes()
        assert not manifest.problems(tmp_path / f"back{life}", 10)
    assert not any(torn)
