"""Prepared data: batches are a function of seed and position, whoever reads them; damage is refused."""

import json
import pickle
import subprocess
import sys
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from configs.prepare import TextDataConfig, TokenizerConfig
from tasks.preparation import prepare
from trainer.data import PackedConfig, ShardedRows, eval_batches, load_manifest, place_of, train_loader
from trainer.data.base import FIELDS
from trainer.errors import DataError
from trainer.files import seal

ROOT = Path(__file__).resolve().parents[2]
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "saw",
    "one",
    "grey",
    "mouse",
    "run",
    "by",
    "it",
    "so",
    "fast",
    "that",
    "no",
    "paw",
    "could",
    "reach",
]


def write_texts(path, count, seed=0):
    rng = np.random.default_rng(seed)
    lines = [{"text": f"{i} " + " ".join(rng.choice(WORDS, size=rng.integers(3, 30)))} for i in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """(folder, manifest) of 60 short documents in rows of 16 bytes."""
    tmp = tmp_path_factory.mktemp("data")
    path = str(write_texts(tmp / "a.jsonl", 60))
    config = TextDataConfig(path=path, tokenizer=TokenizerConfig(kind="byte"), seq_len=16, val_fraction=0.2, test_fraction=0.1)
    ref = prepare(config, cache=tmp)
    return ref.path, load_manifest(ref.path)


def all_rows(folder, manifest, split="train"):
    """The rows in the order of the shards, read by pyarrow alone."""
    import pyarrow as pa

    tables = [pa.ipc.open_file(f"{folder}/{shard.file}").read_all() for shard in manifest.splits[split].shards]
    return {field: np.concatenate([np.array(t[field].to_pylist(), np.int32) for t in tables]) for field in FIELDS}


def stacked(batches):
    batches = list(batches)
    return {field: np.concatenate([batch[field] for batch in batches]) for field in FIELDS}


def same(a, b):
    return a.keys() == b.keys() and all(a[f].dtype == b[f].dtype == np.int32 and np.array_equal(a[f], b[f]) for f in a)


def keys_of(rows):
    return [b"".join(rows[field][i].tobytes() for field in FIELDS) for i in range(len(rows["inputs"]))]


def test_rows_read_at_random_are_those_of_the_files_also_in_another_process(data):
    folder, manifest = data
    rows = ShardedRows([f"{folder}/{shard.file}" for shard in manifest.splits["train"].shards])
    truth = all_rows(folder, manifest)
    for reader in (rows, pickle.loads(pickle.dumps(rows))):
        assert len(reader) == manifest.splits["train"].rows == len(truth["inputs"])
        assert same({f: np.stack([reader[i][f] for i in range(len(reader))]) for f in FIELDS}, truth)
    with pytest.raises(IndexError):
        rows[len(rows)]


def test_several_shards_read_as_one_sequence(data):
    folder, manifest = data
    paths = [f"{folder}/{manifest.splits[split].shards[0].file}" for split in ("train", "val", "train")]
    rows = ShardedRows(paths)
    parts = [all_rows(folder, manifest, split) for split in ("train", "val", "train")]
    assert same({f: np.stack([rows[i][f] for i in range(len(rows))]) for f in FIELDS}, stacked(parts))


@pytest.mark.parametrize("num_processes", [2, 4, 8])
def test_the_global_batch_does_not_depend_on_the_number_of_processes_nor_on_kills(data, num_processes):
    """Over several epochs; all are killed at every seventh step, and go on from the state in JSON with other batches read ahead."""

    def started():
        return [train_loader(*data, batch_size=16, seed=3, num_processes=num_processes, process_index=p) for p in range(num_processes)]

    steps = 3 * data[1].splits["train"].rows // 16
    alone = train_loader(*data, batch_size=16, seed=3)
    parts = started()
    for step in range(1, steps + 1):
        whole = next(alone)
        assert same(whole, stacked([next(part) for part in parts]))
        if step % 7 == 0:
            states = [json.dumps(part.get_state()) for part in parts]
            assert set(states) == {json.dumps(alone.get_state())}
            parts = started()
            for part in parts:
                part.set_state(json.loads(states[0]))
    assert steps > 21


def test_every_row_comes_once_an_epoch_in_an_order_of_its_own(data):
    folder, manifest = data
    truth = keys_of(all_rows(folder, manifest))
    num_rows, batch_size, epochs = len(truth), 8, 8  # 8 epochs are whole batches, whatever the number of rows
    seen = keys_of(stacked(islice(train_loader(folder, manifest, batch_size=batch_size, seed=5), epochs * num_rows // batch_size)))
    orders = [tuple(seen[e * num_rows : (e + 1) * num_rows]) for e in range(epochs)]
    assert all(Counter(order) == Counter(truth) for order in orders)
    assert len(set(orders) | {tuple(truth)}) == epochs + 1
    other = keys_of(stacked(islice(train_loader(folder, manifest, batch_size=batch_size, seed=1000), num_rows // batch_size)))
    assert other != seen[: len(other)]


@pytest.mark.parametrize("place", [0, 1, 9, 10**12])
def test_a_loader_goes_to_any_place_at_once_and_continues_as_if_it_had_walked(data, place):
    loader = train_loader(*data, batch_size=8, seed=1)
    loader.set_state({"next_index": place})
    jumped = [next(loader) for _ in range(3)]
    assert loader.get_state() == {"next_index": place + 3}
    if place < 100:
        walked = list(islice(train_loader(*data, batch_size=8, seed=1), place + 3))[place:]
        assert all(map(same, jumped, walked))


def test_the_state_is_that_of_the_batch_handed_out_not_of_the_one_read_ahead(data):
    loader = train_loader(*data, batch_size=8, seed=1)
    assert loader.get_state() == {"next_index": 0}
    for k in range(1, 6):
        next(loader)
        assert loader.get_state() == {"next_index": k}
    state = json.loads(json.dumps(loader.get_state()))
    expected = [next(loader) for _ in range(3)]
    loader.set_state(state)  # back, with batches beyond it already in the buffer
    assert all(map(same, expected, [next(loader) for _ in range(3)]))


LEFT_OUT = ((0, 2), (5, 6), (9, 13), (13, 14))


def test_batches_that_are_left_out_are_passed_over_and_the_others_stay_what_they_were(data):
    loader = train_loader(*data, batch_size=8, seed=1, leave_out=LEFT_OUT)
    plain = list(islice(train_loader(*data, batch_size=8, seed=1), 30))
    kept = [place for place in range(30) if not any(a <= place < b for a, b in LEFT_OUT)]
    for step, place in enumerate(kept, 1):
        assert same(next(loader), plain[place])
        assert loader.get_state() == {"next_index": place + 1} and place_of(step, LEFT_OUT) == place
    for step in range(len(kept)):  # and from wherever a life begins
        loader.set_state({"next_index": place_of(step, LEFT_OUT) + 1 if step else 0})
        assert same(next(loader), plain[kept[step]])


@pytest.mark.parametrize("ranges", [[[3, 3]], [[5, 2]], [[4, 6], [1, 2]], [[1, 4], [3, 6]], [[-1, 2]]])
def test_ranges_to_leave_out_that_are_no_ranges_are_refused(ranges):
    with pytest.raises(ValidationError, match="ascending"):
        PackedConfig(kind="packed", leave_out=ranges)


def test_each_row_is_read_once_an_epoch_through_kills_and_changes_of_the_number_of_processes(data):
    folder, manifest = data
    truth, batch_size, epochs = keys_of(all_rows(folder, manifest)), 8, 8
    steps = epochs * len(truth) // batch_size  # whole epochs, whatever the number of rows
    ledger, step, lives, rng = Counter(), 0, 0, np.random.default_rng(11)
    while step < steps:
        num_processes = [1, 2, 4, 8][lives % 4]
        loaders = [
            train_loader(folder, manifest, batch_size=batch_size, seed=7, num_processes=num_processes, process_index=p)
            for p in range(num_processes)
        ]
        for loader in loaders:
            loader.set_state({"next_index": step})
        for k in range(7):  # killed at the seventh step; what a life reads ahead or after its last commit is nobody's
            batch = stacked([next(loader) for loader in loaders])
            if k <= rng.integers(7) and step < steps:
                ledger.update(keys_of(batch))
                step += 1
            else:
                break
        lives += 1
    assert lives > 10 and ledger == Counter({key: n * epochs for key, n in Counter(truth).items()})


@pytest.mark.parametrize("state", [{}, {"next_index": -1}, {"next_index": "3"}, {"next_index": True}, {"next_index": 1, "epoch": 0}])
def test_a_state_that_is_no_place_is_refused(data, state):
    with pytest.raises(DataError, match="no place"):
        train_loader(*data, batch_size=8, seed=1).set_state(state)


def test_batches_that_cannot_be_are_refused_with_the_numbers(data):
    with pytest.raises(DataError, match=r"batch_size 9 .* 2 processes"):
        train_loader(*data, batch_size=9, seed=0, num_processes=2)
    rows = data[1].splits["train"].rows
    with pytest.raises(DataError, match=rf"{rows} training rows .* batch of {rows + 1}"):
        train_loader(*data, batch_size=rows + 1, seed=0)
    with pytest.raises(DataError, match="no split 'tset'"):
        eval_batches(*data, "tset", batch_size=4)  # before the first batch is asked for


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_evaluation_sees_each_row_once_in_order_and_then_only_padding(data, batch_size):
    batches = list(eval_batches(*data, "val", batch_size=batch_size))
    truth, seen = all_rows(*data, "val"), stacked(batches)
    num_rows = len(truth["inputs"])
    assert {len(batch["inputs"]) for batch in batches} == {batch_size} and len(batches) == -(-num_rows // batch_size)
    assert same({f: a[:num_rows] for f, a in seen.items()}, truth)
    assert all(not a[num_rows:].any() for a in seen.values())


def test_a_manifest_that_does_not_fit_its_folder_is_refused_with_the_way_out(data, tmp_path):
    import shutil

    folder, manifest = data
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert load_manifest(copy) == manifest
    file, good = copy / "manifest.json", (copy / "manifest.json").read_bytes()
    shard = copy / manifest.splits["train"].shards[0].file
    way_out = f"delete {copy} and prepare again"

    for bad in (good[:-1], good.replace(b'"seq_len":16', b'"seq_len":17', 1), good + b"\n", b"", b"[]", b"{}", b"\xff"):
        file.write_bytes(bad)
        with pytest.raises(DataError, match=f"damaged.*{way_out}"):
            load_manifest(copy)
    file.write_bytes(seal({**manifest.to_dict(), "version": 99}))
    with pytest.raises(DataError, match=f"version 99.*{way_out}"):
        load_manifest(copy)
    file.write_bytes(good)
    size = shard.stat().st_size
    with open(shard, "ab") as f:
        f.write(b"x")
    with pytest.raises(DataError, match=f"{shard.name} has {size + 1} bytes, its manifest says {size}.*{way_out}"):
        load_manifest(copy)
    shard.unlink()
    with pytest.raises(DataError, match=f"{shard.name} is missing.*{way_out}"):
        load_manifest(copy)
    file.unlink()
    with pytest.raises(DataError, match=way_out):
        load_manifest(copy)


def test_memory_of_the_loader_stays_within_its_bound_however_much_it_reads():
    """A gigabyte in batches of 8 MB, several times over; `make bench-data` does it with ten."""
    command = [sys.executable, "-m", "tests.benchmarks.loader", "--gigabytes", "1", "--shard-rows", "1024", "--json"]
    done = subprocess.run([*command, "--batch-size", "256", "--batches", "8"], capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(done.stdout)
    assert found["bytes"] > 1e9 and found["rows"] * 2048 * 16 > 1e9
    assert found["memory"] < found["bound"] < found["bytes"] / 5
    assert found["memory"] < found["memory_early"] + 20e6, "it does not grow"


def test_a_shard_that_is_no_arrow_file_is_refused(tmp_path):
    (tmp_path / "train-00000.arrow").write_bytes(b"not arrow")
    with pytest.raises(DataError, match="no shard"):
        ShardedRows([tmp_path / "train-00000.arrow"])


def test_a_data_config_is_checked_and_imports_nothing_heavy():
    assert PackedConfig(kind="x", seq_len=2).batch_size == 16
    for wrong in ({"seq_len": 1}, {"batch_size": 0}, {"eval_batch_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            PackedConfig(kind="x", **wrong)
    heavy = "('jax', 'numpy', 'pyarrow', 'grain', 'tokenizers')"
    code = f"import sys, configs.prepare, trainer.data; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
