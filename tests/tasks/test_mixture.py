"""Mixtures: rows come in the proportions asked for, in an order of seed and place alone, and no held-out document is trained on."""

import hashlib
import json
import random
from collections import Counter
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from pydantic import ValidationError

from configs.load import load
from configs.mixture import MixtureDataConfig
from configs.prepare import TokenizerConfig
from tasks.preparation import preparation_of, prepare
from tests.tasks.test_preparation import files_of, held, paragraphs_of, some_texts, write_jsonl
from trainer.data import eval_batches, load_manifest, train_loader
from trainer.data.base import FIELDS
from trainer.errors import DataError

WEIGHTS = (0.6, 0.3, 0.1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three texts of unequal length that share some documents."""
    tmp = tmp_path_factory.mktemp("texts")
    common = some_texts(60, seed=9)
    for i, count in enumerate((200, 60, 90)):
        own = [f"{'abc'[i]} {text}" for text in some_texts(count, seed=i)]
        write_jsonl(tmp / f"{'abc'[i]}.jsonl", own + common)
    return tmp


def mixture(folder, **changes):
    parts = [{"weight": 10 * w, "data": {"path": str(folder / f"{name}.jsonl")}} for name, w in zip("abc", WEIGHTS, strict=True)]
    settings = {"tokenizer": {"kind": "byte"}, "seq_len": 32, "batch_size": 4, "val_fraction": 0.1, "test_fraction": 0.1}
    return MixtureDataConfig(**{"parts": parts, **settings, **changes})


@pytest.fixture(scope="module")
def ref(folder):
    return prepare(mixture(folder), cache=folder)


def keys(batch):
    return [b"".join(batch[field][i].tobytes() for field in FIELDS) for i in range(len(batch["inputs"]))]


def rows_of_parts(folder):
    """The training rows of each part as it is prepared alone."""
    import pyarrow as pa

    found = []
    for part in mixture(folder).parts:
        alone = prepare(part.data, cache=folder)
        tables = [pa.ipc.open_file(f"{alone.path}/{s.file}").read_all() for s in load_manifest(alone.path).splits["train"].shards]
        rows = {f: np.concatenate([np.array(t[f].to_pylist(), np.int32) for t in tables]) for f in FIELDS}
        found.append(keys(rows))
    return found


@pytest.mark.parametrize("seed", [0, 5])
def test_rows_come_in_proportion_and_each_row_of_a_part_once_in_its_own_epoch(folder, ref, seed):
    parts = rows_of_parts(folder)
    own = [set(rows) for rows in parts]
    only = [rows - set().union(*(other for j, other in enumerate(own) if j != i)) for i, rows in enumerate(own)]
    assert all(len(rows) > 100 for rows in only)
    seen = [key for batch in islice(train_loader(ref.path, load_manifest(ref.path), batch_size=4, seed=seed), 1500) for key in keys(batch)]
    source = [next((i for i, rows in enumerate(only) if key in rows), None) for key in seen]
    assert source.count(None) < len(seen) * 0.4 and set(seen) == set().union(*own)
    # Of each row that only one part has, how often it comes follows from weight and length of the part.
    counts = Counter(seen)
    for i, rows in enumerate(only):
        times = WEIGHTS[i] * len(seen) / len(parts[i])
        repeats = Counter(parts[i])
        for key in rows:
            assert abs(counts[key] / repeats[key] - times) <= 1 + 0.02 * times, (i, counts[key], times)


def test_the_order_is_one_of_seed_and_place_for_any_number_of_processes_and_from_any_place(ref):
    manifest = load_manifest(ref.path)
    walked = list(islice(train_loader(ref.path, manifest, batch_size=4, seed=3), 60))
    other = next(train_loader(ref.path, manifest, batch_size=4, seed=4))
    assert keys(other) != keys(walked[0])
    parts = [train_loader(ref.path, manifest, batch_size=4, seed=3, num_processes=2, process_index=p) for p in range(2)]
    for whole in walked:
        assert keys(whole) == [key for part in parts for key in keys(next(part))]
    loader = train_loader(ref.path, manifest, batch_size=4, seed=3)
    for place in (41, 7):
        loader.set_state({"next_index": place})
        assert [keys(next(loader)) for _ in range(5)] == [keys(b) for b in walked[place : place + 5]]
        assert loader.get_state() == {"next_index": place + 5}
    loader.set_state({"next_index": 10**12})
    assert len(next(loader)["inputs"]) == 4


def test_a_mixture_of_one_is_trained_like_its_part_alone(folder):
    config = mixture(folder, parts=[{"weight": 3, "data": {"path": str(folder / "b.jsonl")}}])
    one, alone = prepare(config, cache=folder), prepare(config.parts[0].data, cache=folder)
    loaders = [train_loader(ref.path, load_manifest(ref.path), batch_size=4, seed=1) for ref in (one, alone)]
    assert all(keys(next(loaders[0])) == keys(next(loaders[1])) for _ in range(50))


def test_held_out_splits_are_the_parts_own_and_no_held_out_document_is_in_any_training(folder, ref):
    manifest = load_manifest(ref.path)
    alone = [prepare(part.data, cache=folder) for part in mixture(folder).parts]
    for split in ("val", "test"):
        assert held(ref, split) == [text for part in alone for text in held(part, split)]
        out = set(held(ref, split))
        assert not out & {text for part in alone for text in held(part, "train")}
        assert any(out & set(some_texts(60, seed=9))), "some held-out document is in all parts"
        assert sum(len(b["inputs"]) for b in eval_batches(ref.path, manifest, split, batch_size=1)) == manifest.splits[split].rows
    assert manifest.splits["train"].documents == sum(load_manifest(part.path).splits["train"].documents for part in alone)


@pytest.mark.parametrize("tokenizer", [{"kind": "byte"}, {"kind": "bpe", "vocab_size": 300}])
def test_no_paragraph_that_one_part_holds_out_stands_in_a_larger_split_of_any_part(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr("tasks.preparation.units.UNIT", 900)  # shared paragraphs stand in different units
    rng = random.Random(4)
    pool = [f"paragraph {i} of all" for i in range(80)]
    for name in "abc":
        texts = ["\n\n".join([f"{name} {i}", *rng.choices(pool, k=rng.randint(0, 3))]) for i in range(70)]
        write_jsonl(tmp_path / f"{name}.jsonl", texts)
    config = mixture(tmp_path, tokenizer=tokenizer, val_fraction=0.15)
    ref = prepare(config, cache=tmp_path)
    folders = [Path(ref.path, load_manifest(ref.path).splits["train"].shards[i].file).parent.resolve() for i in range(3)]
    parts = [SimpleNamespace(path=folder) for folder in folders]
    stands = {split: {p for part in parts for text in held(part, split) for p in paragraphs_of(text)} for split in ("train", "val", "test")}
    assert not stands["train"] & (stands["val"] | stands["test"]) and not stands["val"] & stands["test"]
    # What is held out at all is what a plain reading of the rules holds out, so nothing else was taken.
    splits = {"train": set(), "val": set(), "test": set()}
    for name in "abc":
        for line in (tmp_path / f"{name}.jsonl").read_text().splitlines():
            text = json.loads(line)["text"]
            at = int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256
            splits["test" if at < 0.1 else "val" if at < 0.25 else "train"] |= set(paragraphs_of(text))
    assert stands["test"] == splits["test"] and stands["val"] == splits["val"] - splits["test"]
    assert stands["train"] == splits["train"] - splits["val"] - splits["test"]
    assert (
        preparation_of(config, cache=tmp_path).known()
        == ref
        == prepare(config, cache=tmp_path / "again").model_copy(update={"path": ref.path})
    )
    alone = prepare(config.parts[0].data, cache=tmp_path)
    assert alone.digest != load_manifest(folders[0]).digest, "another's held-out text took something from it"
    assert prepare(config.parts[0].data, cache=tmp_path / "fresh").digest == alone.digest


def test_another_weight_is_other_data_of_the_same_parts_and_the_scale_of_weights_is_none(folder, ref):
    before = {p.name for p in (folder / "data").iterdir()}
    parts = [{**part.to_dict(), "weight": part.weight * 2} for part in mixture(folder).parts]
    assert prepare(mixture(folder, parts=parts), cache=folder) == ref
    parts[0]["weight"] = 1.0
    other = prepare(mixture(folder, parts=parts), cache=folder)
    assert other.digest != ref.digest and not load_manifest(other.path).splits["train"].shards[0].file.startswith("/")
    new = {p.name for p in (folder / "data").iterdir()} - before
    assert {name for name in new if not name.startswith(".")} == {Path(other.path).name}


def test_a_learnt_tokenizer_is_the_first_parts_and_all_parts_read_with_it(folder, tmp_path):
    config = mixture(folder, tokenizer=TokenizerConfig(vocab_size=300, sample_bytes=5000))
    assert preparation_of(config, cache=tmp_path).known() is None and len(preparation_of(config, cache=tmp_path).files) == 3
    ref = prepare(config, cache=tmp_path)
    first = prepare(config.parts[0].data, cache=tmp_path)
    assert files_of(ref.path)["tokenizer.json"] == files_of(first.path)["tokenizer.json"]
    assert any(text.startswith("c ") for text in held(ref, "val")), "decoded by that tokenizer"
    assert preparation_of(config, cache=tmp_path).known() == ref == prepare(config, cache=tmp_path)


def test_a_part_that_contradicts_the_mixture_and_weights_that_are_none_are_refused(folder):
    for key, value in (("seq_len", 64), ("tokenizer", {"kind": "bpe", "vocab_size": 500}), ("val_fraction", 0.2)):
        with pytest.raises(ValidationError, match=rf"parts\.0\.data\.{key} .*differs from the mixture"):
            mixture(folder, parts=[{"weight": 1, "data": {"path": "x", key: value}}])
    mixture(folder, parts=[{"weight": 1, "data": {"path": "x", "seq_len": 32}}])
    for weight in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ValidationError, match="weight"):
            mixture(folder, parts=[{"weight": weight, "data": {"path": "x"}}])
    config = mixture(folder)
    assert MixtureDataConfig.model_validate_json(config.model_dump_json()) == config


def test_a_part_that_is_gone_is_noticed_and_prepared_again(folder, tmp_path):
    import shutil

    ref = prepare(mixture(folder), cache=tmp_path)
    part = prepare(mixture(folder).parts[1].data, cache=tmp_path)
    files = files_of(part.path)
    shutil.rmtree(part.path)
    with pytest.raises(DataError, match="is missing"):
        load_manifest(ref.path)
    assert prepare(mixture(folder), cache=tmp_path) == ref and files_of(part.path) == files


def test_a_preset_of_a_mixture_names_files_beside_it_and_is_trained_exactly_through_a_resume(folder, tmp_path, monkeypatch, micro):
    from tasks.session import training_config
    from tests.trainer.lives import digests
    from trainer.assemble import TrainingConfig, assemble
    from trainer.run import Run
    from trainer.rundir import RunDir

    monkeypatch.setenv("EVERSTEP_CACHE", str(tmp_path / "cache"))
    base = micro().to_dict()
    shared = {k: v for k, v in mixture(folder).to_dict().items() if k != "parts"}
    base["data"] = {**shared, "parts": [{"weight": w, "data": {"path": f"{n}.jsonl"}} for n, w in zip("abc", WEIGHTS, strict=True)]}
    (folder / "mine.yaml").write_text(json.dumps(base))
    config = load(str(folder / "mine.yaml"), [])
    assert config.data.parts[2].data.path == str(folder / "c.jsonl")
    training = TrainingConfig.model_validate(training_config(config))
    data = Path(prepare(config.data).path)
    for name, ends in (("whole", [6]), ("pieces", [2, 3, 6])):
        (tmp_path / name).mkdir()
        for end in ends:
            run = Run(training, assemble(training), RunDir(tmp_path / name), data)
            run.open()
            run.train_until(end)
            run.close()
    assert digests(tmp_path / "whole")[6] == digests(tmp_path / "pieces")[6]
