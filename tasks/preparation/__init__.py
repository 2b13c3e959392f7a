"""Raw text to prepared data: sources -> documents -> tokenizer -> rows -> shards with a manifest."""

from .build import Preparation, prepare

__all__ = ["Preparation", "prepare"]
