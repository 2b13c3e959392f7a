"""The index of data: how prepared rows are loaded, and the tokenizer that made them."""

from .loader import batch_of, eval_batches, place_of, rows_of, train_loader
from .packed import DataManifest, PackedConfig, ShardedRows, load_manifest
from .tokenizer import Tokenizer, load_tokenizer

__all__ = [
    "DataManifest",
    "PackedConfig",
    "ShardedRows",
    "Tokenizer",
    "batch_of",
    "eval_batches",
    "load_manifest",
    "load_tokenizer",
    "place_of",
    "rows_of",
    "train_loader",
]
