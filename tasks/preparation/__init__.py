"""Raw text to prepared data: sources -> documents -> tokenizer -> rows -> shards with a manifest."""

from .build import prepare

__all__ = ["prepare"]
