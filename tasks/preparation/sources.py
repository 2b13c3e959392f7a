"""Documents out of files: text, Markdown, JSONL (plain, .gz, .xz) and Parquet, wherever fsspec reaches.

Documents are streamed in the order of the sorted file names, so the same files give the same documents in the same order
on any machine. Whatever cannot be read as text is refused with its file and line, never skipped: data that is silently
left out is found when the model is bad.
"""

import gzip
import json
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any, NamedTuple

from trainer.errors import DataError, StorageError

BUNDLED = {"bundled:python-docs": Path(__file__).resolve().parent.parent / "corpus" / "python-docs.jsonl.xz"}
KINDS = (".txt", ".md", ".jsonl", ".parquet")
PACKINGS = {"": None, ".gz": gzip.open, ".xz": lzma.open}
KNOWN = ".txt, .md, .jsonl (also with .gz or .xz), .parquet"


class Document(NamedTuple):
    """A text and what it is called in messages."""

    id: str
    text: str


class Source(NamedTuple):
    """A file to read: where, what kind of text, and how it is packed."""

    fs: Any  # an fsspec file system
    path: str
    kind: str
    packing: str


def _source(fs: Any, path: str) -> Source | None:
    """None where the name is of no kind that is read."""
    name = PurePosixPath(path)
    packing = name.suffix if name.suffix in PACKINGS else ""
    kind = PurePosixPath(name.stem).suffix if packing else name.suffix
    if kind not in KINDS or (kind == ".parquet" and packing):
        return None
    return Source(fs, path, kind, packing)


@contextmanager
def _storage_errors(path: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as e:
        raise DataError(f"there is no {path}; set data.path to a file, a folder, a glob or a URL of {KNOWN}") from e
    except PermissionError as e:
        raise DataError(f"{path} may not be read: {e}; change its permissions or the account") from e
    except (gzip.BadGzipFile, lzma.LZMAError, zlib.error, EOFError) as e:
        raise DataError(f"{path} cannot be unpacked: {e}; it is damaged or its name ends wrongly") from e
    except OSError as e:
        raise StorageError(f"{path} could not be read: {e}") from e


def find_sources(path: str) -> list[Source]:
    """The files that `path` names: a file, a folder (all below it, hidden ones left out), a glob, or `bundled:NAME`.

    Raises DataError if there are none of a kind that is read.
    """
    import fsspec

    if path.startswith("bundled:"):
        if path not in BUNDLED:
            raise DataError(f"there is no {path}; bundled with Everstep: {', '.join(BUNDLED)}")
        path = str(BUNDLED[path])
    try:
        fs, root = fsspec.core.url_to_fs(path if "://" in path or "::" in path else str(Path(path).expanduser().absolute()))
    except (ValueError, ImportError) as e:  # an unknown protocol, or one whose package is not there
        raise DataError(f"data.path {path!r} cannot be opened: {e}") from e
    with _storage_errors(path):
        if fs.isfile(root):
            source = _source(fs, root)
            if source is None:
                raise DataError(f"{path} is of no kind that is read; known: {KNOWN}")
            return [source]
        if fs.isdir(root):
            base, names = root.rstrip("/"), fs.find(root)
            names = [n for n in names if not any(part.startswith(".") for part in PurePosixPath(n[len(base) :]).parts)]
        elif any(c in root for c in "*?["):
            base, names = "", [n for n in fs.glob(root) if fs.isfile(n)]
        else:
            raise FileNotFoundError(path)
    found = [source for name in sorted(names) if (source := _source(fs, name))]
    if not found:
        raise DataError(f"{path} holds {len(names)} files, but none that is read; known: {KNOWN}")
    return found


def read_documents(source: Source, *, text_field: str = "text") -> Iterator[Document]:
    """The documents of one file in order: a .txt or .md is one, a .jsonl has one a line, a Parquet file one a row.

    Raises DataError with file and line (or row) where something is no text, StorageError where reading itself failed.
    """
    with _storage_errors(source.path), source.fs.open(source.path, "rb") as raw:
        if source.kind == ".parquet":
            yield from _parquet(raw, source.path, text_field)
            return
        opener = PACKINGS[source.packing]
        stream: Any = raw if opener is None else opener(raw)
        if source.kind == ".jsonl":
            yield from _jsonl(stream, source.path, text_field)
        else:
            yield Document(source.path, _decode(stream.read(), source.path, 1))


def _decode(data: bytes, path: str, line: int) -> str:
    try:
        return data.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as e:
        line += data.count(b"\n", 0, e.start)
        raise DataError(f"{path}:{line} is no UTF-8: {e.reason}; convert the file to UTF-8") from e


def _jsonl(stream: IO[bytes], path: str, text_field: str) -> Iterator[Document]:
    for number, raw in enumerate(stream, 1):
        where = f"{path}:{number}"
        line = _decode(raw, path, number)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise DataError(f"{where} is no JSON: {e}; mend or remove the line") from e
        if not isinstance(record, dict):
            raise DataError(f"{where} is a JSON {type(record).__name__}, not an object with a field {text_field!r}")
        if text_field not in record:
            raise DataError(f"{where} has no field {text_field!r}, only {', '.join(map(repr, record)) or 'none'}; set data.text_field")
        name = record.get("id")
        yield _checked(record[text_field], where, text_field, name=name if isinstance(name, str) else None)


def _parquet(stream: IO[bytes], path: str, text_field: str) -> Iterator[Document]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(stream)
        if text_field not in (names := file.schema_arrow.names):
            raise DataError(f"{path} has no column {text_field!r}, only {', '.join(map(repr, names)) or 'none'}; set data.text_field")
        row = 0
        for batch in file.iter_batches(batch_size=1024, columns=[text_field]):
            for value in batch.column(0):
                row += 1
                try:
                    text = value.as_py()
                except UnicodeDecodeError as e:
                    raise DataError(f"{path} row {row} is no UTF-8: {e.reason}; mend or remove it") from e
                yield _checked(text, f"{path} row {row}", text_field)
    except pa.ArrowException as e:
        raise DataError(f"{path} is no Parquet file that can be read: {e}") from e


def _checked(text: Any, where: str, text_field: str, *, name: str | None = None) -> Document:
    if not isinstance(text, str):
        raise DataError(f"{where}: field {text_field!r} is {text!r:.80}, not text; mend or remove it, or set data.text_field")
    try:
        text.encode()
    except UnicodeEncodeError as e:  # JSON can spell half of a surrogate pair
        raise DataError(f"{where}: field {text_field!r} is no Unicode text: {e.reason} at character {e.start}; mend or remove it") from e
    return Document(name or where, text)
