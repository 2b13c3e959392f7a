"""Which files an address names, and how one is opened: through fsspec, wherever that reaches."""

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from glob import glob
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

from trainer.data.shards import OF_STORES
from trainer.errors import DataError, StorageError
from trainer.storage import file_system

from . import FORMATS, File, Format, Part
from .unpack import UNPACK, unpack

BUNDLED = {"bundled:python-docs": Path(__file__).resolve().parents[2] / "corpus" / "python-docs.jsonl.xz"}
KNOWN = f"{', '.join(s for f in FORMATS for s in f.suffixes)}, the text ones also with {', '.join(UNPACK)}"
# Whatever of these a store says of a file, one of them is another if the file is.
VERSION_KEYS = (
    "mtime", "created", "ino", "ETag", "etag", "md5Hash", "crc32c", "generation", "LastModified", "last_modified",
    "Last-Modified", "Content-MD5", "sha256", "blob_id", "last_commit", "content_settings", "updated",
)  # fmt: skip

GARBLED = (json.JSONDecodeError, UnicodeDecodeError)  # what a damaged listing comes to; texts are decoded elsewhere


def format_of(path: str) -> tuple[Format | None, str]:
    """The format of a file by its name, None if it is none that is read, and the suffix of its compression, or ""."""
    name = PurePosixPath(path.partition("?")[0])  # of a URL
    packing = name.suffix.lower() if name.suffix.lower() in UNPACK else ""
    suffix = PurePosixPath(name.stem).suffix.lower() if packing else name.suffix.lower()
    for known in FORMATS:
        if suffix in known.suffixes and (known.compressed or not packing):
            return known, packing
    return None, ""


@contextmanager
def storage_errors(path: str, *, wants: str = "") -> Iterator[None]:
    """Errors of a store as ours, which say whether trying again can help."""
    try:
        yield
    except FileNotFoundError as e:
        if type(e.__cause__).__module__.startswith("aiohttp") and getattr(e.__cause__, "status", None) not in (404, 410):
            raise StorageError(f"{path} could not be read: {e.__cause__}") from e  # fsspec calls every answer a missing file
        wants = wants or f"set data.path to a file, a folder, a glob or a URL of {KNOWN}"
        raise DataError(f"there is no {path}; {wants}") from e
    except Exception as e:
        if isinstance(e, GARBLED):
            raise StorageError(f"{path} could not be read: its store's answer was damaged on the way ({e})") from e
        if not isinstance(e, OSError) and type(e).__module__.split(".")[0] not in OF_STORES:
            raise
        if _is_refusal(e):
            raise DataError(f"{path} may not be read: {e}; change its permissions or the account{_way_in(path)}") from e
        raise StorageError(f"{path} could not be read: {type(e).__name__}: {e}") from e


def _is_refusal(error: Exception) -> bool:
    """Whether a store knows what is asked for, or will not say, and does not give it to this account."""
    status = getattr(error, "code", None) or getattr(getattr(error, "response", None), "status_code", None)
    return isinstance(error, PermissionError) or status in (401, 403) or str(error).startswith("Forbidden")  # so says gcsfs


def _way_in(path: str) -> str:
    known = {
        "gs": "gcloud auth application-default login, with roles/storage.objectViewer on the bucket",
        "hf": "hf auth login, or HF_TOKEN",
    }
    return f" ({known[kind]})" if (kind := path.partition(":")[0]) in known else ""


def shown(file: File) -> str:
    """A file as people write it: with the protocol, which paths in a file system may be without."""
    protocol, found, _ = file.address.partition("://")
    return file.path if not found or "://" in file.path or protocol == "file" else f"{protocol}://{file.path}"


def find_files(path: str) -> list[File]:
    """The files that `path` names, in the order of their names: a file, a folder, a glob, or `bundled:NAME`.

    Of a folder all that is below it, hidden files left out. Raises DataError if there are none of a format that is read, or one
    that is named like text is a link to nothing or no file at all.
    """
    if path.startswith("bundled:"):
        if path not in BUNDLED:
            raise DataError(f"there is no {path}; bundled with Everstep: {', '.join(BUNDLED)}")
        path = str(BUNDLED[path])
    address = path if "://" in path or "::" in path else str(Path(path).expanduser().absolute())
    fs, root = file_system(address)
    with storage_errors(path):
        fs.invalidate_cache()  # a process may live long, and ask again because something changed
        infos = _listed(fs, root)
        if root in infos and format_of(root)[0] is None:
            raise DataError(f"{path} is of no kind that is read; known: {KNOWN}")
        _check_kinds(infos)
        if address.startswith(("http:", "https:")):  # a listing of links says nothing of the files
            infos = {name: fs.info(name) for name in infos if format_of(name)[0]}
    infos = {name: info for name, info in infos.items() if info.get("type", "file") == "file"}
    found = [
        File(address, name, int(info.get("size") or 0), version_of(info)) for name, info in sorted(infos.items()) if format_of(name)[0]
    ]
    if not found:
        raise DataError(f"{path} holds {len(infos)} files, but none that is read; known: {KNOWN}")
    return found


def _listed(fs: Any, root: str) -> dict[str, dict[str, Any]]:
    """What a store says of a file, of all in a folder, or of what a glob names. Raises what the store does."""
    try:
        known = fs.info(root)  # isfile and isdir would take a store that does not answer for one that has nothing
    except OSError:
        if not any(c in root for c in "*?["):
            raise
        # A store that failed fails again, and is heard there.
        return {path: _info(fs, path) for path in glob(root, recursive=True)} if _is_local(fs) else fs.glob(root, detail=True)
    if known["type"] != "directory":
        return {root: known}
    base = root.rstrip("/")
    if _is_local(fs):
        return _below(fs, base)
    infos = fs.find(root, detail=True)
    return {n: i for n, i in infos.items() if not any(part.startswith(".") for part in PurePosixPath(n[len(base) :]).parts)}


def _is_local(fs: Any) -> bool:
    """Whether listings are to be our own: fsspec's name neither what is behind a link nor what they could not look into."""
    from fsspec.implementations.local import LocalFileSystem

    return isinstance(fs, LocalFileSystem)


def _below(fs: Any, folder: str) -> dict[str, dict[str, Any]]:
    """What is in a local folder and below it. Links are followed, once each: one may lead back to where it lies."""

    def refuse(error: OSError) -> None:
        raise error

    infos: dict[str, dict[str, Any]] = {}
    seen: set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real = os.path.realpath(place)
        folders[:] = sorted(name for name in folders if not name.startswith(".")) if real not in seen else []
        for name in names if real not in seen else ():
            path = os.path.join(place, name)
            if not name.startswith("."):
                infos[path] = _info(fs, path)
        seen.add(real)
    return infos


def _info(fs: Any, path: str) -> dict[str, Any]:
    if not os.path.exists(path) and os.path.islink(path):
        return {"type": "link", "destination": os.readlink(path)}
    return fs.info(path)


def _check_kinds(infos: dict[str, dict[str, Any]]) -> None:
    """Refuse what is named like text and is no file: left out, it would be missed by nobody."""
    for name, info in infos.items():
        if format_of(name)[0] is None or info.get("type", "file") == "file":
            continue
        if info["type"] == "directory":
            raise DataError(f"{name} is a folder, and named like a file; set data.path to it, or to a glob of what is in it, like {name}/*")
        if info["type"] == "link":
            raise DataError(f"{name} is a link to {info['destination']}, which is not there; mend or remove it")
        raise DataError(f"{name} is neither a file nor a folder; remove it, or name files by a glob that leaves it out")


def version_of(info: dict[str, Any]) -> str | None:
    """What tells this file from a later one of the same name, as far as the store says; None if it says nothing."""
    said = {key: info[key] for key in VERSION_KEYS if info.get(key) is not None}
    # A time is a number in the listings of some stores, and not when they are asked about one file.
    values = {key: str(value.timestamp() if hasattr(value, "timestamp") else value) for key, value in said.items()}
    return json.dumps({"size": info.get("size"), **values}) if values else None


def still_the_same(file: File) -> bool:
    """Whether a file is the one that was listed, as far as its store says."""
    if file.version is None:
        return True
    fs, _ = file_system(file.address)
    with storage_errors(shown(file)):
        fs.invalidate_cache()
        then, now = json.loads(file.version), json.loads(version_of(fs.info(file.path)) or "{}")
    return all(now[key] == value for key, value in then.items() if key in now)  # a listing may say more, or less


def can_be_sliced(file: File) -> bool:
    """Whether parts of a file may be read by themselves: not where a server may hand out files from their beginning only."""
    known, packing = format_of(file.path)
    return known is not None and known.sliced and not packing and not file.address.startswith(("http:", "https:"))


def open_file(part: Part) -> IO[bytes]:
    """The bytes of a file, unpacked."""
    file = part.file
    fs, _ = file_system(file.address)
    known, packing = format_of(file.path)
    if file.address.startswith(("http:", "https:")):
        raw = fs.open(file.path, "rb", block_size=0)  # as a stream: not every server gives a range
        if known is not None and not known.compressed:  # of a format that is read from its end
            whole = tempfile.TemporaryFile()  # noqa: SIM115  (whoever reads closes it)
            with raw:
                while block := raw.read(1 << 20):
                    whole.write(block)
            whole.seek(0)
            raw = whole
    else:
        raw = fs.open(file.path, "rb")
    return unpack(raw, packing) if packing else cast(IO[bytes], raw)
