"""The index of models: one line each."""

from ..config import part_union
from .base import Model, ModelConfig
from .llama import LlamaConfig

AnyModelConfig = part_union(ModelConfig, LlamaConfig)

__all__ = ["AnyModelConfig", "LlamaConfig", "Model", "ModelConfig"]
