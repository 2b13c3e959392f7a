"""MANIFEST.json makes a checkpoint: size and crc32c of every file, written last.

Orbax keeps no checksum of array data and restores flipped bits silently, so nothing is read from a directory whose files
are not exactly those of its manifest. The manifest is canonical JSON that ends with the crc32c of what stands before it;
a reader writes it again and compares the bytes.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError
from .files import crc32c, fsync_tree, seal, walk, write_atomic

NAME = "MANIFEST.json"
DIGITS = 8


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


def _encode(step: int, files: dict[str, dict]) -> bytes:
    return seal({"files": files, "step": step, "version": 1})


def _listing(folder: Path) -> dict[str, dict]:
    return {
        p.relative_to(folder).as_posix(): {"size": p.stat().st_size, "crc32c": crc32c(p)}
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
    """What a manifest says: `step`, `files` (name -> size and crc32c) and its own `crc32c`. Raises ValueError if it is damaged."""
    try:
        found = json.loads(data)
        if data != _encode(found["step"], found["files"]):
            raise ValueError(f"{NAME} does not match its own crc32c")
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError, UnicodeDecodeError) as e:
        raise ValueError(f"{NAME} is damaged") from e
    return found


def problems(folder: Path, step: int) -> list[str]:
    """What is wrong with the files of checkpoint `step`, one line each; empty where it is whole."""
    try:
        data = (folder / NAME).read_bytes()
    except OSError:
        return [f"{NAME} is missing: the checkpoint was never committed"]
    try:
        found = parse(data)
    except ValueError as e:
        return [str(e)]
    out = [] if found["step"] == step else [f"{NAME} is of step {found['step']}"]
    there = {p.relative_to(folder).as_posix(): p for p in walk(folder) if p != folder / NAME}
    out += [f"{name}: missing" for name in sorted(found["files"].keys() - there.keys())]
    out += [f"{name}: not in the manifest" for name in sorted(there.keys() - found["files"].keys())]
    for name in sorted(found["files"].keys() & there.keys()):
        want, path = found["files"][name], there[name]
        if path.is_symlink() or not path.is_file():
            out.append(f"{name}: not a plain file")
        elif (size := path.stat().st_size) != want["size"]:
            out.append(f"{name}: {size} bytes instead of {want['size']}")
        elif crc32c(path) != want["crc32c"]:
            out.append(f"{name}: other bytes (crc32c)")
    return out


def own_crc(folder: Path) -> str:
    """The crc32c that a whole checkpoint's manifest ends with."""
    return _own_crc((folder / NAME).read_bytes())
