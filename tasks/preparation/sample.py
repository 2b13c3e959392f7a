"""The second reading: some documents of each split, from which the tokenizer is learnt and the baseline counted."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.packed import VERSION
from trainer.errors import DataError

from . import results
from .documents import FOR_BASELINE, SPLITS, without
from .hashes import hash_of, to_bytes
from .sources.base import Document, Reading
from .sources.read import read_documents
from .survey import label, spool_of
from .units import Unit


class KeptReader(NamedTuple):
    """The documents of a unit that stay, as the survey found and the settling left them."""

    unit: Unit
    wanted: Reading
    survey: str  # path of its result
    fate: str  # path of its result

    def documents(self, among: bytes | None = None) -> Iterator[tuple[int, int, str]]:
        """(number in the unit, index of the split, text) of each document that stays; of those that `among` marks, where it is given.

        Taken from the text that the survey kept, or else read again. Raises DataError, at the document or at the end, if what
        is read now is not what was surveyed.
        """
        surveyed, fate = results.needed(Path(self.survey)), results.needed(Path(self.fate))
        known, counts = to_bytes(surveyed.arrays["documents"]), surveyed.arrays["counts"]
        borders = np.concatenate([[0], np.cumsum(counts)])
        split, taken = fate.arrays["split"], fate.arrays["taken"]
        if (text := results.read(spool_of(Path(self.survey)))) is not None and text.facts["content"] == surveyed.facts["content"]:
            data = memoryview(text.arrays["text"].data)
            ends = np.cumsum(surveyed.arrays["sizes"])
            for number in np.flatnonzero(split >= 0).tolist():
                if among is None or among[number]:
                    found = str(data[ends[number] - surveyed.arrays["sizes"][number] : ends[number]], "utf-8")
                    yield number, int(split[number]), without(found, taken[borders[number] : borders[number + 1]])
            return
        number = 0
        for part, facts in zip(self.unit.parts, surveyed.facts["parts"], strict=True):
            end = number + facts["documents"]
            for item in read_documents(part, self.wanted):
                if not isinstance(item, Document):
                    continue
                if number == end:
                    if facts["cut"]:
                        break  # beyond data.limit
                    raise _changed(part.file.path)
                wanted = split[number] >= 0 and (among is None or among[number])
                # All are looked at once, by the reading that makes tokens.
                if (wanted or among is None) and hash_of(item.text.encode()) != known[16 * number : 16 * number + 16]:
                    raise _changed(part.file.path)
                if wanted:
                    yield number, int(split[number]), without(item.text, taken[borders[number] : borders[number + 1]])
                number += 1
            if number != end:
                raise _changed(part.file.path)


def _changed(path: str) -> DataError:
    return DataError(f"{path} changed while it was prepared; start again when nothing writes to it")


class SampleJob(NamedTuple):
    """Reads the documents of one unit that were drawn."""

    kept: KeptReader
    drawn: bytes  # a byte a document: what for, 0 where it is not drawn
    folder: str

    @property
    def name(self) -> str:
        return f"sample[{label(self.kept.unit)}]"

    @property
    def size(self) -> int:
        return self.kept.unit.weight

    @property
    def path(self) -> Path:
        fate = Path(self.kept.fate).stem
        return Path(self.folder, "sample", results.key_of(VERSION, fate, self.drawn.hex()) + ".bin")

    def run(self) -> dict[str, Any]:
        """{"path"} of the result."""
        if not results.is_whole(self.path):
            texts: list[list[bytes]] = [[] for _ in SPLITS]
            uses: list[list[int]] = [[] for _ in SPLITS]
            for number, split, text in self.kept.documents(among=self.drawn):
                texts[split].append(text.encode())
                uses[split].append(self.drawn[number])
            arrays = {}
            for name, some, what_for in zip(SPLITS, texts, uses, strict=True):
                arrays[name] = np.frombuffer(b"".join(some), np.uint8)
                arrays[f"{name}_sizes"] = np.array([len(text) for text in some], np.int64)
                arrays[f"{name}_uses"] = np.array(what_for, np.uint8)
            results.write(self.path, {}, arrays)
        return {"path": str(self.path)}


class Sample:
    """The documents of a split that were drawn for `use`, in their order, read anew at each pass."""

    def __init__(self, paths: Sequence[str], split: str, use: int = FOR_BASELINE):
        self._paths, self._split, self._use = paths, split, use

    def __iter__(self) -> Iterator[str]:
        for path in self._paths:
            found = results.needed(Path(path)).arrays
            data, place = found[self._split], 0
            for size, use in zip(found[f"{self._split}_sizes"].tolist(), found[f"{self._split}_uses"].tolist(), strict=True):
                if use & self._use:
                    yield data[place : place + size].tobytes().decode()
                place += size


class BaselineJob(NamedTuple):
    """Counts on the sample what a simple model reaches; see baseline.py."""

    samples: tuple[str, ...]
    splits: tuple[str, ...]
    folder: str

    @property
    def name(self) -> str:
        return "baseline"

    @property
    def size(self) -> int:
        return 0

    def run(self) -> dict[str, Any]:
        """{"baseline": the manifest's record}."""
        from .baseline import MODEL, ByteModel

        path = Path(self.folder, "baseline", results.key_of(VERSION, [Path(p).stem for p in self.samples], self.splits) + ".bin")
        if (found := results.read(path)) is not None:
            return found.facts
        model = ByteModel.train(Sample(self.samples, "train"))
        values = {split: model.bits_per_byte(Sample(self.samples, split)) for split in self.splits if split != "train"}
        facts = {"baseline": {"model": MODEL, **values}}
        results.write(path, facts, {})
        return facts
