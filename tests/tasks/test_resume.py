"""Preparation as jobs: the same bytes whoever runs them, however often they are killed, and nothing is done twice."""

import os
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs.prepare import TokenizerConfig
from tasks.preparation import prepare, results
from tests.tasks.test_preparation import files_of, held, small, some_texts, write_jsonl
from trainer.data import load_manifest
from trainer.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
BPE = TokenizerConfig(vocab_size=300, sample_bytes=4000)


@pytest.fixture(autouse=True)
def units_of_a_few_documents(monkeypatch):
    monkeypatch.setattr("tasks.preparation.units.UNIT", 1000)
    monkeypatch.setattr("tasks.preparation.shards.SHARD_TOKENS", 512)


@pytest.fixture
def folder(tmp_path):
    """Twelve files of unequal size, some of which say the same."""
    texts = some_texts(200)
    rng = random.Random(0)
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(12):
        some = [texts.pop() for _ in range(min(len(texts), rng.choice([1, 2, 3, 40])))]
        write_jsonl(folder / f"{i:02}.jsonl", some + (texts[:1] if i % 3 else []))
    return folder


@pytest.fixture
def writes(monkeypatch):
    """The kinds of the results that were written."""
    found = []
    write = results.write

    def counting(path, *args):
        found.append(path.parent.name)
        write(path, *args)

    monkeypatch.setattr(results, "write", counting)
    return found


def in_any_order(jobs, done):
    found = {}
    for i in random.Random(len(jobs)).sample(range(len(jobs)), len(jobs)):
        found[i] = jobs[i].run()
        done(jobs[i], found[i])
    return [found[i] for i in range(len(jobs))]


def in_threads(jobs, done):
    with ThreadPoolExecutor(5) as pool:
        found = list(pool.map(lambda job: job.run(), jobs))
    for job, one in zip(jobs, found, strict=True):
        done(job, one)
    return found


@pytest.mark.parametrize("packing", ["greedy", "best_fit"])
def test_who_runs_the_jobs_and_where_units_end_changes_no_byte(tmp_path, folder, monkeypatch, packing):
    config = small(folder, tokenizer=BPE, packing=packing, seq_len=32)
    one = prepare(config, cache=tmp_path / "one")
    assert len(load_manifest(one.path).splits["train"].shards) > 5
    for name, run in (("order", in_any_order), ("threads", in_threads)):
        again = prepare(config, cache=tmp_path / name, run=run)
        assert again.digest == one.digest and files_of(again.path) == files_of(one.path)
    for unit in (300, 5000, 10**9):
        monkeypatch.setattr("tasks.preparation.units.UNIT", unit)
        again = prepare(config, cache=tmp_path / str(unit))
        assert again.digest == one.digest and files_of(again.path) == files_of(one.path)


KILLED = """
import os, signal, sys
from pathlib import Path
from configs.prepare import TextDataConfig
from tasks.preparation import prepare, shards, units

units.UNIT, shards.SHARD_TOKENS = 1000, 512
left = int(sys.argv[3])

def advance(progress):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)

prepare(TextDataConfig.model_validate_json(sys.argv[1]), cache=Path(sys.argv[2]), on_advance=advance)
"""


def test_a_killed_preparation_goes_on_where_it_was_and_is_the_same_to_the_byte(tmp_path, folder, writes):
    config = small(folder, tokenizer=BPE, seq_len=32)
    advances = []
    whole = prepare(config, cache=tmp_path / "whole", on_advance=lambda progress: advances.append(progress.stage))
    all_of_it = len(writes)
    shards = len(load_manifest(whole.path).splits["train"].shards)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for after in (3, len(advances) // 2, len(advances) - 2):
        cache = tmp_path / f"cache-{after}"
        command = [sys.executable, "-c", KILLED, config.model_dump_json(), str(cache), str(after)]
        assert subprocess.run(command, cwd=ROOT, env=env, check=False).returncode == -9
        assert not [p for p in (cache / "data").iterdir() if p.name == Path(whole.path).name]
        kept = len(list((cache / "data" / "work").rglob("*.bin")))
        if after == len(advances) - 2:
            old = {p.name: p.stat().st_mtime_ns for p in (cache / "data").glob(".*.building/train-*.arrow")}
            assert len(old) == shards
        writes.clear()
        again = prepare(config, cache=cache)
        assert len(writes) == all_of_it - kept and kept > 0
        assert again.digest == whole.digest and files_of(again.path) == files_of(whole.path)
        if after == len(advances) - 2:
            assert {name: Path(again.path, name).stat().st_mtime_ns for name in old} == old


def test_results_that_are_torn_or_damaged_are_made_again(tmp_path, folder):
    config = small(folder, tokenizer=BPE, seq_len=32)
    whole = prepare(config, cache=tmp_path)
    good = files_of(whole.path)
    rng = random.Random(0)
    for damage in (lambda d: d[: rng.randrange(len(d))], lambda d: bytes([*d[:-9], d[-9] ^ 4, *d[-8:]]), lambda d: b""):
        Path(whole.path).rename(tmp_path / f"away{rng.random()}")
        for path in (tmp_path / "data" / "work").rglob("*.bin"):
            if rng.random() < 0.6:
                path.write_bytes(damage(path.read_bytes()))
        again = prepare(config, cache=tmp_path)
        assert again == whole and files_of(again.path) == good


def test_a_shard_that_was_left_damaged_is_made_again(tmp_path, folder):
    config = small(folder, seq_len=32)
    whole = prepare(config, cache=tmp_path / "whole")

    class Stop(Exception):
        pass

    def stop(progress):
        if progress.stage == "packing" and progress.jobs_done == progress.num_jobs:
            raise Stop

    with pytest.raises(Stop):
        prepare(config, cache=tmp_path / "cache", on_advance=stop)
    shards = sorted((tmp_path / "cache" / "data").glob(".*.building/*.arrow"))
    assert len(shards) > 5
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    shards[1].write_bytes(shards[1].read_bytes()[:-1] + b"x")
    shards[2].unlink()
    again = prepare(config, cache=tmp_path / "cache")
    assert files_of(again.path) == files_of(whole.path)


def test_what_did_not_change_is_not_done_again(tmp_path, folder, writes):
    config = small(folder, seq_len=32)
    prepare(config, cache=tmp_path)
    writes.clear()
    assert prepare(config, cache=tmp_path) and not writes
    write_jsonl(folder / "05.jsonl", ["a new text"])
    prepare(config, cache=tmp_path)
    assert writes.count("read") <= 2 and writes.count("tokens") <= 2
    units = len(list((tmp_path / "data" / "work" / "tokens").iterdir()))
    assert units > 12
    writes.clear()
    prepare(config.replace(seq_len=64, packing="best_fit"), cache=tmp_path)
    assert set(writes) == {"known"}, "tokens are the same for rows of another length"


def test_a_limit_takes_the_first_documents_and_reads_not_much_more(tmp_path, folder, writes):
    config = small(folder, seq_len=32, val_fraction=0.2, test_fraction=0.2)
    everything = [item for split in ("train", "val", "test") for item in held(prepare(config, cache=tmp_path / "all"), split)]
    assert len(everything) > 60
    read = writes.count("read")
    for limit in (20, 47):
        writes.clear()
        ref = prepare(config.replace(limit=limit), cache=tmp_path / "some")
        manifest = load_manifest(ref.path)
        assert sum(source.documents for source in manifest.sources) == limit
        assert sum(split.documents for split in manifest.splits.values()) == limit - manifest.duplicates.documents
        assert writes.count("read") < read
        assert {text for split in manifest.splits for text in held(ref, split)} <= set(everything)
    assert prepare(config.replace(limit=10**6), cache=tmp_path / "some").digest == prepare(config, cache=tmp_path / "some").digest


def test_bad_rows_are_left_out_up_to_a_limit_over_all_files_and_stand_in_the_report(tmp_path, folder):
    (folder / "03.jsonl").write_text('{"text": null}\n' + (folder / "03.jsonl").read_text() + "{no JSON\n")
    (folder / "07.jsonl").write_text(f'{{"body": 1}}\n{{"text": ""}}\n{(folder / "07.jsonl").read_text()}')
    with pytest.raises(DataError, match=r"03\.jsonl:1: field 'text' is None(.|\n)*max_bad_rows allows 0"):
        prepare(small(folder), cache=tmp_path)
    with pytest.raises(
        DataError, match=r"03\.jsonl:1(.|\n)*03\.jsonl:\d+ is no JSON(.|\n)*07\.jsonl:1 has no field(.|\n)*3 rows.*allows 2"
    ):
        prepare(small(folder, max_bad_rows=2), cache=tmp_path)
    ref = prepare(small(folder, max_bad_rows=3), cache=tmp_path)
    assert load_manifest(ref.path).left_out == {"empty": 1, "no JSON": 1, "no field": 1, "null": 1}
    report = Path(ref.path, "report.md").read_text()
    assert "03.jsonl:1: field 'text' is None" in report and "- 1 rows: no JSON" in report
    with pytest.raises(DataError, match="max_bad_rows allows 2"):  # what is known by now is judged again
        prepare(small(folder, max_bad_rows=2), cache=tmp_path)


def test_the_sample_of_the_tokenizer_is_drawn_by_its_seed_and_no_larger_than_asked(tmp_path, folder):
    def merges(**changes):
        config = small(folder, tokenizer=TokenizerConfig(**{"vocab_size": 400, "sample_bytes": 3000, **changes}))
        return Path(prepare(config, cache=tmp_path).path, "tokenizer.json").read_bytes()

    assert merges() == merges() and merges() != merges(seed=1) != merges(seed=2)
    assert merges(sample_bytes=10**6) == merges(sample_bytes=10**7, seed=5)
    specials = TokenizerConfig(vocab_size=400, specials=("<|user|>", "<|end|>"))
    ref = prepare(small(folder, tokenizer=specials), cache=tmp_path)
    from trainer.data import load_tokenizer

    tokenizer = load_tokenizer(ref.path)
    assert tokenizer._inner.token_to_id("<|user|>") == 1 and 1 not in tokenizer.encode("<|user|>")
