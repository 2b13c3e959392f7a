"""The index of data: how prepared rows are loaded, and the tokenizer that made them."""

from .packed import DataManifest, PackedConfig, ShardedRows, eval_batches, load_manifest, train_loader
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "DataManifest",
    "PackedConfig",
    "ShardedRows",
    "Tokenizer",
    "eval_batches",
    "load_manifest",
    "load_tokenizer",
    "train_loader",
]
