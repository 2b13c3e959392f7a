"""`everstep data show`: what a run reads at a step is what is shown, through resumes and batches that were left out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from configs.load import to_json
from configs.prepare import TextDataConfig
from flows.data import LETTERS, show
from tasks.preparation import prepare
from tasks.session import training_config
from trainer.assemble import TrainingConfig, assemble
from trainer.data import load_manifest, load_tokenizer
from trainer.errors import CheckpointError, ConfigError, DataError
from trainer.files import seal
from trainer.run import Run
from trainer.rundir import RunDir

OVERRIDES = {
    "plain": (),
    "left out and in microbatches": ("data.leave_out=[[1,3],[4,5]]", "trainer.gradient_accumulate_steps=2"),
    "two steps a dispatch": ("trainer.steps_per_dispatch=2", "trainer.logger.log_every_n_steps=2"),
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def trained(micro, tmp_path, monkeypatch, cache):
    """`trained(*overrides)`: (run directory, batches that the trainer was given) of a run of two lives."""
    monkeypatch.setenv("EVERSTEP_CACHE", str(cache))

    def train(*overrides, data=None):
        config, consumed = micro(*overrides), {}
        if data:
            config = type(config).model_validate({**config.to_dict(), "data": data(config.data.to_dict())})
        training = TrainingConfig.model_validate(training_config(config))
        place = tmp_path / "run"
        place.mkdir()
        (place / "config.json").write_text(to_json(config))
        for until in (2, 6):  # the first life ends at step 2, with batches read ahead
            trainer, given = assemble(training), []
            trainer.put_train = lambda batches, given=given, put=trainer.put_train: given.extend(batches) or put(batches)
            run = Run(training, trainer, RunDir(place), Path(prepare(config.data).path))
            start = run.open().step
            run.train_until(until)
            run.close()
            consumed |= dict(enumerate(given[: until - start], start + 1))
        return place, consumed

    return train


def shown(capsys, place, step, **options):
    capsys.readouterr()
    show(str(place), step=step, as_json=True, **options)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("how", OVERRIDES)
def test_the_batch_of_a_step_is_the_one_that_was_trained(trained, capsys, micro, how):
    place, consumed = trained(*OVERRIDES[how])
    tokenizer = load_tokenizer(prepare(micro(*OVERRIDES[how]).data).path)
    assert sorted(consumed) == [1, 2, 3, 4, 5, 6]
    texts = set()
    for step, batch in consumed.items():
        rows = shown(capsys, place, step)["rows"]
        assert [row["row"] for row in rows] == list(range(len(batch["inputs"])))
        for row in rows:
            targets, segments = batch["targets"][row["row"]], batch["segment_ids"][row["row"]]
            borders = np.flatnonzero(np.diff(segments)) + 1
            parts = [ids for ids, own in zip(np.split(targets, borders), np.split(segments, borders), strict=True) if own[0]]
            assert row["documents"] == [tokenizer.decode(ids) for ids in parts]
            assert row["padding"] == int((segments == 0).sum())
        texts.add(json.dumps(rows))
    assert len(texts) == 6, "the batches differ, so a wrong one would be seen"


def mixed(data):
    shared = {key: data[key] for key in ("seq_len", "batch_size", "tokenizer", "val_fraction", "test_fraction")}
    parts = [{"weight": w, "data": {"path": f"{data['path']}/{glob}"}} for w, glob in ((3, "0*.txt"), (1, "1*.txt"))]
    return {"kind": "mixture", "parts": parts, **shared}


def elsewhere(data):
    ref = prepare(TextDataConfig.model_validate(data))
    return {"kind": "packed", "path": f"file://{ref.path}", "seq_len": data["seq_len"], "batch_size": data["batch_size"]}


@pytest.mark.parametrize("data", [mixed, elsewhere])
def test_the_batch_is_the_one_that_was_trained_of_a_mixture_and_of_data_elsewhere_too(trained, capsys, data):
    place, consumed = trained("seed=3", data=data)
    texts = set()
    for step, batch in consumed.items():
        rows = shown(capsys, place, step)["rows"]
        for row, targets, segments in zip(rows, batch["targets"], batch["segment_ids"], strict=True):
            # Byte tokens: 0 is the end, and 1 to 256 are the bytes in the order of their letters; these texts are ASCII.
            assert "".join(row["documents"]) == "".join(chr(t - 1 + 33) if t < 95 else " " for t in targets[segments > 0] if t)
        texts.add(json.dumps(rows))
    assert len(texts) == 6


def test_one_row_is_shown_and_long_documents_are_cut_unless_all_is_asked_for(trained, capsys):
    place, _ = trained("data.seq_len=512", "data.batch_size=2")
    whole = shown(capsys, place, 1)
    assert shown(capsys, place, 1, row=1)["rows"] == whole["rows"][1:2]
    long = [text for row in whole["rows"] for text in row["documents"] if len(text) > LETTERS]
    show(str(place), step=1)
    cut = capsys.readouterr().out
    show(str(place), step=1, full=True)
    full = capsys.readouterr().out
    assert long and all(text in full and text not in cut and text[:LETTERS] in cut for text in long)
    assert "place 0" in full and "--- row 1" in full


def test_what_is_no_step_no_row_or_no_longer_there_is_refused_with_the_way_out(trained, capsys, cache):
    place, _ = trained()
    for step in (0, -1, 7):
        with pytest.raises(ConfigError, match="1 to 6"):
            show(str(place), step=step)
    for row in (-1, 4):
        with pytest.raises(ConfigError, match="0 to 3"):
            show(str(place), step=1, row=row)
    folder = cache / "data" / shown(capsys, place, 1)["data"][:16]
    other = json.loads((folder / "manifest.json").read_text())
    assert load_manifest(folder).digest == other["digest"]
    aside = folder.with_name("aside")
    folder.rename(aside)
    with pytest.raises(DataError, match=rf"{folder.name}, is not in .*everstep eval"):
        show(str(place), step=1)
    shutil.copytree(aside, folder)
    del other["crc32c"]
    (folder / "manifest.json").write_bytes(seal({**other, "digest": "f" * 64}))
    with pytest.raises(DataError, match=r"holds data ffff.*delete"):
        show(str(place), step=1)
    shutil.rmtree(folder)
    aside.rename(folder)
    shutil.rmtree(place / "checkpoints")
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        show(str(place), step=1)
