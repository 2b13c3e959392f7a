"""Prepares data: a folder of shards, tokenizer, report and manifest, named by the digest of everything that goes into it.

The work is cut into jobs, each of which leaves a result named by what went into it (results.py). Whatever kills the
preparation, the next one finds the results and does what is missing; whatever changes in the sources, the results of all
else are found. Nothing that is written depends on who ran the jobs, how many at a time, or in what order:

  survey     every unit of work: hashes of documents and paragraphs        parallel
  settle     which documents stay, in which split; the digest              here
  sample     some texts, for the tokenizer and the baseline                parallel
  tokenizer  learnt from them, or given                                    here
  tokenize   every unit of work; the baseline beside it                    parallel
  pack       every shard, from a window of its split's stream of tokens    parallel

The folder is made under another name, brought to the disk and renamed, so it is there whole or not at all. The same data
is prepared once however many ask for it: a kernel lock per digest makes the others wait, and dies with its holder.
"""

import copy
import errno
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.prepare import TextDataConfig, TokenizerConfig
from trainer.data.packed import NAME, DataManifest, Duplicates, FileRecord, ShardRecord, SplitRecord
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import DataError
from trainer.files import crc32c, fsync_tree, seal
from trainer.paths import cache_dir, prepared_dir

from ..refs import DataRef
from . import results
from .baseline import MODEL
from .documents import FOR_TOKENIZER
from .folder import building, is_whole, locked, publish, remove_leftovers, set_aside
from .jobs import Job, Runner, in_turn
from .progress import Progress, Tell
from .report import NAME as REPORT
from .report import compose
from .sample import BaselineJob, KeptReader, Sample, SampleJob
from .settle import HeldOut, Settled, header_of, held_out, settle
from .shards import NOTE, plan_shards
from .sources.base import Reading
from .sources.read import find_files
from .survey import SurveyJob, spool_of
from .tokenizer import given_file, make_tokenizer
from .tokens import TokenizeJob, versions
from .units import units_of

TOKENIZER = "tokenizer.json"
# Bytes of text, about, up to which it is kept from the first reading to the last: parsing it twice more costs 4 % of
# tokenizing it, and larger text would take too much of the disk.
SPOOLED = 10_000_000_000
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOENT)


class Preparation:
    """One preparation: its config, the units of work that a listing shows, and where its results are."""

    def __init__(
        self,
        config: TextDataConfig,
        *,
        cache: Path | None = None,
        on_progress: Tell | None = None,
        run: Runner = in_turn,
        on_advance: Callable[[Progress], None] | None = None,
    ):
        self.config = config
        self.path = config.path  # for people
        self._root = (cache or cache_dir()).absolute()
        self.cache = self._root / "data"
        self.work = self.cache / "work"
        self._tell = on_progress or (lambda message: None)
        self._run, self._on_advance = run, on_advance or (lambda progress: None)
        self.given = given_file(config.tokenizer)
        self._tell(f"listing {config.path}")
        self.files = find_files(config.path)
        self.units = units_of(self.files)
        self.wanted = Reading(config.text_field, config.filters, config.max_document_bytes)
        self._versions = versions()
        self._read: list[Path] | None = None
        self.beside: Sequence[Preparation] = ()  # texts that are trained beside this one: what they hold out is left out here

    def with_tokenizer(self, tokenizer: TokenizerConfig) -> "Preparation":
        """The same with another tokenizer, which changes nothing of what is read."""
        other = copy.copy(self)
        other.config, other.given = self.config.replace(tokenizer=tokenizer), given_file(tokenizer)
        return other

    def surveys(self) -> list[SurveyJob]:
        """The first reading of every unit."""
        config = self.config
        spool = sum(unit.weight for unit in self.units) <= SPOOLED
        return [SurveyJob(unit, self.wanted, config.max_bad_rows, config.limit, str(self.work), spool) for unit in self.units]

    def settle(self, paths: list[Path]) -> Settled:
        """What is to be made, after the first reading."""
        others = [other.held_out() for other in self.beside]
        header = header_of(self.config, self.given, self._versions)
        return settle(self.config, header, self.units[: len(paths)], paths, folder=self.work, others=others)

    def held_out(self) -> HeldOut:
        """The paragraphs of its held-out splits, after the first reading."""
        return held_out(self.config, self._survey())

    def folder(self, digest: str) -> Path:
        """Where it is to be."""
        return prepared_dir(digest, cache=self._root)

    def known(self) -> DataRef | None:
        """What was prepared from these very files and settings, if it is whole. Reads no more than a listing."""
        if (path := self._known_path()) is None or (found := results.read(path)) is None:
            return None
        folder = self.folder(found.facts["digest"])
        return DataRef(path=str(folder), digest=found.facts["digest"]) if is_whole(folder, found.facts["digest"]) else None

    def _known_path(self) -> Path | None:
        names = [[job.path and job.path.name for job in one.surveys()] for one in (self, *self.beside)]
        if any(name is None for some in names for name in some):
            return None
        header = header_of(self.config, self.given, self._versions)
        return self.work / "known" / f"{results.key_of(header, names[0], self.config.max_bad_rows, *names[1:])}.bin"

    def make(self) -> DataRef:
        """Do it."""
        if (ref := self.known()) is not None:
            self._tell(f"found prepared in {ref.path}")
            return ref
        known = self._known_path()
        ref = self._make()
        if known is not None:
            results.write(known, {"digest": ref.digest}, {})
        return ref

    def _make(self) -> DataRef:
        config = self.config
        try:
            self.cache.mkdir(parents=True, exist_ok=True)
            if not os.access(self.cache, os.W_OK):
                raise PermissionError(13, "it cannot be written")
        except OSError as e:
            raise DataError(f"the cache {self.cache} cannot be made: {e}; set EVERSTEP_CACHE to a folder that can be written") from e
        try:
            self._tell(f"reading {len(self.files)} files in {len(self.units)} parts")
            paths = self._survey()
            settled = self.settle(paths)
            self._tell(f"read {sum(s.documents for s in settled.sources)} documents")
            folder = self.folder(settled.digest)
            ref = DataRef(path=str(folder), digest=settled.digest)
            if is_whole(folder, settled.digest):
                self._tell(f"found prepared in {folder}")
                return ref
            with locked(folder, self._tell):
                if is_whole(folder, settled.digest):  # the one we waited for made it
                    self._tell(f"found prepared in {folder}")
                    return ref
                set_aside(folder)
                remove_leftovers(folder)
                manifest = self._build(building(folder), settled, paths)
                publish(folder)
        except OSError as e:
            if e.errno not in OF_THE_DISK:
                raise  # the sources' are typed; what remains is another's
            raise DataError(f"{self.cache} could not be written: {e}; free some space or set EVERSTEP_CACHE to another disk") from e
        for path in paths:
            spool_of(path).unlink(missing_ok=True)
        results.prune(self.work)
        train, val = manifest.splits["train"], manifest.splits["val"]
        self._tell(f"prepared {config.path}: {train.rows:,} + {val.rows:,} rows of {manifest.seq_len} tokens in {folder}")
        return ref

    def _survey(self) -> list[Path]:
        """Read all units, once; where only the first documents are wanted, not more of them than have those."""
        jobs, limit = self.surveys(), self.config.limit
        if self._read is None and limit is None:
            self._read = [Path(found["path"]) for found in self._all("reading", jobs)]
        if self._read is not None:
            return self._read
        paths: list[Path] = []
        have = 0
        while have < (limit or 0) and jobs:  # by the number of units that were read, so what is read depends on nothing else
            some, jobs = jobs[: len(paths) + 1], jobs[len(paths) + 1 :]
            found = [Path(one["path"]) for one in self._all("reading", some)]
            have += sum(len(results.needed(path).arrays["documents"]) for path in found)
            paths += found
        self._read = paths
        return paths

    def _all(self, stage: str, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Run jobs of one stage, telling how far they are."""
        progress = Progress(stage, jobs)

        def done(job: Job, facts: dict[str, Any]) -> None:
            progress.add(job, facts)
            self._on_advance(progress)

        self._on_advance(progress)
        return self._run(jobs, done)

    def _build(self, folder: Path, settled: Settled, paths: list[Path]) -> DataManifest:
        config, work = self.config, str(self.work)
        splits = list(settled.documents)
        kept = [
            KeptReader(unit, self.wanted, str(survey), str(fate))
            for unit, survey, fate in zip(self.units[: len(paths)], paths, settled.fates, strict=True)
        ]
        drawn = [(reader, some) for reader, some in zip(kept, settled.sampled, strict=True) if some.any()]
        samples = [SampleJob(reader, some.tobytes(), work) for reader, some in drawn]
        sampled = tuple(found["path"] for found in self._all("sampling", samples))
        self._tell(f"making the {config.tokenizer.kind} tokenizer")
        self._on_advance(Progress("making the tokenizer", ()))
        tokenizer_path = self._tokenizer(folder, sampled)
        tokenizer = load_tokenizer(tokenizer_path)
        digest = results.key_of(crc32c(tokenizer_path), tokenizer_path.stat().st_size, self._versions)
        self._tell(f"tokenizing {sum(settled.documents.values())} documents, counting the baseline, an {MODEL}")
        jobs: list[Job] = [TokenizeJob(reader, str(tokenizer_path), digest, work) for reader in kept]
        *tokens, baseline = self._all("tokenizing", [*jobs, BaselineJob(sampled, tuple(splits), work)])
        self._tell("packing " + ", ".join(splits))
        lengths = {split: [(found["path"], _lengths(found["path"], split)) for found in tokens] for split in splits}
        plans = {
            split: plan_shards(folder, split, lengths[split], packing=config.packing, seq_len=config.seq_len, eos_id=tokenizer.eos_id)
            for split in splits
        }
        packed = iter(self._all("packing", [job for split in splits for job in plans[split]]))
        records = {}
        for split in splits:
            shards = tuple(ShardRecord(**next(packed)) for _ in plans[split])
            totals = {what: sum(found["splits"][split][what] for found in tokens) for what in ("documents", "bytes", "tokens")}
            totals["tokens"] += totals["documents"]  # an end each
            rows = sum(shard.rows for shard in shards)
            records[split] = SplitRecord(**totals, rows=rows, shards=shards, utilisation=totals["tokens"] / (rows * config.seq_len))
        manifest = DataManifest(
            digest=settled.digest,
            seq_len=config.seq_len,
            vocab_size=tokenizer.vocab_size,
            eos_id=tokenizer.eos_id,
            settings=config.prepare_settings(),
            tokenizer=FileRecord(file=TOKENIZER, size=tokenizer_path.stat().st_size, crc32c=crc32c(tokenizer_path)),
            splits=records,
            duplicates=Duplicates(documents=settled.duplicates, paragraphs=settled.paragraphs),
            baseline=baseline["baseline"],
            sources=settled.sources,
            left_out=settled.left_out,
            histogram={split: histogram(np.concatenate([own for _, own in lengths[split]]) + 1) for split in splits},
            versions=self._versions,
        )
        texts = {split: Sample(sampled, split) for split in splits}
        (folder / REPORT).write_text(compose(config, manifest, settled.bad, texts), encoding="utf-8")
        for note in folder.glob(f"*{NOTE}"):
            note.unlink()
        (folder / NAME).write_bytes(seal(manifest.to_dict()))
        fsync_tree(folder)
        return manifest

    def _tokenizer(self, folder: Path, sampled: tuple[str, ...]) -> Path:
        """The tokenizer in the building folder. One that is learnt is kept among the results too, as jobs read it from there."""
        config = self.config.tokenizer
        made_of = [config.settings(), self._versions, [Path(path).stem for path in sampled] if config.kind == "bpe" else None]
        kept = self.work / "tokenizer" / f"{results.key_of(made_of)}.bin"
        found = results.read(kept)
        path = folder / TOKENIZER
        if found is not None and self.given is None:
            path.write_bytes(found.arrays["file"].tobytes())
            results.is_whole(kept)
        else:
            make_tokenizer(path, config, Sample(sampled, "train", FOR_TOKENIZER), self.given)
            if self.given is None:
                results.write(kept, {}, {"file": np.frombuffer(path.read_bytes(), np.uint8)})
        return path


def _lengths(path: str, split: str) -> np.ndarray:
    return results.needed(Path(path)).arrays[f"{split}_lengths"].copy()


def histogram(lengths: np.ndarray) -> tuple[int, ...]:
    """How many are from 2**i to 2**(i+1) - 1, for each i up to the largest."""
    return tuple(np.bincount(np.frexp(lengths)[1] - 1).tolist())
