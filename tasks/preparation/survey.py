"""The first reading: hashes of all documents and of their paragraphs, and what is wrong with the rows that are none.

That is all that has to be known before a document's fate can be decided: a tenth of the text, and kept, so that files which
did not change are not read again to learn it.
"""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.packed import VERSION
from trainer.errors import DataError

from . import results
from .documents import paragraphs
from .hashes import as_array, hash_of
from .sources.base import Bad, Document, Part, Reading
from .sources.read import message, read_documents
from .units import Unit

NAMED = 20  # bad rows that an error names
SPOOL_LIMIT = 64_000_000  # bytes of a unit's text that are kept at most


class SurveyJob(NamedTuple):
    """Reads one unit of work."""

    unit: Unit
    wanted: Reading
    max_bad_rows: int
    limit: int | None  # documents after which nothing more is wanted
    folder: str  # of the results
    spool: bool = False  # keep the text beside the result, so that later readings need not parse it again

    @property
    def name(self) -> str:
        return f"read[{label(self.unit)}]"

    @property
    def size(self) -> int:
        return self.unit.weight

    @property
    def path(self) -> Path | None:
        """Where the result is; None where a store says nothing of a file's version, so that it cannot be known again."""
        files = [(*part.file, part.nth, part.of) for part in self.unit.parts]
        if any(part.file.version is None for part in self.unit.parts):
            return None
        rules = [rule.to_dict() for rule in self.wanted.filters]
        wanted = [self.wanted.text_field, rules, self.wanted.max_bytes]
        return Path(self.folder, "read", results.key_of(VERSION, files, wanted, self.limit) + ".bin")

    def run(self) -> dict[str, Any]:
        """{"path"} of the result. Raises DataError if the unit alone has more bad rows than may be."""
        path = self.path
        if path is not None and results.is_whole(path):
            if len(bad := bad_rows(results.needed(path).facts)) > self.max_bad_rows:
                self._refuse([message(self.unit.parts[b["part"]].file, _bad(b)) for b in bad], sum(b["rows"] for b in bad))
            return {"path": str(path)}
        documents: list[bytes] = []
        hashes: list[bytes] = []
        sizes: list[int] = []
        counts: list[int] = []
        found: list[dict[str, Any]] = []
        wrong: list[str] = []
        num_wrong = 0
        texts: list[bytes] | None = [] if self.spool else None
        size = 0
        for index, part in enumerate(self.unit.parts):
            before = len(documents)
            facts: dict[str, Any] = {"documents": 0, "left": {}, "bad": [], "cut": False}
            found.append(facts)
            for item in read_documents(part, self.wanted):
                if self.limit is not None and len(documents) >= self.limit:
                    facts["cut"] = True
                    break
                if isinstance(item, Document):
                    data = item.text.encode()
                    documents.append(hash_of(data))
                    size += len(data)
                    if texts is not None:
                        texts.append(data)
                        texts = texts if size <= SPOOL_LIMIT else None
                    sizes.append(item.size)
                    own = [hash_of(paragraph.encode()) for paragraph in paragraphs(item.text)]
                    counts.append(len(own))
                    hashes += own
                elif isinstance(item, Bad):
                    facts["bad"].append({"part": index, "before": len(documents), **item._asdict()})
                    num_wrong += item.rows
                    if len(wrong) < NAMED:
                        wrong.append(message(part.file, item))
                    if num_wrong > self.max_bad_rows and len(wrong) >= NAMED:
                        self._refuse(wrong, num_wrong)
                else:
                    facts["left"][item.why] = facts["left"].get(item.why, 0) + 1
            facts["documents"] = len(documents) - before
        if num_wrong > self.max_bad_rows:
            self._refuse(wrong, num_wrong)
        content = hashlib.sha256(b"".join(documents)).hexdigest()
        if path is None:
            path = Path(
                self.folder, "read", results.key_of(VERSION, "content", content, [list(p.file[:2]) for p in self.unit.parts]) + ".bin"
            )
        arrays = {
            "documents": as_array(documents),
            "sizes": np.array(sizes, np.int64),
            "paragraphs": as_array(hashes),
            "counts": np.array(counts, np.int64),
        }
        if texts is not None:
            results.write(spool_of(path), {"content": content}, {"text": np.frombuffer(b"".join(texts), np.uint8)})
        results.write(path, {"parts": found, "content": content}, arrays)
        return {"path": str(path)}

    def _refuse(self, wrong: list[str], count: int) -> None:
        raise DataError(refusal(wrong, count, self.max_bad_rows))


def spool_of(path: Path) -> Path:
    """Where the text of a survey at `path` is kept, if it is: all documents, one after the other. It may go at any time."""
    return path.parent.parent / "text" / path.name


def bad_rows(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The bad rows of a survey in order, in JSON terms."""
    return [bad for part in facts["parts"] for bad in part["bad"]]


def _bad(record: dict[str, Any]) -> Bad:
    return Bad(**{field: record[field] for field in Bad._fields})


def say(part: Part, record: dict[str, Any]) -> str:
    """A bad row of a survey as a sentence."""
    return message(part.file, _bad(record))


def refusal(wrong: list[str], count: int, allowed: int) -> str:
    """The text of the error that names bad rows; `count` is of rows, of which one file may have many."""
    first, *others = wrong[:NAMED]
    if count == 1 and not allowed:
        return f"{first}, or set data.max_bad_rows=1 to leave it out"
    more = "".join(f"\n  {line}" for line in others[:4])
    left = f"\n  and {count - 1 - len(others[:4])} more" if count > 1 + len(others[:4]) else ""
    return (
        f"{first}{more}{left}\n{count} rows or more are no text, data.max_bad_rows allows {allowed}; "
        "mend them, or raise it to leave them out and have them listed in the report"
    )


def label(unit: Unit) -> str:
    """A unit in few letters."""
    part = unit.parts[0]
    name = part.file.path.rpartition("/")[2]
    if part.of > 1:
        return f"{name} {part.nth + 1}/{part.of}"
    return name if len(unit.parts) == 1 else f"{name} +{len(unit.parts) - 1}"
