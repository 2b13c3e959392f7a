"""Packing: no token is lost, none is seen across a border, whichever way rows are filled and wherever windows end."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.prepare import TextDataConfig, TokenizerConfig
from tasks.preparation import prepare
from tasks.preparation.packing import Stream, best_fit, greedy
from tests.tasks.test_preparation import held, small, some_texts, unpacked, write_jsonl
from trainer.data import eval_batches, load_manifest

documents = st.lists(st.lists(st.integers(1, 9), max_size=30), max_size=12)
FIELDS = ("inputs", "targets", "segment_ids", "positions")


def stream_of(docs):
    return Stream(np.array([t for d in docs for t in d], np.int32), np.array([len(d) for d in docs], np.int64))


@pytest.mark.fault(36)
@given(documents, st.integers(2, 12), st.lists(st.integers(0, 12), max_size=4))
def test_unpacking_gives_back_all_documents_however_the_stream_was_cut_into_windows(docs, seq_len, cuts):
    total = sum(len(d) + 1 for d in docs)

    def pack(*borders):
        ends = sorted({0, total, *(min(total, b * seq_len) for b in borders)})
        windows = [greedy(stream_of(docs), start=a, stop=b, seq_len=seq_len, eos_id=0) for a, b in itertools.pairwise(ends)]
        return {field: np.concatenate([np.zeros((0, seq_len), np.int32), *(w[field] for w in windows)]) for field in FIELDS}

    rows = pack()
    assert all(a.dtype == np.int32 and a.shape == (math.ceil(total / seq_len), seq_len) for a in rows.values())
    assert unpacked(rows, 0) == docs
    assert (rows["segment_ids"] > 0).sum() == total
    assert all(np.array_equal(rows[f], again) for f, again in pack(*cuts).items())


def stretches(rows):
    """What stands in rows, as (inputs, targets) of each stretch, by the format's description alone."""
    for inputs, targets, segments, positions in zip(*(rows[field] for field in FIELDS), strict=True):
        numbers = [int(n) for i, n in enumerate(segments) if n and (i == 0 or segments[i - 1] != n)]
        assert numbers == list(range(1, len(numbers) + 1))
        for number in numbers:
            at = np.flatnonzero(segments == number)
            assert np.array_equal(at, np.arange(at[0], at[0] + len(at))) and np.array_equal(positions[at], np.arange(len(at)))
            yield tuple(inputs[at].tolist()), tuple(targets[at].tolist())
        assert not any(a[segments == 0].any() for a in (inputs, targets, positions))


def cut(docs, seq_len):
    """The stretches that documents should come to: whole, or in pieces of a row's length from their beginning."""
    for document in docs:
        inputs, targets = [0, *document], [*document, 0]
        for at in range(0, len(targets), seq_len):
            yield tuple(inputs[at : at + seq_len]), tuple(targets[at : at + seq_len])


@settings(deadline=None)
@given(documents, st.integers(2, 12))
def test_best_fit_cuts_nothing_that_fits_into_a_row_and_loses_nothing(docs, seq_len):
    rows = best_fit(stream_of(docs), seq_len=seq_len, eos_id=0)
    assert all(a.dtype == np.int32 and a.shape[1] == seq_len for a in rows.values())
    assert Counter(stretches(rows)) == Counter(cut(docs, seq_len))


@settings(deadline=None)
@given(st.lists(st.integers(1, 16), max_size=60))
def test_best_fit_places_as_the_algorithm_does_when_done_by_hand(sizes):
    rows = best_fit(stream_of([[1] * (size - 1) for size in sizes]), seq_len=16, eos_id=0)
    rooms = []
    for size in sorted(sizes, reverse=True):
        fitting = [room for room in rooms if room >= size]
        if fitting:
            rooms[rooms.index(min(fitting))] -= size
        else:
            rooms.append(16 - size)
    assert sorted((rows["segment_ids"] == 0).sum(axis=1).tolist()) == sorted(rooms)


def test_best_fit_fills_rows_nearly_and_cuts_far_fewer_documents_than_greedy(tmp_path):
    texts = some_texts(2000)
    path = str(write_jsonl(tmp_path / "a.jsonl", texts))
    config = TextDataConfig(path=path, tokenizer=TokenizerConfig(kind="byte"), seq_len=512)
    manifests = {way: load_manifest(prepare(config.replace(packing=way), cache=tmp_path).path) for way in ("greedy", "best_fit")}
    assert manifests["greedy"].digest != manifests["best_fit"].digest
    for manifest in manifests.values():
        for split in manifest.splits.values():
            assert split.utilisation == split.tokens / (split.rows * 512)
    assert manifests["greedy"].splits["train"].tokens == manifests["best_fit"].splits["train"].tokens
    assert manifests["greedy"].splits["train"].utilisation > 0.999 and manifests["best_fit"].splits["train"].utilisation > 0.9


@pytest.mark.parametrize("packing", ["greedy", "best_fit"])
def test_many_small_shards_hold_what_one_large_one_does(tmp_path, monkeypatch, packing):
    config = small(write_jsonl(tmp_path / "a.jsonl", some_texts(60)), seq_len=32, packing=packing)
    large = prepare(config, cache=tmp_path / "large")
    monkeypatch.setattr("tasks.preparation.shards.SHARD_TOKENS", 32 * 7)
    monkeypatch.setattr("tasks.preparation.shards.BATCH_TOKENS", 32 * 3)
    monkeypatch.setattr("tasks.preparation.tokens.PORTION", 500)
    monkeypatch.setattr("tasks.preparation.units.UNIT", 1000)
    many = prepare(config, cache=tmp_path / "many")
    shards = load_manifest(many.path).splits["train"].shards
    assert len(shards) > 10
    if packing == "greedy":
        assert {shard.rows for shard in shards[:-1]} == {7}
        for split in ("train", "val", "test"):
            assert held(many, split) == held(large, split)
    else:
        for split in ("train", "val", "test"):
            found = []
            for ref in (large, many):
                batches = list(eval_batches(ref.path, load_manifest(ref.path), split, batch_size=64))
                found.append(Counter(stretches({field: np.concatenate([batch[field] for batch in batches]) for field in FIELDS})))
            assert found[0] == found[1]
