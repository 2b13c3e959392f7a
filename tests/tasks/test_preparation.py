"""Preparation: nothing of the text is lost, nothing held out is in training, and it is done once, whole, whatever dies."""

import gzip
import hashlib
import json
import logging
import lzma
import math
import random
import re
import threading
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.prepare import TextDataConfig, TokenizerConfig
from tasks.preparation import prepare
from tasks.preparation.baseline import ByteModel
from trainer.data import eval_batches, load_manifest, load_tokenizer
from trainer.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
BYTES = TokenizerConfig(kind="byte")


def small(path, **changes):
    """A config that takes enough of 60 texts into each split."""
    return TextDataConfig(**{"path": str(path), "tokenizer": BYTES, "val_fraction": 0.1, "test_fraction": 0.1, **changes})


def write_jsonl(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def some_texts(count, seed=0):
    rng = random.Random(seed)
    words = ["how", "long", "a", "line", "of", "words", "may", "be", "is", "for", "each", "text", "to", "say"]
    return [f"{i} " + "\n\n".join(f"{i}.{p} " + " ".join(rng.choices(words, k=8)) for p in range(3)) for i in range(count)]


def unpacked(rows, eos):
    """The documents in packed rows, by the format's description alone: a stretch starts a document if it reads the end first."""
    documents = []
    for inputs, targets, segments, positions in zip(*(rows[f] for f in ("inputs", "targets", "segment_ids", "positions")), strict=True):
        for segment in range(1, segments.max(initial=0) + 1):
            place = np.flatnonzero(segments == segment)
            assert len(place) and np.array_equal(place, np.arange(place[0], place[0] + len(place)))
            assert np.array_equal(positions[place], np.arange(len(place)))
            if inputs[place[0]] == eos:
                documents.append([])
            else:  # goes on from the row before, reading what was predicted last there
                assert place[0] == 0 and inputs[0] == documents[-1][-1]
            assert np.array_equal(inputs[place[1:]], targets[place[:-1]])
            documents[-1] += targets[place].tolist()
        padding = segments == 0
        assert not any(a[padding].any() for a in (inputs, targets, positions))
    assert all(document[-1] == eos and eos not in document[:-1] for document in documents)
    return [document[:-1] for document in documents]


def held(ref, split):
    """The texts of a split, decoded from its rows."""
    manifest, tokenizer = load_manifest(ref.path), load_tokenizer(ref.path)
    batches = list(eval_batches(ref.path, manifest, split, batch_size=64))
    rows = {field: np.concatenate([batch[field] for batch in batches]) for field in batches[0]}
    return [tokenizer.decode(document) for document in unpacked(rows, manifest.eos_id)]


def paragraphs_of(text):
    return [stripped for part in re.split(r"\n\s*\n", text) if (stripped := part.strip())]


def files_of(folder):
    return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


@pytest.fixture(scope="module")
def bundled(tmp_path_factory):
    return prepare(TextDataConfig(), cache=tmp_path_factory.mktemp("bundled"))


def bundled_texts():
    with lzma.open(ROOT / "tasks" / "corpus" / "python-docs.jsonl.xz", "rt", encoding="utf-8") as f:
        return [json.loads(line)["text"] for line in f]


def test_no_held_out_paragraph_of_the_bundled_corpus_stands_in_training_and_no_text_is_lost(bundled):
    splits = {split: held(bundled, split) for split in ("train", "val", "test")}
    paragraphs = {split: {p.strip() for text in texts for p in re.split(r"\n\s*\n", text)} for split, texts in splits.items()}
    assert (
        not paragraphs["train"] & paragraphs["val"]
        and not paragraphs["train"] & paragraphs["test"]
        and not paragraphs["val"] & paragraphs["test"]
    )
    assert Counter(text for texts in splits.values() for text in texts) == Counter(bundled_texts())  # it has no duplicates to lose
    manifest = load_manifest(bundled.path)
    for split, texts in splits.items():
        record = manifest.splits[split]
        assert (record.documents, record.bytes) == (len(texts), sum(len(text.encode()) for text in texts))
        assert record.tokens == sum((b["segment_ids"] > 0).sum() for b in eval_batches(bundled.path, manifest, split, batch_size=64))
    assert 2.0 < manifest.baseline["val"] < 2.8 and 2.0 < manifest.baseline["test"] < 2.8
    assert manifest.vocab_size == 4096


@pytest.mark.parametrize("seed", range(3))
def test_what_is_left_out_is_what_a_plain_reading_of_the_rules_leaves_out(tmp_path, monkeypatch, seed):
    monkeypatch.setattr("tasks.preparation.units.UNIT", 300)  # duplicates stand in different units
    rng = random.Random(seed)
    pool = [f"paragraph {i}" for i in range(60)]
    blanks = ["\n\n", "\n \n", "\n\n\n  ", "\r\n\r\n"]
    texts = ["".join(p + rng.choice(blanks) for p in rng.choices(pool, k=rng.randint(1, 6))) for _ in range(70)]
    texts += [f"own {i}" for i in range(20)] + rng.choices(texts, k=5)
    splits = defaultdict(list)
    for text in dict.fromkeys(texts):
        at = int(hashlib.sha256(text.encode()).hexdigest(), 16) / 2**256
        splits["test" if at < 0.1 else "val" if at < 0.25 else "train"].append(paragraphs_of(text))
    stands = {split: {p for paragraphs in docs for p in paragraphs} for split, docs in splits.items()}
    hidden = {"test": set(), "val": stands["test"], "train": stands["test"] | stands["val"]}
    kept = {split: [[p for p in paragraphs if p not in hidden[split]] for paragraphs in docs] for split, docs in splits.items()}

    for i in range(5):
        write_jsonl(tmp_path / f"{i}.jsonl", texts[i * 19 : (i + 1) * 19])
    assert len(texts) == 5 * 19
    path = str(tmp_path / "*.jsonl")
    ref = prepare(TextDataConfig(path=path, tokenizer=BYTES, val_fraction=0.15, test_fraction=0.1), cache=tmp_path)
    duplicates = load_manifest(ref.path).duplicates
    for split in splits:
        assert [paragraphs_of(text) for text in held(ref, split)] == [paragraphs for paragraphs in kept[split] if paragraphs]
    assert duplicates.documents == len(texts) - len(set(texts)) >= 1
    lost = sum(len(a) - len(b) for split in splits for a, b in zip(splits[split], kept[split], strict=True))
    assert duplicates.paragraphs == lost > 0


@pytest.fixture(scope="module")
def tokenizers(bundled, tmp_path_factory):
    from tasks.preparation.tokenizer import make_byte

    path = tmp_path_factory.mktemp("byte") / "tokenizer.json"
    make_byte().save(str(path))
    return load_tokenizer(bundled.path), load_tokenizer(path)


ODD_TEXTS = ["<|eos|>", " a\r\n\tb  ", "\x00", "e\u0301 \u00e9", "\ufeff"]


@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(ODD_TEXTS))
@settings(deadline=None)
def test_any_text_comes_back_exactly_and_no_text_reads_as_an_end(tokenizers, text):
    bpe, byte = tokenizers
    for tokenizer in tokenizers:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and tokenizer.eos_id not in ids
    assert byte.vocab_size == 257 and len(byte.encode(text)) == len(text.encode())
    assert bpe.vocab_size == 4096


def test_the_same_text_gives_the_same_bytes_wherever_it_lies_and_other_settings_another_place(tmp_path, bundled):
    again = prepare(TextDataConfig(), cache=tmp_path / "a")
    assert again.digest == bundled.digest and files_of(again.path) == files_of(bundled.path)
    texts = some_texts(60)
    config = small(write_jsonl(tmp_path / "a.jsonl", texts))
    ref = prepare(config, cache=tmp_path)
    with gzip.open(tmp_path / "b.jsonl.gz", "wt") as f:
        f.writelines(json.dumps({"body": text}) + "\n" for text in texts)
    moved = config.replace(path=str(tmp_path / "b.jsonl.gz"), text_field="body", batch_size=3)
    assert prepare(moved, cache=tmp_path) == ref
    others = [config.replace(seq_len=64), config.replace(val_fraction=0.11), config.replace(tokenizer=TokenizerConfig(vocab_size=300))]
    assert len({ref.digest, *(prepare(other, cache=tmp_path).digest for other in others)}) == 4


def test_a_given_tokenizer_is_used_as_it_is_and_is_part_of_the_digest(tmp_path, bundled):
    given_file = tmp_path / "mine.json"
    given_file.write_bytes((Path(bundled.path) / "tokenizer.json").read_bytes())
    path = write_jsonl(tmp_path / "a.jsonl", some_texts(60))
    config = small(path, tokenizer=TokenizerConfig(kind="file", path=str(given_file)))
    ref = prepare(config, cache=tmp_path)
    assert files_of(ref.path)["tokenizer.json"] == given_file.read_bytes() and load_manifest(ref.path).vocab_size == 4096
    given_file.write_bytes(given_file.read_bytes() + b"\n")
    assert prepare(config, cache=tmp_path).digest != ref.digest
    with pytest.raises(DataError, match="nowhere"):
        prepare(config.replace(tokenizer={"kind": "file", "path": str(tmp_path / "nowhere.json")}), cache=tmp_path)


def test_of_two_preparations_of_the_same_data_the_second_waits_and_finds_it_done(tmp_path):
    config = small(write_jsonl(tmp_path / "a.jsonl", some_texts(60)))
    first_works, second_waits = threading.Event(), threading.Event()
    refs, said = {}, {"first": [], "second": []}

    def first(message):
        said["first"].append(message)
        if message.startswith("packing"):
            first_works.set()
            assert second_waits.wait(30)

    def second(message):
        said["second"].append(message)
        if message.startswith("waiting"):
            second_waits.set()

    thread = threading.Thread(target=lambda: refs.update(first=prepare(config, cache=tmp_path, on_progress=first)))
    thread.start()
    assert first_works.wait(30)
    refs["second"] = prepare(config, cache=tmp_path, on_progress=second)
    thread.join()
    assert refs["first"] == refs["second"]
    assert not any(message.startswith("packing") for message in said["second"])


def test_damaged_data_is_set_aside_with_a_warning_and_made_again(tmp_path, caplog):
    config = small(write_jsonl(tmp_path / "a.jsonl", some_texts(60)))
    ref = prepare(config, cache=tmp_path)
    good = files_of(ref.path)
    for n, name in enumerate(("manifest.json", "train-00000.arrow"), 1):
        file = Path(ref.path, name)
        file.write_bytes(file.read_bytes()[:-5])
        with caplog.at_level(logging.WARNING):
            assert prepare(config, cache=tmp_path) == ref
        aside = Path(f"{ref.path}.damaged-{n}")
        assert files_of(ref.path) == good and files_of(aside)[name] == good[name][:-5]
        assert str(aside) in caplog.text and name in caplog.text


def test_data_that_changes_while_it_is_prepared_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.preparation.build.SPOOLED", 0)  # large text is not kept between the readings
    config = small(write_jsonl(tmp_path / "a.jsonl", some_texts(60)))

    def change(message):
        if message.startswith("read "):
            write_jsonl(tmp_path / "a.jsonl", some_texts(61))

    with pytest.raises(DataError, match="changed while it was prepared"):
        prepare(config, cache=tmp_path, on_progress=change)
    assert not [p for p in (tmp_path / "data").iterdir() if p.is_dir() and p.name != "work" and not p.name.startswith(".")]


def test_text_is_kept_between_the_readings_so_that_what_was_first_read_is_prepared_and_then_let_go(tmp_path, monkeypatch):
    before = prepare(small(write_jsonl(tmp_path / "a.jsonl", some_texts(60))), cache=tmp_path / "before")
    kept = []

    def change(message):
        if message.startswith("read "):
            kept.extend((tmp_path / "data" / "work" / "text").iterdir())
            write_jsonl(tmp_path / "a.jsonl", some_texts(61))

    ref = prepare(small(tmp_path / "a.jsonl"), cache=tmp_path, on_progress=change)
    assert kept and ref.digest == before.digest
    assert {k: v for k, v in files_of(ref.path).items() if k.endswith(".arrow")} == {
        k: v for k, v in files_of(before.path).items() if k.endswith(".arrow")
    }
    assert not any(path.exists() for path in kept), "it takes as much room as the text"
    for limit in (0, 100):  # kept or not, the bytes are the same
        monkeypatch.setattr("tasks.preparation.survey.SPOOL_LIMIT", limit)
        again = prepare(small(tmp_path / "a.jsonl"), cache=tmp_path / str(limit))
        assert not list((tmp_path / str(limit) / "data" / "work" / "text").glob("*"))
        monkeypatch.setattr("tasks.preparation.survey.SPOOL_LIMIT", 10**9)
        assert files_of(again.path) == files_of(prepare(small(tmp_path / "a.jsonl"), cache=tmp_path / f"all{limit}").path)


def test_progress_says_what_there_is_to_say_and_no_more(monkeypatch):
    from tasks.preparation.progress import Progress

    class Job:
        size = 9_000_000

    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    stage = Progress("tokenizing", [Job(), Job(), Job()])
    assert (str(stage), stage.fraction) == ("tokenizing 0/3", 0.0)
    clock[0] = 100.0
    stage.add(Job(), {"splits": {"train": {"tokens": 2_000_000}, "val": {"tokens": 500_000}}})
    assert str(stage) == "tokenizing 1/3, 0.1 MB/s, 2.5 M tokens, ETA 3:20" and stage.fraction == pytest.approx(1 / 3)
    stage.add(Job(), {})
    stage.add(Job(), {})
    assert "ETA" not in str(stage) and stage.fraction == 1.0
    assert (str(Progress("making the tokenizer", [])), Progress("", []).fraction) == ("making the tokenizer", 0.0)


def test_a_cache_that_cannot_be_is_named(tmp_path):
    (tmp_path / "cache").write_text("a file stands where the folder should be")
    with pytest.raises(DataError, match="set EVERSTEP_CACHE"):
        prepare(small(write_jsonl(tmp_path / "a.jsonl", some_texts(60))), cache=tmp_path / "cache")


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", GOOD + b'{"text": "torn\n', r"a\.jsonl:2 is no JSON"),
        ("a.jsonl", GOOD + b"\n[1]\n", r"a\.jsonl:3 is a JSON list"),
        ("a.jsonl", GOOD + b'{"body": "x", "id": 1}\n', r"a\.jsonl:2 has no field 'text', only 'body', 'id'; set data.text_field"),
        ("a.jsonl", GOOD + b'{"text": null}\n', r"a\.jsonl:2: field 'text' is None"),
        ("a.jsonl", GOOD + b'{"text": "\\ud800"}\n', r"a\.jsonl:2: .*no Unicode"),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', r"a\.jsonl:2 is no UTF-8"),
        ("a.txt", b"one\ntwo\n\xff", r"a\.txt:3 is no UTF-8"),
        ("a.jsonl.gz", gzip.compress(GOOD * 9, mtime=0)[:-12], r"a\.jsonl\.gz:\d+ and all after it cannot be unpacked"),
        ("a.jsonl.xz", b"no xz", r"a\.jsonl\.xz:1 and all after it cannot be unpacked"),
        ("a.parquet", b"no parquet", r"a\.parquet is no Parquet file"),
        ("a.txt", b" \n", "holds no text"),
        ("a.png", b"x", "holds 1 files, but none that is read"),
        ("", b"", "holds 0 files, but none that is read"),
        ("a.txt", b"a single text", r"test_fraction 0\.05 .* takes no document; .*more documents \(there are 1;"),
    ],
)
def test_what_is_no_text_is_refused_with_file_and_line(tmp_path, name, data, message):
    folder = tmp_path / "texts"
    folder.mkdir()
    if name:
        (folder / name).write_bytes(data)
    with pytest.raises(DataError, match=message):
        prepare(TextDataConfig(path=str(folder)), cache=tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.suffix in (".arrow", ".json")]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere/at-all", "there is no nowhere/at-all"),
        ("bundled:x", "bundled:python-docs"),
        ("nope://x", "nope"),
        ("*.no-such-kind", "none that is read"),
    ],
)
def test_a_path_that_names_nothing_is_refused(tmp_path, path, message):
    with pytest.raises(DataError, match=message):
        prepare(TextDataConfig(path=path), cache=tmp_path)


def test_a_parquet_row_that_is_no_text_is_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    torn = pa.Array.from_buffers(pa.string(), 1, [None, pa.py_buffer(np.array([0, 1], np.int32)), pa.py_buffer(b"\xff")])
    pq.write_table(pa.table({"text": torn}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet row 1 is no UTF-8"):
        prepare(TextDataConfig(path=str(tmp_path)), cache=tmp_path)
    pq.write_table(pa.table({"text": ["fine", None], "n": [1, 2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet row 2: field 'text' is None"):
        prepare(TextDataConfig(path=str(tmp_path)), cache=tmp_path)
    with pytest.raises(DataError, match=r"no column 'body', only 'text', 'n'"):
        prepare(TextDataConfig(path=str(tmp_path), text_field="body"), cache=tmp_path)


def test_the_fraction_that_an_error_advises_is_enough(tmp_path):
    path = str(write_jsonl(tmp_path / "a.jsonl", some_texts(12)))
    config = TextDataConfig(path=path, tokenizer=BYTES, val_fraction=0.001, test_fraction=0.001)
    for field in ("test_fraction", "val_fraction"):
        with pytest.raises(DataError, match=f"{field} 0.001") as caught:
            prepare(config, cache=tmp_path)
        config = config.replace(**{field: float(re.search(rf"raise data.{field} to ([\d.]+)", str(caught.value))[1])})
    splits = load_manifest(prepare(config, cache=tmp_path).path).splits
    assert all(splits[split].rows for split in ("train", "val", "test"))


def test_without_a_test_fraction_there_is_no_test_split(tmp_path):
    config = small(write_jsonl(tmp_path / "a.jsonl", some_texts(60)), test_fraction=0)
    manifest = load_manifest(prepare(config, cache=tmp_path).path)
    assert sorted(manifest.splits) == ["train", "val"] and "test" not in manifest.baseline


def bits_per_byte_by_hand(training, held_out):
    """Witten-Bell, one symbol at a time: orders 1 to 5 over dictionaries, order 0 uniform over 257 symbols."""
    counts = defaultdict(Counter)
    for text in training:
        symbols = [256] * 4 + list(text.encode()) + [256]
        for i in range(4, len(symbols)):
            for n in range(5):
                counts[tuple(symbols[i - n : i])][symbols[i]] += 1
    bits = 0.0
    for text in held_out:
        symbols = [256] * 4 + list(text.encode()) + [256]
        for i in range(4, len(symbols)):
            p = 1 / 257
            for n in range(5):
                if after := counts.get(tuple(symbols[i - n : i])):
                    p = (after[symbols[i]] + len(after) * p) / (after.total() + len(after))
            bits -= math.log2(p)
    return bits / sum(len(text.encode()) for text in held_out)


def test_the_baseline_is_what_counting_by_hand_gives(monkeypatch):
    texts = bundled_texts()
    training, held_out = [t[:700] for t in texts[:40]] + ["", "é\x00\xff"], [t[:500] for t in texts[40:50]] + ["", "日本"]
    expected = bits_per_byte_by_hand(training, held_out)
    assert ByteModel.train(training).bits_per_byte(held_out) == pytest.approx(expected, rel=1e-12)
    monkeypatch.setattr("tasks.preparation.baseline.PORTION", 900)  # portions change nothing
    assert ByteModel.train(training).bits_per_byte(held_out) == pytest.approx(expected, rel=1e-12)
