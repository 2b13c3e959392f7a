"""Prepares a mixture: each part by itself, but for the paragraphs that another part holds out, and a manifest over all of them.

The mixture's folder holds no rows of its own: its manifest names the parts' shards beside it, so a part that several
mixtures share is there once, and another weight takes no time. With a tokenizer that is learnt, the first part learns it and
the others are given the file.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path

from configs.mixture import MixtureDataConfig
from configs.prepare import TokenizerConfig
from trainer.data.packed import NAME, VERSION, DataManifest, Duplicates, FileRecord, PartRecord, SplitRecord, load_manifest
from trainer.files import fsync_tree, seal
from trainer.paths import cache_dir, prepared_dir

from ..refs import DataRef
from .build import TOKENIZER, Preparation
from .folder import building, is_whole, locked, publish, remove_leftovers, set_aside
from .jobs import Runner, in_turn
from .progress import Progress, Tell
from .report import NAME as REPORT
from .sources.base import File
from .survey import SurveyJob
from .units import Unit


class MixturePreparation:
    """The preparations of the parts, and the folder over them. Has the face of `Preparation`."""

    def __init__(
        self,
        config: MixtureDataConfig,
        *,
        cache: Path | None = None,
        on_progress: Tell | None = None,
        run: Runner = in_turn,
        on_advance: Callable[[Progress], None] | None = None,
    ):
        self.config = config
        self.path = ", ".join(part.data.path for part in config.parts)
        self._root = (cache or cache_dir()).absolute()
        self._tell = on_progress or (lambda message: None)
        self._texts = [
            Preparation(part.data, cache=cache, on_progress=on_progress, run=run, on_advance=on_advance) for part in config.parts
        ]
        for i, text in enumerate(self._texts):
            text.beside = [*self._texts[:i], *self._texts[i + 1 :]]

    def _others(self, first: DataRef) -> list[Preparation]:
        """All but the first, with the tokenizer that the first has learnt."""
        if self.config.tokenizer.kind != "bpe":
            return self._texts[1:]
        learnt = TokenizerConfig(kind="file", path=str(Path(first.path, TOKENIZER)))
        return [text.with_tokenizer(learnt) for text in self._texts[1:]]

    @property
    def files(self) -> list[File]:
        """Of all parts."""
        return [file for part in self._texts for file in part.files]

    @property
    def units(self) -> list[Unit]:
        """Of all parts."""
        return [unit for part in self._texts for unit in part.units]

    def surveys(self) -> list[SurveyJob]:
        """The first reading of every unit of all parts."""
        return [job for part in self._texts for job in part.surveys()]

    def known(self) -> DataRef | None:
        """What was prepared from these very files and settings, if it is whole."""
        first = self._texts[0].known()
        if first is None:
            return None
        refs = [first, *(ref for part in self._others(first) if (ref := part.known()) is not None)]
        if len(refs) < len(self.config.parts):
            return None
        ref = self._ref(refs)
        return ref if is_whole(Path(ref.path), ref.digest) else None

    def make(self) -> DataRef:
        """Prepare what is missing. Raises what `Preparation.make` does."""
        first = self._texts[0].make()
        refs = [first, *(part.make() for part in self._others(first))]
        ref = self._ref(refs)
        folder = Path(ref.path)
        with locked(folder, self._tell):
            if not is_whole(folder, ref.digest):
                set_aside(folder)
                remove_leftovers(folder)
                self._write(building(folder), ref.digest, refs)
                publish(folder)
        self._tell(f"mixed {len(refs)} parts in {folder}")
        return ref

    def _ref(self, parts: Sequence[DataRef]) -> DataRef:
        made_of = {"version": VERSION, "mixture": [[part.digest, w] for part, w in zip(parts, self.config.weights, strict=True)]}
        digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()
        return DataRef(path=str(prepared_dir(digest, cache=self._root)), digest=digest)

    def _write(self, folder: Path, digest: str, refs: Sequence[DataRef]) -> None:
        found = [load_manifest(ref.path) for ref in refs]
        (folder / TOKENIZER).write_bytes(Path(refs[0].path, TOKENIZER).read_bytes())
        manifest = mixed(found, [Path(ref.path).name for ref in refs], digest=digest, weights=self.config.weights)
        (folder / REPORT).write_text(report(self.config, manifest, found), encoding="utf-8")
        (folder / NAME).write_bytes(seal(manifest.to_dict()))
        fsync_tree(folder)


def mixed(parts: Sequence[DataManifest], folders: Sequence[str], *, digest: str, weights: Sequence[float]) -> DataManifest:
    """The manifest over parts that lie in `folders` beside it."""
    first = parts[0]
    splits = {}
    for name in first.splits:
        own = [part.splits[name] for part in parts]
        sums = {what: sum(getattr(split, what) for split in own) for what in ("documents", "bytes", "tokens", "rows")}
        shards = tuple(
            shard.replace(file=f"../{folder}/{shard.file}") for folder, split in zip(folders, own, strict=True) for shard in split.shards
        )
        splits[name] = SplitRecord(**sums, shards=shards, utilisation=sums["tokens"] / (sums["rows"] * first.seq_len))
    baseline = {"model": first.baseline["model"]} | {
        name: sum(part.baseline[name] * part.splits[name].bytes for part in parts) / splits[name].bytes
        for name in splits
        if name != "train"
    }
    return DataManifest(
        digest=digest,
        seq_len=first.seq_len,
        vocab_size=first.vocab_size,
        eos_id=first.eos_id,
        settings={"packing": "mixture", "parts": [part.settings for part in parts]},
        tokenizer=FileRecord(file=TOKENIZER, size=first.tokenizer.size, crc32c=first.tokenizer.crc32c),
        splits=splits,
        duplicates=Duplicates(**{what: sum(getattr(p.duplicates, what) for p in parts) for what in ("documents", "paragraphs")}),
        baseline=baseline,
        sources=tuple(source for part in parts for source in part.sources),
        left_out=dict(sum((Counter(part.left_out) for part in parts), Counter())),
        histogram={name: tuple(map(sum, zip_longest(*(p.histogram[name] for p in parts), fillvalue=0))) for name in first.histogram},
        versions=first.versions,
        parts=tuple(
            PartRecord(digest=part.digest, weight=weight, shards=len(part.splits["train"].shards))
            for part, weight in zip(parts, weights, strict=True)
        ),
    )


def report(config: MixtureDataConfig, manifest: DataManifest, parts: Iterable[DataManifest]) -> str:
    """The mixture's report.md; the parts have their own."""
    lines = ["# A mixture of texts", "", f"`{manifest.digest}`", "", "| weight | text | training tokens | val | test | report |"]
    lines += ["|---|---|---|---|---|---|"]
    for weight, part, found in zip(config.weights, config.parts, parts, strict=True):
        counts = [f"{found.splits[name].tokens:,}" if name in found.splits else "none" for name in ("train", "val", "test")]
        lines.append(f"| {weight:.4f} | {part.data.path} | {' | '.join(counts)} | `{found.digest[:16]}/{REPORT}` |")
    lines += ["", "Weights are of the training rows; val and test are the parts' own, one after the other. The baseline is the mean of"]
    lines += ["the parts' own, by bytes. What one part holds out, documents and paragraphs, is in no part's training text: of the"]
    lines += [f"{manifest.duplicates.paragraphs:,} paragraphs that were left out for that, each part's report counts its own. A document"]
    return "\n".join([*lines, "that several parts have in training is drawn from each of them.", ""])
