"""Between the readings: which documents stay, in which split, without which paragraphs, and what the whole is called.

Of equal documents the first stays, in the order of file names and rows. A paragraph that stands in several splits stays in
the smallest: test before val before train. Held-out text is never thinned by what happens to stand in training, and no
held-out paragraph can be learnt by heart; texts that are mixed keep to this together. Everything here is a function of the
documents' hashes in their order, so of nothing that differs between machines, workers or lives.

In memory at a time: about 60 bytes for each document, and 16 for each paragraph that is held out.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from configs.prepare import TextDataConfig
from trainer.data.packed import VERSION, SourceRecord
from trainer.errors import DataError

from . import results
from .documents import DROPPED, FOR_BASELINE, FOR_TOKENIZER, SPLITS, splits_of
from .hashes import HashSet, firsts, places, to_bytes
from .survey import NAMED, bad_rows, refusal, say
from .units import Unit

# Of each split, for the baseline and, in the report, for the eye. Counting takes about 0.2 s of a core for a megabyte.
SAMPLE_BYTES = {"train": 4_000_000, "val": 1_000_000, "test": 1_000_000}


class Settled(NamedTuple):
    """What is to be made."""

    digest: str
    fates: list[Path]  # of each unit: a result with `split` (documents), int8, and `taken` (paragraphs), bool
    sampled: list[np.ndarray]  # of each unit, uint8: what documents are drawn for, FOR_BASELINE and FOR_TOKENIZER
    documents: dict[str, int]  # of each split
    duplicates: int
    paragraphs: int  # left out because they are held out elsewhere
    sources: tuple[SourceRecord, ...]
    left_out: dict[str, int]  # rows that are no documents, by reason
    bad: list[str]  # some of them


def header_of(config: TextDataConfig, tokenizer_file: bytes | None, versions: dict[str, str]) -> dict[str, Any]:
    """What else than documents decides what is prepared."""
    given = hashlib.sha256(tokenizer_file).hexdigest() if tokenizer_file is not None else None
    return {"version": VERSION, "settings": config.prepare_settings(), "tokenizer_file": given, "versions": versions}


class _Documents(NamedTuple):
    """All documents of the surveys, in their order."""

    facts: list[dict[str, Any]]  # of each unit
    hashes: np.ndarray
    sizes: np.ndarray
    per_unit: np.ndarray
    starts: np.ndarray  # of each unit
    limit: int
    places: np.ndarray
    first: np.ndarray  # bool: of equal ones the first, within the limit
    split: np.ndarray  # int8

    def own(self, i: int) -> slice:
        """Where unit `i` is."""
        return slice(self.starts[i], self.starts[i] + self.per_unit[i])


def _documents_of(config: TextDataConfig, paths: list[Path]) -> _Documents:
    facts, parts, lengths = [], [], []
    for path in paths:
        survey = results.needed(path)
        facts.append(survey.facts)
        parts.append(survey.arrays["documents"].copy())
        lengths.append(survey.arrays["sizes"].copy())
    hashes, per_unit = np.concatenate(parts), np.array([len(part) for part in parts])
    limit = len(hashes) if config.limit is None else min(config.limit, len(hashes))
    at = places(hashes)
    first = np.zeros(len(hashes), bool)
    first[:limit] = firsts(hashes[:limit])
    split = np.where(first, splits_of(at, val=config.val_fraction, test=config.test_fraction), DROPPED).astype(np.int8)
    return _Documents(facts, hashes, np.concatenate(lengths), per_unit, np.cumsum(per_unit) - per_unit, limit, at, first, split)


HeldOut = dict[str, np.ndarray]  # hashes of the paragraphs in "val" and "test"


def held_out(config: TextDataConfig, paths: list[Path]) -> HeldOut:
    """The paragraphs that a text holds out, by its surveys, for other texts to leave out of their training."""
    found = _documents_of(config, paths)
    return _held_out((results.needed(path), found.split[found.own(i)]) for i, path in enumerate(paths))


def settle(
    config: TextDataConfig,
    header: dict[str, Any],
    units: list[Unit],
    paths: list[Path],
    *,
    folder: Path,
    others: Sequence[HeldOut] = (),
) -> Settled:
    """Decide, from the surveys at `paths`, and write down the fates below `folder`; `others`: what texts trained beside this hold out.

    Raises DataError if too many rows are bad or a split would be empty.
    """
    found = _documents_of(config, paths)
    split, starts, limit, hashes, sizes = found.split, found.starts, found.limit, found.hashes, found.sizes
    left_out, bad = _left_out(config, units, found.facts, starts, limit)
    _check(config, found.places[found.first])
    digest = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    digest.update(to_bytes(hashes[:limit]))

    # Surveys are read again where they are needed: all at once are more than fits, or than a process may have open.
    own = _sets([_held_out((results.needed(path), split[found.own(i)]) for i, path in enumerate(paths))])
    theirs = _sets(others)
    fates, removed, for_others = [], 0, []
    for i, path in enumerate(paths):
        survey = results.needed(path)
        taken = _taken(survey, split[found.own(i)], own)
        if others:
            more = _taken(survey, split[found.own(i)], theirs) & ~taken
            for_others.append(survey.arrays["paragraphs"][more])
            taken |= more
        split[found.own(i)] = _what_stays(survey, split[found.own(i)], taken)
        removed += int(taken.sum())
        content = [hashlib.sha256(array.tobytes()).hexdigest() for array in (split[found.own(i)], taken)]
        fates.append(folder / "fate" / f"{results.key_of(VERSION, survey.facts['content'], content)}.bin")
        if not results.is_whole(fates[-1]):
            results.write(fates[-1], {"content": survey.facts["content"]}, {"split": split[found.own(i)], "taken": taken})
    if for_others and len(lost := np.unique(np.concatenate(for_others), axis=0)):
        digest.update(b"without" + to_bytes(lost))  # where nothing is shared, it is the text's own data
    documents = {name: int((split == i).sum()) for i, name in enumerate(SPLITS) if name != "test" or config.test_fraction > 0}
    for name, count in documents.items():
        if not count:
            raise DataError(f"{name} is empty: all its paragraphs stand in held-out documents too; give text that repeats itself less")
    sampled = np.zeros(len(split), np.uint8)
    for i, name in enumerate(SPLITS):
        sampled[_sample(hashes, sizes, np.flatnonzero(split == i), SAMPLE_BYTES[name], 0)] |= FOR_BASELINE
    if config.tokenizer.kind == "bpe":
        among = np.flatnonzero(split == SPLITS.index("train"))
        sampled[_sample(hashes, sizes, among, config.tokenizer.sample_bytes, config.tokenizer.seed)] |= FOR_TOKENIZER
    return Settled(
        digest=digest.hexdigest(),
        fates=fates,
        sampled=np.split(sampled, starts[1:]),
        documents=documents,
        duplicates=int(limit - found.first.sum()),
        paragraphs=removed,
        sources=_sources(units, found.facts, hashes, starts, limit),
        left_out=left_out,
        bad=bad,
    )


def _left_out(
    config: TextDataConfig, units: list[Unit], surveys: list[dict[str, Any]], starts: np.ndarray, limit: int
) -> tuple[dict[str, int], list[str]]:
    """How many rows are no documents, by reason, and some of the bad ones. What comes after the last that is wanted is not looked at."""
    counts: dict[str, int] = {}
    shown: list[str] = []
    num_bad = 0
    for unit, survey, start in zip(units, surveys, starts, strict=True):
        for part in survey["parts"]:
            for why, count in part["left"].items():
                counts[why] = counts.get(why, 0) + count
        for record in bad_rows(survey):
            if config.limit is not None and start + record["before"] >= limit:
                continue
            counts[record["reason"]] = counts.get(record["reason"], 0) + record["rows"]
            num_bad += record["rows"]
            if len(shown) < NAMED:
                shown.append(say(unit.parts[record["part"]], record))
    if num_bad > config.max_bad_rows:
        raise DataError(refusal(shown, num_bad, config.max_bad_rows))
    return dict(sorted(counts.items())), shown


def _paragraph_owners(survey: results.Result) -> np.ndarray:
    counts = survey.arrays["counts"]
    return np.repeat(np.arange(len(counts)), counts)


def _held_out(units: Iterable[tuple[results.Result, np.ndarray]]) -> HeldOut:
    found: dict[str, list[np.ndarray]] = {"val": [], "test": []}
    for survey, split in units:
        of_paragraph = split[_paragraph_owners(survey)]
        for name, some in found.items():
            some.append(survey.arrays["paragraphs"][of_paragraph == SPLITS.index(name)])
    return {name: np.concatenate(some) for name, some in found.items()}


def _sets(held: Sequence[HeldOut]) -> dict[str, HashSet]:
    none = np.zeros((0, 2), np.uint64)
    return {name: HashSet(np.concatenate([none, *(one[name] for one in held)])) for name in ("val", "test")}


def _taken(survey: results.Result, split: np.ndarray, held: dict[str, HashSet]) -> np.ndarray:
    """Which paragraphs of a unit are left out."""
    hashes, of_paragraph = survey.arrays["paragraphs"], split[_paragraph_owners(survey)]
    taken = np.zeros(len(hashes), bool)
    for name, above in (("train", ("val", "test")), ("val", ("test",))):
        some = np.flatnonzero(of_paragraph == SPLITS.index(name))
        for other in above:
            taken[some] |= held[other].holds(hashes[some])
    return taken


def _what_stays(survey: results.Result, split: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """The splits of a unit's documents, without those of which nothing is left."""
    left = np.bincount(_paragraph_owners(survey)[~taken], minlength=len(split))
    return np.where(left > 0, split, DROPPED).astype(np.int8)


def _sample(hashes: np.ndarray, sizes: np.ndarray, among: np.ndarray, enough: int, seed: int) -> np.ndarray:
    """Documents drawn by their hash and the seed until there are `enough` bytes; one at least."""
    keys = hashes[among, 1] ^ np.uint64(int.from_bytes(hashlib.sha256(f"sample {seed}".encode()).digest()[:8], "big"))
    keys = keys * np.uint64(0x9E3779B97F4A7C15)  # modulo 2**64: the exclusive or alone would only swap halves
    keys ^= keys >> np.uint64(32)
    order = among[np.argsort(keys, kind="stable")]
    return order[np.cumsum(sizes[order]) - sizes[order] < enough]


def _sources(
    units: list[Unit], surveys: list[dict[str, Any]], hashes: np.ndarray, starts: np.ndarray, limit: int
) -> tuple[SourceRecord, ...]:
    """The files, parts put together again."""
    made: list[SourceRecord] = []
    digest, before = hashlib.sha256(), 0
    for unit, survey, place in zip(units, surveys, starts.tolist(), strict=True):
        for part, facts in zip(unit.parts, survey["parts"], strict=True):
            if part.nth == 0:
                digest, before = hashlib.sha256(), place
            elif made:
                made.pop()  # of the parts up to this
            stop = max(place, min(place + facts["documents"], limit))
            digest.update(to_bytes(hashes[place:stop]))
            place += facts["documents"]
            made.append(SourceRecord(path=part.file.path, bytes=part.file.size, documents=stop - before, sha256=digest.hexdigest()))
    return tuple(made)


def _check(config: TextDataConfig, at: np.ndarray) -> None:
    path, val, test = config.path, config.val_fraction, config.test_fraction
    if not len(at):
        raise DataError(f"{path} holds no text: every document is empty or filtered out; set data.path to text")
    found = {SPLITS[i] for i in np.unique(splits_of(at, val=val, test=test))}
    more = f"or give more documents (there are {len(at)}; a long text can be cut into one document a line of a .jsonl)"
    if test and "test" not in found:
        enough = _above(float(at.min()))
        way_out = f"raise data.test_fraction to {enough}" if enough + val <= 0.5 else "set data.test_fraction to 0"
        raise DataError(f"data.test_fraction {test} of {path} takes no document; {way_out}, {more}")
    if "val" not in found:
        enough = _above(float(at[at >= test].min(initial=1.0)) - test)
        way_out = f"raise data.val_fraction to {enough}, {more}" if enough + test <= 0.5 else more.removeprefix("or ")
        raise DataError(f"data.val_fraction {val} of {path} takes no document; {way_out}")
    if "train" not in found:
        raise DataError(f"no document of {path} is left to train on; lower data.val_fraction and data.test_fraction, {more}")


def _above(fraction: float) -> float:
    """The next number of two digits above."""
    return math.floor(fraction * 100 + 1) / 100
