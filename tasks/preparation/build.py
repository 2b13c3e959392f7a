"""Prepares data: a folder of shards, tokenizer and manifest, named by the digest of everything that goes into it.

The folder is made under another name, brought to the disk and renamed, so it is there whole or not at all. The same data
is prepared once however many ask for it: a kernel lock per digest makes the others wait, and dies with its holder.
"""

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from configs.prepare import TextDataConfig
from trainer.data.base import FIELDS
from trainer.data.packed import NAME, DataManifest, Duplicates, FileRecord, ShardRecord, SplitRecord, load_manifest
from trainer.data.tokenizer import Tokenizer, load_tokenizer
from trainer.errors import DataError
from trainer.files import crc32c, fsync, fsync_tree, seal
from trainer.paths import cache_dir

from ..refs import DataRef
from .baseline import MODEL, ByteModel
from .documents import SPLITS, Corpus, Survey
from .packing import Packer

log = logging.getLogger(__name__)
Progress = Callable[[str], None]

TOKENIZER = "tokenizer.json"
SHARD_TOKENS = 1 << 23  # 128 MB in four fields of int32
PORTION = 1 << 20  # characters that are tokenized at a time


def prepare(config: TextDataConfig, *, cache: Path | None = None, on_progress: Progress | None = None) -> DataRef:
    """The prepared data of `config`, made now unless `cache` (default: `trainer.paths.cache_dir()`) holds it already.

    The documents are read in any case, since their text is part of the name. Raises DataError if they or the settings
    leave a split empty or something is no text, StorageError if a store failed.
    """
    progress = on_progress or (lambda message: None)
    tokenizer_file = _read_tokenizer(config)
    corpus = Corpus(config, tokenizer_file=tokenizer_file)
    progress(f"reading {config.path}")
    survey = corpus.survey()
    progress(f"read {survey.num_documents} documents")
    folder = (cache or cache_dir()).absolute() / "data" / survey.digest[:16]
    ref = DataRef(path=str(folder), digest=survey.digest)
    if _is_whole(folder, survey.digest):
        progress(f"found prepared in {folder}")
        return ref
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise DataError(f"the cache {folder.parent} cannot be made: {e}; set EVERSTEP_CACHE to a folder that can be written") from e
    with _lock(folder, progress):
        if _is_whole(folder, survey.digest):  # the one we waited for made it
            progress(f"found prepared in {folder}")
            return ref
        _set_aside(folder)
        _remove_leftovers(folder)
        building = _building(folder)
        building.mkdir()
        try:
            manifest = _build(building, config, corpus, survey, tokenizer_file, progress)
        except OSError as e:  # of our own files: the sources' errors are typed
            shutil.rmtree(building, ignore_errors=True)
            raise DataError(f"{building} could not be written: {e}; free some space or set EVERSTEP_CACHE to another disk") from e
        except BaseException:  # a stop too: nobody else will come for it
            shutil.rmtree(building, ignore_errors=True)
            raise
        os.rename(building, folder)
        fsync(folder.parent)
    train, val = manifest.splits["train"], manifest.splits["val"]
    log.info("prepared %s: %d + %d rows of %d tokens in %s", config.path, train.rows, val.rows, manifest.seq_len, folder)
    progress(f"prepared in {folder}")
    return ref


def _read_tokenizer(config: TextDataConfig) -> bytes | None:
    if config.tokenizer.path is None:
        return None
    try:
        return Path(config.tokenizer.path).expanduser().read_bytes()
    except OSError as e:
        raise DataError(f"data.tokenizer.path {config.tokenizer.path} cannot be read: {e.strerror}; name a tokenizer.json") from e


def _is_whole(folder: Path, digest: str) -> bool:
    try:
        return load_manifest(folder).digest == digest
    except DataError:
        return False


def _set_aside(folder: Path) -> None:
    """What stands at `folder` and is not whole goes out of the way, but stays for whoever wants to know why."""
    if not folder.exists():
        return
    try:
        load_manifest(folder)
        reason = "its manifest is of other data"
    except DataError as e:
        reason = str(e)
    n = 1
    while (aside := folder.with_name(f"{folder.name}.damaged-{n}")).exists():
        n += 1
    os.rename(folder, aside)
    log.warning("prepared data was damaged and is made again: %s; moved to %s, which can be deleted", reason, aside)


def _building(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.building")


def _lock_path(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


@contextmanager
def _lock(folder: Path, progress: Progress) -> Iterator[None]:
    """Be the only one that prepares `folder`; waits for whoever does."""
    try:
        fd = os.open(_lock_path(folder), os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as e:
        raise DataError(f"the cache {folder.parent} cannot be written: {e}; set EVERSTEP_CACHE to a folder that can") from e
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another process that prepares {folder}")
            fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_leftovers(folder: Path) -> None:
    """Delete what killed preparations left in the cache; a lock that can be had says that nobody works there."""
    shutil.rmtree(_building(folder), ignore_errors=True)  # ours: the lock is held
    for other in folder.parent.glob(".*.building"):
        fd = os.open(other.with_suffix(".lock"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(other, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(fd)


def _build(
    folder: Path,
    config: TextDataConfig,
    corpus: Corpus,
    survey: Survey,
    tokenizer_file: bytes | None,
    progress: Progress,
) -> DataManifest:
    splits = [name for name in SPLITS if name != "test" or config.test_fraction > 0]
    texts = {split: Spool(folder / f"{split}.spool") for split in splits}
    num_paragraphs = 0
    for split, text, removed in corpus.cleaned(survey):
        num_paragraphs += removed
        if text.strip():
            texts[split].add(text)
    for split, spool in texts.items():
        spool.close()
        if not spool.documents:
            raise DataError(f"{split} is empty: all its paragraphs stand in held-out documents too; give text that repeats itself less")
    documents, size = (sum(getattr(spool, what) for spool in texts.values()) for what in ("documents", "bytes"))
    progress(f"{documents} documents, {size / 1e6:.1f} MB; making the {config.tokenizer.kind} tokenizer")
    _make_tokenizer(folder / TOKENIZER, config, texts["train"], tokenizer_file)
    tokenizer = load_tokenizer(folder)
    records = {}
    for split, spool in texts.items():
        progress(f"packing {split}: {spool.documents} documents, {spool.bytes / 1e6:.1f} MB")
        records[split] = _pack(folder, split, spool, tokenizer, seq_len=config.seq_len)
    progress(f"counting for the baseline, an {MODEL}")
    model = ByteModel.train(texts["train"])
    baseline = {"model": MODEL} | {split: model.bits_per_byte(texts[split]) for split in splits if split != "train"}
    for spool in texts.values():
        spool.path.unlink()
    manifest = DataManifest(
        digest=survey.digest,
        seq_len=config.seq_len,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
        settings=config.prepare_settings(),
        tokenizer=FileRecord(**_record(folder / TOKENIZER)),
        splits=records,
        duplicates=Duplicates(documents=survey.num_duplicates, paragraphs=num_paragraphs),
        baseline=baseline,
    )
    (folder / NAME).write_bytes(seal(manifest.to_dict()))
    fsync_tree(folder)
    return manifest


class Spool:
    """Texts in a file, one JSON string a line: read several times, held in memory never."""

    def __init__(self, path: Path):
        self.path = path
        self.documents = self.bytes = 0
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  (close() closes it)

    def add(self, text: str) -> None:
        self.documents += 1
        self.bytes += len(text.encode())
        self._file.write(json.dumps(text, ensure_ascii=False) + "\n")

    def close(self) -> None:
        self._file.close()

    def __iter__(self) -> Iterator[str]:
        with open(self.path, encoding="utf-8", newline="\n") as f:
            for line in f:
                yield json.loads(line)


def _make_tokenizer(path: Path, config: TextDataConfig, texts: Iterable[str], given: bytes | None) -> None:
    from .tokenizer import make_byte, train_bpe

    if given is not None:
        path.write_bytes(given)
    elif config.tokenizer.kind == "byte":
        make_byte().save(str(path))
    else:
        assert config.tokenizer.vocab_size is not None  # the config fills it in
        train_bpe(texts, vocab_size=config.tokenizer.vocab_size).save(str(path))


def _pack(folder: Path, split: str, texts: "Spool", tokenizer: Tokenizer, *, seq_len: int) -> SplitRecord:
    packer = Packer(seq_len=seq_len, eos_id=tokenizer.eos_id)
    writer = ShardWriter(folder, split, seq_len=seq_len)
    num_tokens = 0
    for portion in _portions(texts):
        documents = tokenizer.encode_batch(portion)
        num_tokens += sum(len(tokens) + 1 for tokens in documents)
        writer.add(packer.add(documents))
    writer.add(packer.finish())
    shards = writer.close()
    return SplitRecord(
        documents=texts.documents, bytes=texts.bytes, tokens=num_tokens, rows=sum(shard.rows for shard in shards), shards=shards
    )


def _portions(texts: Iterable[str]) -> Iterator[list[str]]:
    portion: list[str] = []
    size = 0
    for text in texts:
        portion.append(text)
        size += len(text)
        if size >= PORTION:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _record(path: Path) -> dict:
    return {"file": path.name, "size": path.stat().st_size, "crc32c": crc32c(path)}


class ShardWriter:
    """Writes rows to `SPLIT-NNNNN.arrow`, a new file whenever one is full."""

    def __init__(self, folder: Path, split: str, *, seq_len: int):
        import pyarrow as pa

        self._folder, self._split = folder, split
        self._rows_per_shard = max(1, SHARD_TOKENS // seq_len)
        # "not null" inside and out: the reader sees plain int32, without validity bitmaps
        rows = pa.list_(pa.field("item", pa.int32(), nullable=False), seq_len)
        self._schema = pa.schema([pa.field(field, rows, nullable=False) for field in FIELDS])
        self._shards: list[tuple[Path, int]] = []  # with the rows so far
        self._writer: pa.RecordBatchFileWriter | None = None

    def add(self, rows: dict[str, np.ndarray]) -> None:
        """Append `rows`: each field int32 (rows, seq)."""
        import pyarrow as pa

        start, total = 0, len(rows["inputs"])
        while start < total:
            if self._writer is None:
                path = self._folder / f"{self._split}-{len(self._shards):05d}.arrow"
                self._writer = pa.ipc.new_file(str(path), self._schema)
                self._shards.append((path, 0))
            path, have = self._shards[-1]
            stop = min(total, start + self._rows_per_shard - have)
            columns = [
                pa.FixedSizeListArray.from_arrays(pa.array(rows[field.name][start:stop].ravel()), type=field.type) for field in self._schema
            ]
            self._writer.write_batch(pa.record_batch(columns, schema=self._schema))
            self._shards[-1] = (path, have + stop - start)
            if self._shards[-1][1] == self._rows_per_shard:
                self._writer.close()
                self._writer = None
            start = stop

    def close(self) -> tuple[ShardRecord, ...]:
        """Finish the last file. Returns what was written."""
        if self._writer is not None:
            self._writer.close()
        return tuple(ShardRecord(**_record(path), rows=rows) for path, rows in self._shards)
