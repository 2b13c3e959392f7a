"""Prepared data on a bucket: the same batches as here, within a bound on the disk, and what is damaged is refused by name."""

import fcntl
import json
import os
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path

import fsspec
import numpy as np
import pytest

from configs.packed import PackedDataConfig
from tasks.preparation import prepare
from tests.tasks.test_preparation import small, some_texts, write_jsonl
from trainer.data import eval_batches, load_manifest, load_tokenizer, rows_of, shards, train_loader
from trainer.errors import DataError, StorageError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of prepared data of many small shards."""
    tmp = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tasks.preparation.shards.SHARD_TOKENS", 512)
        ref = prepare(small(write_jsonl(tmp / "a.jsonl", some_texts(150)), seq_len=32), cache=tmp)
    assert len(load_manifest(ref.path).splits["train"].shards) > 10
    return ref


@pytest.fixture
def bucket(made):
    """Its copy at an address, in memory; a new one each time."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    for path in Path(made.path).iterdir():
        fs.pipe_file(f"/bucket/data/{path.name}", path.read_bytes())
    yield "memory://bucket/data"
    for fd, _ in shards._mapped.values():
        os.close(fd)
    shards._mapped.clear()


def packed(path, **changes):
    return PackedDataConfig(path=str(path), seq_len=32, **changes)


def cached(cache):
    return sorted(p for p in (cache / "packed" / "shards").glob("*") if not p.name.startswith("."))


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[f], b[f]) for f in a)


def batches(ref, count, **options):
    return list(islice(train_loader(ref.path, load_manifest(ref.path), batch_size=4, seed=2, **options), count))


def test_batches_from_an_address_are_those_of_the_folder_and_shards_come_as_they_are_read(made, bucket, tmp_path):
    ref = prepare(packed(bucket), cache=tmp_path)
    assert ref.digest == made.digest and ref.path != made.path
    assert not cached(tmp_path), "nothing is fetched before it is read"
    rows_of(ref.path, load_manifest(ref.path), "train")[0]
    assert len(cached(tmp_path)) == 1
    assert all(map(same, batches(ref, 80), batches(made, 80)))
    for split in ("val", "test"):
        a, b = (list(eval_batches(r.path, load_manifest(r.path), split, batch_size=4)) for r in (ref, made))
        assert len(a) == len(b) > 1 and all(map(same, a, b))
    assert load_tokenizer(ref.path).encode("how long").tolist() == load_tokenizer(made.path).encode("how long").tolist()
    fsspec.filesystem("memory").store.clear()
    shards_before = len(cached(tmp_path))
    assert all(map(same, batches(ref, 80), batches(made, 80))), "the cache is enough"
    assert len(cached(tmp_path)) == shards_before == sum(len(s.shards) for s in load_manifest(made.path).splits.values())
    rows = pickle.loads(pickle.dumps(rows_of(ref.path, load_manifest(ref.path), "train")))
    assert same(rows[3], rows_of(made.path, load_manifest(made.path), "train")[3])


def test_a_cache_smaller_than_the_data_stays_within_its_bound_and_gives_the_same_rows(made, bucket, tmp_path):
    manifest = load_manifest(made.path)
    largest = max(shard.size for split in manifest.splits.values() for shard in split.shards)
    bound = 3 * largest
    ref = prepare(packed(bucket, cache_bytes=bound), cache=tmp_path)
    rows, truth = rows_of(ref.path, manifest, "train"), rows_of(made.path, manifest, "train")
    for i in np.random.default_rng(0).permutation(len(truth))[:60].tolist():
        assert same(rows[i], truth[i])
        assert sum(p.stat().st_size for p in (tmp_path / "packed" / "shards").iterdir()) <= bound
    assert len(cached(tmp_path)) >= 3
    newest = list(shards._mapped)[-1]
    oldest = next(iter(shards._mapped))
    crcs = {p.name.split("-")[1] for p in cached(tmp_path)}
    missing = next(i for i in range(len(truth)) if manifest.splits["train"].shards[_shard(manifest, i)].crc32c not in crcs)
    rows[missing]
    assert newest in cached(tmp_path) and oldest not in cached(tmp_path), "the least recently used goes first"


def _shard(manifest, row):
    return int(np.searchsorted(np.cumsum([s.rows for s in manifest.splits["train"].shards]), row, side="right"))


def test_a_shard_that_another_process_reads_is_never_deleted(made, bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "WAIT", 0.2)
    manifest = load_manifest(made.path)
    largest = max(shard.size for split in manifest.splits.values() for shard in split.shards)
    ref = prepare(packed(bucket, cache_bytes=2 * largest), cache=tmp_path)
    rows = rows_of(ref.path, manifest, "train")
    rows[0]
    (held,) = cached(tmp_path)
    code = f"import fcntl, sys; f = open({str(held)!r}); fcntl.flock(f, fcntl.LOCK_SH); print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        for i in range(1, len(rows), 3):
            rows[i]
            assert held in cached(tmp_path)
        with open(next(p for p in cached(tmp_path) if p != held)) as f:
            fcntl.flock(f, fcntl.LOCK_SH)
            with pytest.raises(StorageError, match=r"other processes read.*data.cache_bytes"):
                for i in range(len(rows)):
                    rows[i]
    finally:
        other.communicate(timeout=20)
    for i in range(len(rows) - 1, len(rows) // 2, -1):
        rows[i]
    assert held not in cached(tmp_path), "nobody reads it any more"


READER = """
import sys, fsspec
from pathlib import Path
from trainer.data import load_manifest, rows_of
rows = rows_of(sys.argv[1], load_manifest(sys.argv[1]), "train")
import numpy as np
total = 0
for i in np.random.default_rng(int(sys.argv[2])).permutation(len(rows)).tolist():
    total += int(rows[i]["targets"].sum())
print(total)
"""


def test_two_processes_share_a_cache_that_holds_less_than_they_read(made, tmp_path):
    manifest = load_manifest(made.path)
    largest = max(shard.size for split in manifest.splits.values() for shard in split.shards)
    ref = prepare(packed(f"file://{made.path}", cache_bytes=6 * largest), cache=tmp_path)
    assert ref.path != made.path
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", READER, ref.path]
    # So many are mapped by each that they could stand in each other's way: each lets go of its own, so there is room for both.
    running = [subprocess.Popen([*command, str(i)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for i in range(2)]
    found = [p.communicate(timeout=60) for p in running]
    truth = rows_of(made.path, manifest, "train")
    wanted = sum(int(truth[i]["targets"].sum()) for i in range(len(truth)))
    assert [int(out or -1) for out, _ in found] == [wanted] * 2, found
    assert sum(p.stat().st_size for p in cached(tmp_path)) <= 6 * largest


def test_a_flipped_byte_in_a_remote_shard_and_one_that_is_gone_or_short_are_refused_by_name(made, bucket, tmp_path):
    fs = fsspec.filesystem("memory")
    name = load_manifest(made.path).splits["train"].shards[2].file
    good = Path(made.path, name).read_bytes()
    for bad, why in ((good[:700] + bytes([good[700] ^ 1]) + good[701:], "crc32c"), (good[:-1], f"{len(good) - 1} bytes instead of")):
        fs.pipe_file(f"/bucket/data/{name}", bad)
        ref = prepare(packed(bucket), cache=tmp_path)
        with pytest.raises(DataError, match=rf"{name} of {bucket} .*{why}.*copy that folder"):
            batches(ref, 100)
        assert not any(load_manifest(made.path).splits["train"].shards[2].crc32c in p.name for p in cached(tmp_path))
    fs.rm_file(f"/bucket/data/{name}")
    with pytest.raises(DataError, match=rf"there is no {bucket}/{name}"):
        batches(ref, 100)
    fs.pipe_file(f"/bucket/data/{name}", good)
    assert all(map(same, batches(ref, 50), batches(made, 50)))
    fs.pipe_file("/bucket/data/manifest.json", b"{}")
    with pytest.raises(DataError, match=rf"{bucket}/manifest.json is damaged"):
        prepare(packed(bucket), cache=tmp_path)
    with pytest.raises(DataError, match=r"there is no memory://nowhere/manifest.json"):
        prepare(packed("memory://nowhere"), cache=tmp_path)


def test_a_local_folder_is_used_where_it_is_after_its_checksums(made, tmp_path):
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(made.path, copy)
    assert prepare(packed(copy), cache=tmp_path / "cache").path == str(copy) and not (tmp_path / "cache").exists()
    shard = sorted(copy.glob("train-*.arrow"))[1]
    data = bytearray(shard.read_bytes())
    data[800] ^= 4
    shard.write_bytes(data)
    with pytest.raises(DataError, match=rf"{shard.name} of {copy} .*crc32c"):
        prepare(packed(copy), cache=tmp_path)


def test_what_does_not_fit_is_refused_with_the_way_out(made, bucket, tmp_path):
    with pytest.raises(DataError, match=r"set data.seq_len=32"):
        prepare(PackedDataConfig(path=bucket), cache=tmp_path)
    ref = prepare(packed(bucket, cache_bytes=1000), cache=tmp_path)
    with pytest.raises(DataError, match=r"shard train-00000.arrow .* bytes, above data.cache_bytes 1000; raise it"):
        batches(ref, 1)
    manifest = json.loads(Path(made.path, "manifest.json").read_text())
    del manifest["splits"]["test"], manifest["crc32c"]
    from trainer.files import seal

    fsspec.filesystem("memory").pipe_file("/bucket/data/manifest.json", seal(manifest))
    with pytest.raises(DataError, match=r"set data.has_test=false"):
        prepare(packed(bucket), cache=tmp_path)
    assert prepare(packed(bucket, has_test=False), cache=tmp_path).digest == made.digest


def test_a_run_on_packed_data_has_the_bits_of_one_on_the_text_itself(made, bucket, tmp_path, monkeypatch, micro):
    from tasks.session import training_config
    from tests.trainer.lives import digests
    from trainer.assemble import TrainingConfig, assemble
    from trainer.run import Run
    from trainer.rundir import RunDir

    monkeypatch.setenv("EVERSTEP_CACHE", str(tmp_path / "cache"))
    config = micro()
    for name, data in (("here", packed(made.path, batch_size=4)), ("there", packed(bucket, batch_size=4))):
        one = type(config).model_validate({**config.to_dict(), "data": data.to_dict()})
        training = TrainingConfig.model_validate({**training_config(one), "config_digest": "same"})
        (tmp_path / name).mkdir()
        run = Run(training, assemble(training), RunDir(tmp_path / name), Path(prepare(one.data).path))
        run.open()
        run.train_until(6)
        run.close()
    assert digests(tmp_path / "here")[6] == digests(tmp_path / "there")[6]
