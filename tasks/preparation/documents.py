"""Which document goes into which split, and what is left out because it stands elsewhere.

A document's split is a function of its text alone, so it stays where it is when others come or go. A paragraph that
stands in several splits stays in the smallest: test before val before train. Held-out text is never thinned by what
happens to stand in training, and no held-out paragraph can be learnt by heart.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from configs.prepare import TextDataConfig
from trainer.data.packed import VERSION
from trainer.errors import DataError

from .sources import Document, find_sources, read_documents

BLANK_LINES = re.compile(r"\n\s*\n")
SPLITS = ("train", "val", "test")


def paragraphs(text: str) -> list[str]:
    """The stretches of `text` between blank lines, stripped; none is empty."""
    return [stripped for part in BLANK_LINES.split(text) if (stripped := part.strip())]


def without(text: str, taken: set[bytes]) -> tuple[str, int]:
    """`text` without the paragraphs whose hash is in `taken`, and how many those were. Unchanged to the byte if none."""
    parts = BLANK_LINES.split(text)
    kept = [part for part in parts if not (stripped := part.strip()) or _hash(stripped) not in taken]
    removed = len(parts) - len(kept)
    return (text if not removed else "\n\n".join(kept)), removed


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def place(text_hash: bytes) -> float:
    """Where in [0, 1) a document lies: test from 0, then val, then training."""
    return int.from_bytes(text_hash[:6], "big") / 2**48


@dataclass
class Survey:
    """What one reading of all documents finds; enough to name the preparation, and to do it in a second reading."""

    digest: str
    num_documents: int  # that have any text
    num_duplicates: int  # documents equal to an earlier one
    held_out: dict[str, set[bytes]]  # hashes of the paragraphs of val and of test


class Corpus:
    """The documents that a config names, read anew at each pass: only hashes are kept in memory."""

    def __init__(self, config: TextDataConfig, *, tokenizer_file: bytes | None):
        self._config = config
        self._sources = find_sources(config.path)
        tokenizer = hashlib.sha256(tokenizer_file).hexdigest() if tokenizer_file is not None else None
        self._header: dict[str, Any] = {"version": VERSION, "settings": config.prepare_settings(), "tokenizer_file": tokenizer}

    def _read(self) -> Iterator[tuple[Document, bytes]]:
        """Documents that have any text, with the hash of it."""
        for source in self._sources:
            for document in read_documents(source, text_field=self._config.text_field):
                if not document.text.isspace() and document.text:
                    yield document, _hash(document.text)

    def _split(self, at: float) -> str:
        test = self._config.test_fraction
        return "test" if at < test else "val" if at < test + self._config.val_fraction else "train"

    def survey(self) -> Survey:
        """Read everything once. Raises DataError if a split that is asked for would be empty."""
        digest = hashlib.sha256(json.dumps(self._header, sort_keys=True).encode())
        seen: set[bytes] = set()
        held_out: dict[str, set[bytes]] = {"val": set(), "test": set()}
        places, num_documents = [], 0
        for document, text_hash in self._read():
            digest.update(text_hash)
            num_documents += 1
            if text_hash in seen:
                continue
            seen.add(text_hash)
            places.append(place(text_hash))
            if (split := self._split(places[-1])) != "train":
                held_out[split].update(map(_hash, paragraphs(document.text)))
        self._check(places)
        return Survey(digest.hexdigest(), num_documents, num_documents - len(seen), held_out)

    def _check(self, places: list[float]) -> None:
        path, val, test = self._config.path, self._config.val_fraction, self._config.test_fraction
        if not places:
            raise DataError(f"{path} holds no text: every document is empty; set data.path to text")
        splits = {self._split(at) for at in places}
        more = f"or give more documents (there are {len(places)}; a long text can be cut into one document a line of a .jsonl)"
        if test and "test" not in splits:
            enough = _above(min(places))
            way_out = f"raise data.test_fraction to {enough}" if enough + val <= 0.5 else "set data.test_fraction to 0"
            raise DataError(f"data.test_fraction {test} of {path} takes no document; {way_out}, {more}")
        if "val" not in splits:
            enough = _above(min((at for at in places if at >= test), default=1.0) - test)
            way_out = f"raise data.val_fraction to {enough}, {more}" if enough + test <= 0.5 else more.removeprefix("or ")
            raise DataError(f"data.val_fraction {val} of {path} takes no document; {way_out}")
        if "train" not in splits:
            raise DataError(f"no document of {path} is left to train on; lower data.val_fraction and data.test_fraction, {more}")

    def cleaned(self, survey: Survey) -> Iterator[tuple[str, str, int]]:
        """(split, text, paragraphs left out) of each document that is no duplicate, in order; the text may be empty.

        Raises DataError at the end if what was read is not what was surveyed.
        """
        digest = hashlib.sha256(json.dumps(self._header, sort_keys=True).encode())
        taken = {"train": survey.held_out["val"] | survey.held_out["test"], "val": survey.held_out["test"], "test": set()}
        seen: set[bytes] = set()
        for document, text_hash in self._read():
            digest.update(text_hash)
            if text_hash not in seen:
                seen.add(text_hash)
                split = self._split(place(text_hash))
                yield split, *without(document.text, taken[split])
        if digest.hexdigest() != survey.digest:
            raise DataError(f"{self._config.path} changed while it was prepared; start again when nothing writes to it")


def _above(fraction: float) -> float:
    """The next number of two digits above."""
    return math.floor(fraction * 100 + 1) / 100
