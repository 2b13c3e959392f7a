"""The third reading: tokens of all documents that stay, one after the other, without ends."""

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from trainer.data.packed import VERSION
from trainer.data.tokenizer import Tokenizer, load_tokenizer

from . import results
from .documents import SPLITS
from .sample import KeptReader
from .survey import label

PORTION = 1 << 18  # characters that are tokenized at a time; a batch that stays in the cache is a tenth quicker than one of a megabyte


class TokenizeJob(NamedTuple):
    """Tokenizes one unit."""

    kept: KeptReader
    tokenizer: str  # path of a tokenizer.json
    tokenizer_digest: str  # of it and of the library
    folder: str

    @property
    def name(self) -> str:
        return f"tokenize[{label(self.kept.unit)}]"

    @property
    def size(self) -> int:
        return self.kept.unit.weight

    @property
    def path(self) -> Path:
        return Path(self.folder, "tokens", results.key_of(VERSION, Path(self.kept.fate).stem, self.tokenizer_digest) + ".bin")

    def run(self) -> dict[str, Any]:
        """{"path", "splits": {name: {"documents", "bytes", "tokens"}}}; tokens do not count ends."""
        if (found := results.read(self.path)) is not None and results.is_whole(self.path):
            return {"path": str(self.path), **found.facts}
        tokenizer = _tokenizer(self.tokenizer, self.tokenizer_digest)
        kind = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
        tokens: list[list[np.ndarray]] = [[] for _ in SPLITS]
        lengths: list[list[int]] = [[] for _ in SPLITS]
        sizes = [0] * len(SPLITS)
        for splits, texts in _portions(self.kept.documents()):
            for split, text, ids in zip(splits, texts, tokenizer.encode_batch(texts), strict=True):
                tokens[split].append(ids.astype(kind))
                lengths[split].append(len(ids))
                sizes[split] += len(text.encode())
        arrays, splits_found = {}, {}
        for i, name in enumerate(SPLITS):
            arrays[name] = np.concatenate([np.zeros(0, kind), *tokens[i]])
            arrays[f"{name}_lengths"] = np.array(lengths[i], np.int64)
            splits_found[name] = {"documents": len(lengths[i]), "bytes": sizes[i], "tokens": len(arrays[name])}
        results.write(self.path, {"splits": splits_found}, arrays)
        return {"path": str(self.path), "splits": splits_found}


@functools.lru_cache(maxsize=1)
def _tokenizer(path: str, digest: str) -> Tokenizer:
    """Loading takes as long as some hundred documents, and threads may share one."""
    return load_tokenizer(path)


def _portions(documents: Iterator[tuple[int, int, str]]) -> Iterator[tuple[list[int], list[str]]]:
    splits: list[int] = []
    texts: list[str] = []
    size = 0
    for _, split, text in documents:
        splits.append(split)
        texts.append(text)
        size += len(text)
        if size >= PORTION:
            yield splits, texts
            splits, texts, size = [], [], 0
    if texts:
        yield splits, texts


def versions() -> dict[str, str]:
    """Of the libraries that shape tokens."""
    import tokenizers

    return {"tokenizers": tokenizers.__version__}
