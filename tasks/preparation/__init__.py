"""Raw text to prepared data: sources -> documents -> tokenizer -> rows -> shards with a manifest."""

from .build import Preparation
from .choose import preparation_of, prepare

__all__ = ["Preparation", "preparation_of", "prepare"]
