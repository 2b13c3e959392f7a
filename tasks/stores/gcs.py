"""A Google Cloud Storage bucket as a store. A bucket has no rename, so the order of writes is what makes a copy whole.

Data files first, verified by a listing of what is there; then the mark that Orbax takes a step for committed by; our own
manifest last. With it the copy is there, and it goes first where a copy is replaced or removed. A file that lies there with
equal size and crc32c is not sent again, so an upload that was cut off goes on where it was.
"""

import json
import os
import shutil
from collections.abc import Callable, Collection, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from trainer import manifest
from trainer.errors import DamagedError, StorageError
from trainer.files import fsync, fsync_tree

from .base import IDENTITY, check_owner, refused
from .bucket import Bucket, Facts, facts_of

CHECKPOINTS = "checkpoints"
ORBAX = "commit_success.txt"  # Orbax writes it into a checkpoint on a disk too; where it did not, we do
PART = ".part-"


class GcsStore:
    """Copies of one run's checkpoints under `url/checkpoints`, and its other files beside them, as in a run directory."""

    def __init__(self, url: str, *, run_id: str, cut_off: Callable[[], bool] = lambda: False, stall: float | None = None):
        self.address = url.rstrip("/")
        self.run_id = run_id
        self.bucket = Bucket(url, cut_off=cut_off, stall=stall)

    def published(self) -> dict[int, str]:
        """See Store.published. Files are compared with their manifest by the listing, whose checksums are of what lies there."""
        here = self._listing()
        found = {}
        for step in sorted(_steps(here)):
            try:
                record = self._manifest(step)
            except ValueError:
                continue  # damaged: to be published again
            if not _unlike(here, _wanted(record)):
                found[step] = record["crc32c"]
        return found

    def check(self) -> dict[int, list[str]]:
        """See Store.check."""
        here = self._listing()
        return {step: self._problems(step, here) for step in sorted(_steps(here))}

    def _problems(self, step: int, here: Mapping[str, Facts]) -> list[str]:
        try:
            wanted = _wanted(self._manifest(step))
        except ValueError as e:
            return [str(e)]
        prefix = f"{_folder(step)}/"
        marks = {prefix + manifest.NAME, prefix + ORBAX}
        stray = [name for name in here if name.startswith(prefix) and name not in wanted and name not in marks]
        return [
            *(f"{name.removeprefix(prefix)}: {'other bytes' if name in here else 'missing'}" for name in _unlike(here, wanted)),
            *(f"{name.removeprefix(prefix)}: not in the manifest" for name in stray),
        ]

    def publish(self, step: int, checkpoint: Path, others: Mapping[str, bytes | Path]) -> str:
        """See Store.publish."""
        seal = (checkpoint / manifest.NAME).read_bytes()
        folder, wanted = _folder(step), _wanted(manifest.parse(seal))
        beside = {name: facts_of(content) for name, content in others.items()}
        marker, mark = f"{folder}/{manifest.NAME}", f"{folder}/{ORBAX}"
        here = self._listing()
        if marker in here and here[marker] == facts_of(seal) and not _unlike(here, wanted):
            return f"{self.address}/{folder}"
        for name in (marker, mark):  # one after the other: from the first on there is no copy of this step
            self.bucket.delete([name] if name in here else [])
        data = {name: facts for name, facts in wanted.items() if name != mark}
        self.bucket.send({name: checkpoint / PurePosixPath(name).relative_to(folder) for name in _unlike(here, data)})
        self.bucket.send({name: others[name] for name in _unlike(here, beside)})
        self.bucket.delete(name for name in here if name.startswith(f"{folder}/") and name not in (*wanted, marker, mark))
        if wrong := _unlike(self._listing(), {**data, **beside}):
            if damage := manifest.problems(checkpoint, step):
                raise DamagedError(f"checkpoint {step} is damaged and not published: {'; '.join(damage[:3])}")
            raise StorageError(f"{self.address} has other bytes than were sent of {', '.join(wrong[:3])}; these are sent again")
        self.bucket.send({mark: checkpoint / ORBAX if mark in wanted else b"Checkpoint commit was successful"})
        self.bucket.send({marker: seal})
        return f"{self.address}/{folder}"

    def fetch(self, step: int, target: Path) -> None:
        """See Store.fetch. What was fetched before it was cut off is not fetched again."""
        try:
            record = self._manifest(step)
        except ValueError as e:
            raise StorageError(f"the copy of checkpoint {step} in {self.address} cannot be used: {e}") from e
        part = target.with_name(f"{PART}{target.name}")
        part.mkdir(parents=True, exist_ok=True)
        wanted = {name: _facts(facts) for name, facts in record["files"].items()}
        here = {p.relative_to(part).as_posix(): facts_of(p) for p in part.rglob("*") if p.is_file()}
        for name in here.keys() - wanted.keys():
            (part / name).unlink()
        prefix = f"{_folder(step)}/"
        self.bucket.fetch([prefix + name for name in _unlike(here, wanted)], lambda name: part / name.removeprefix(prefix))
        (part / manifest.NAME).write_bytes(record["bytes"])
        if wrong := manifest.problems(part, step):
            shutil.rmtree(part, ignore_errors=True)
            raise StorageError(f"what was fetched of checkpoint {step} from {self.address} is not whole: {'; '.join(wrong[:3])}")
        fsync_tree(part)
        os.rename(part, target)
        fsync(target.parent)

    def delete(self, step: int) -> None:
        """See Store.delete."""
        folder = _folder(step)
        names = [name for name in self._listing() if name.startswith(f"{folder}/")]
        marks = [f"{folder}/{manifest.NAME}", f"{folder}/{ORBAX}"]
        for mark in marks:
            self.bucket.delete([mark] if mark in names else [])
        self.bucket.delete(name for name in names if name not in marks)

    def clear(self, keep: Collection[int], *, dry: bool = False) -> dict[str, int]:
        """See Store.clear. Objects of a step that has no marker are an upload that was cut off, or a deletion."""
        here = self._listing()
        kept = {_folder(step) for step in _steps(here) | set(keep)}
        left = {n: facts.size for n, facts in here.items() if n.startswith(f"{CHECKPOINTS}/") and _top(n) not in kept}
        if left and not dry:
            self.bucket.delete(left)
        return {f"{self.address}/{name}": size for name, size in left.items()}

    def _listing(self) -> dict[str, Facts]:
        """All there is of this run. Raises StorageError where it is another's."""
        here = self.bucket.listing()
        if IDENTITY in here:
            check_owner(self.bucket.read(IDENTITY), self.run_id, self.address)
        return here

    def _manifest(self, step: int) -> dict[str, Any]:
        """The manifest of a copy, and its `bytes`. Raises ValueError if it is damaged, of another step or names what is no file below."""
        data = self.bucket.read(f"{_folder(step)}/{manifest.NAME}")
        if data is None:
            raise ValueError("there is none")
        record = manifest.parse(data)
        if record["step"] != step:
            raise ValueError(f"its manifest is of step {record['step']}")
        for name in record["files"]:
            if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(f"its manifest names {name!r}, which is no file of a checkpoint")
        return {**record, "bytes": data}


def store_at(address: str) -> tuple[GcsStore, bytes, bytes]:
    """The store of the run whose copies lie at an address, its run.json and config.json. Raises StorageError that says what is there."""
    bucket = Bucket(address)
    identity, config = bucket.read(IDENTITY), bucket.read("config.json")
    if identity is None or config is None:
        runs = sorted(name.split("/")[0] for name in bucket.listing() if name.count("/") == 1 and name.endswith(f"/{IDENTITY}"))
        there = f"there are {', '.join(f'{bucket.url}/{run}' for run in runs[:10])}" if runs else "there is none below it either"
        raise refused(f"{bucket.url} is no published run; {there}")
    try:
        run_id = str(json.loads(identity)["run_id"])
    except (ValueError, KeyError, TypeError) as e:
        raise refused(f"{bucket.url}/{IDENTITY} is damaged ({e}); bring it back from the run directory") from e
    return GcsStore(bucket.url, run_id=run_id), identity, config


def _folder(step: int) -> str:
    return f"{CHECKPOINTS}/{manifest.name_of(step)}"


def _wanted(record: Mapping[str, Any]) -> dict[str, Facts]:
    """The objects of a copy, but for its marks."""
    return {f"{_folder(record['step'])}/{name}": _facts(facts) for name, facts in record["files"].items()}


def _top(name: str) -> str:
    """The step's folder that an object belongs to."""
    return "/".join(name.split("/")[:2])


def _facts(entry: Mapping[str, Any]) -> Facts:
    """What a bucket says too of a file in a manifest."""
    return Facts(entry["size"], entry["crc32c"])


def _unlike(here: Mapping[str, Facts], wanted: Mapping[str, Facts]) -> list[str]:
    """Those of the wanted that are not here, or not as wanted."""
    return [name for name, facts in wanted.items() if here.get(name) != facts]


def _steps(here: Mapping[str, Facts]) -> set[int]:
    """Steps that have a marker."""
    parts = [name.split("/") for name in here if name.startswith(f"{CHECKPOINTS}/") and name.endswith(f"/{manifest.NAME}")]
    return {int(p[1]) for p in parts if len(p) == 3 and p[1].isdigit()}
