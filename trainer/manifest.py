"""MANIFEST.json makes a checkpoint: size, crc32c and crc32 of every file, written last.

Orbax keeps no checksum of array data and restores flipped bits silently, so nothing is read from a directory whose files
are not exactly those of its manifest. The manifest is canonical JSON that ends with the crc32c of what stands before it;
a reader writes it again and compares the bytes. Version 1 had no crc32, and so took one OCDBT file for another of its size.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .files import checksums, crc32c, fsync_tree, seal, walk, write_atomic

NAME = "MANIFEST.json"
DIGITS = 8
VERSION = 2
FACTS = {1: {"size", "crc32c"}, 2: {"size", "crc32c", "crc32"}}  # of each file, by version


@dataclass(frozen=True)
class Commit:
    """A checkpoint that is final."""

    step: int
    manifest_crc32c: str
    stop: str | None = None  # why training ends here, where a callback said so


def name_of(step: int) -> str:
    """The folder of checkpoint `step`."""
    return f"{step:0{DIGITS}d}"


def steps_in(root: Path) -> list[int]:
    """Steps that have a folder under `root`, whole or not, ascending."""
    return sorted(int(p.name) for p in root.iterdir() if p.is_dir() and p.name.isdigit()) if root.is_dir() else []


def newest_whole(root: Path) -> Commit | None:
    """The newest checkpoint under `root` whose files are all as its manifest says. Changes nothing."""
    for step in reversed(steps_in(root)):
        if not problems(root / name_of(step), step):
            return Commit(step, own_crc(root / name_of(step)))
    return None


def newest_meta(root: Path) -> dict[str, Any]:
    """What the newest checkpoint under `root` that has a manifest says of itself. Raises CheckpointError if there is none to be read.

    Looks at that one file, not at the weights.
    """
    step = next((step for step in reversed(steps_in(root)) if (root / name_of(step) / NAME).exists()), None)
    if step is None:
        raise CheckpointError(f"{root} has no checkpoint yet; train the run first: everstep resume {root.parent}")
    try:
        return json.loads((root / name_of(step) / "meta" / "metadata").read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"checkpoint {step} in {root} is damaged: {e}; `everstep resume {root.parent}` sets it aside") from e


def _encode(step: int, files: dict[str, dict], version: int = VERSION) -> bytes:
    return seal({"files": files, "step": step, "version": version})


def _listing(folder: Path) -> dict[str, dict]:
    return {
        p.relative_to(folder).as_posix(): {"size": p.stat().st_size, **checksums(p)}
        for p in walk(folder)
        if p != folder / NAME and p.is_file() and not p.is_symlink()
    }


def write(folder: Path, step: int) -> str:
    """Bring `folder` to the disk and make it checkpoint `step`. Returns the manifest's own crc32c."""
    fsync_tree(folder)
    data = _encode(step, _listing(folder))
    write_atomic(folder / NAME, data)
    return _own_crc(data)


def _own_crc(data: bytes) -> str:
    return json.loads(data)["crc32c"]


def parse(data: bytes) -> dict[str, Any]:
    """What a manifest says: `step`, `files` (name -> size and checksums) and its own `crc32c`. Raises ValueError if it is damaged."""
    try:
        found = json.loads(data)
        if data != _encode(found["step"], found["files"], found["version"]):
            raise ValueError(f"{NAME} does not match its own crc32c")
        if found["version"] not in FACTS:
            raise ValueError(f"{NAME} is of version {found['version']}, which this everstep does not read; bring it up to date")
        if not all(facts.keys() == FACTS[found["version"]] for facts in found["files"].values()):
            raise ValueError(f"{NAME} does not say of every file what one of version {found['version']} says")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{NAME} is damaged") from e
    return found


def problems(folder: Path, step: int) -> list[str]:
    """What is wrong with the files of checkpoint `step`, one line each; empty where it is whole."""
    if folder.is_symlink() or (folder / NAME).is_symlink():
        return [f"{folder.name if folder.is_symlink() else NAME}: a link, whose target is nobody's checkpoint"]
    try:
        data = (folder / NAME).read_bytes()
    except FileNotFoundError:
        return [f"{NAME} is missing: the checkpoint was never committed"]
    except OSError as e:
        return [f"{NAME} cannot be read: {e.strerror}"]
    try:
        found = parse(data)
    except ValueError as e:
        return [str(e)]
    out = [] if found["step"] == step else [f"{NAME} is of step {found['step']}"]
    there = {p.relative_to(folder).as_posix(): p for p in walk(folder) if p != folder / NAME}
    out += [f"{name}: missing" for name in sorted(found["files"].keys() - there.keys())]
    out += [f"{name}: not in the manifest" for name in sorted(there.keys() - found["files"].keys())]
    common = sorted(found["files"].keys() & there.keys())
    return out + [f"{name}: {wrong}" for name in common if (wrong := _unlike(there[name], found["files"][name]))]


def _unlike(path: Path, want: dict[str, Any]) -> str | None:
    """What is wrong with one file, if anything is. A sector that cannot be read is damage like any other."""
    try:
        if path.is_symlink() or not path.is_file():
            return "not a plain file"
        if (size := path.stat().st_size) != want["size"]:
            return f"{size} bytes instead of {want['size']}"
        found = checksums(path) if "crc32" in want else {"crc32c": crc32c(path)}
        wrong = [name for name, value in found.items() if value != want[name]]
        return f"other bytes ({wrong[0]})" if wrong else None
    except OSError as e:
        return f"cannot be read: {e.strerror}"


def own_crc(folder: Path) -> str:
    """The crc32c that a whole checkpoint's manifest ends with."""
    return _own_crc((folder / NAME).read_bytes())
