"""Which files an address names, and how one is opened: through fsspec, wherever that reaches."""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, cast

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
    except PermissionError as e:
        raise DataError(f"{path} may not be read: {e}; change its permissions or the account") from e
    except OSError as e:
        raise StorageError(f"{path} could not be read: {e}") from e
    except Exception as e:
        if type(e).__module__.split(".")[0] in ("aiohttp", "gcsfs", "asyncio", "fsspec", "botocore", "requests", "httpx"):
            raise StorageError(f"{path} could not be read: {type(e).__name__}: {e}") from e
        raise


def find_files(path: str) -> list[File]:
    """The files that `path` names, in the order of their names: a file, a folder, a glob, or `bundled:NAME`.

    Of a folder all that is below it, hidden files left out. Raises DataError if there are none of a format that is read.
    """
    if path.startswith("bundled:"):
        if path not in BUNDLED:
            raise DataError(f"there is no {path}; bundled with Everstep: {', '.join(BUNDLED)}")
        path = str(BUNDLED[path])
    address = path if "://" in path or "::" in path else str(Path(path).expanduser().absolute())
    fs, root = file_system(address)
    with storage_errors(path):
        if fs.isfile(root):
            infos = {root: fs.info(root)}
            if format_of(root)[0] is None:
                raise DataError(f"{path} is of no kind that is read; known: {KNOWN}")
        elif fs.isdir(root):
            base = root.rstrip("/")
            infos = fs.find(root, detail=True)
            infos = {n: i for n, i in infos.items() if not any(part.startswith(".") for part in PurePosixPath(n[len(base) :]).parts)}
        elif any(c in root for c in "*?["):
            infos = fs.glob(root, detail=True)
        else:
            raise FileNotFoundError(path)
        if address.startswith(("http:", "https:")):  # a listing of links says nothing of the files
            infos = {name: fs.info(name) for name in infos if format_of(name)[0]}
    infos = {name: info for name, info in infos.items() if info.get("type", "file") == "file"}
    found = [
        File(address, name, int(info.get("size") or 0), version_of(info)) for name, info in sorted(infos.items()) if format_of(name)[0]
    ]
    if not found:
        raise DataError(f"{path} holds {len(infos)} files, but none that is read; known: {KNOWN}")
    return found


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
    with storage_errors(file.path):
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
