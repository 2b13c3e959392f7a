"""Llama-style decoder: rotary positions, RMSNorm, SwiGLU, grouped-query attention within documents."""

from typing import Literal

from pydantic import Field, model_validator

from ..config import Config
from .base import Model, ModelConfig, Remat

Dtype = Literal["float32", "bfloat16", "float16"]


class LlamaRematConfig(Config):
    """What of each kind of block is kept for the backward pass; see `Remat`. `block` is a whole layer, with both others in it.

    It is meant for accelerators: XLA's scheduler for CPUs computes again as early as it can, and saves next to nothing.
    """

    block: Remat = "none"
    attention: Remat = "none"
    mlp: Remat = "none"


class LlamaConfig(ModelConfig):
    """A decoder-only transformer as in Touvron et al. 2023 (arXiv 2302.13971) with the grouped queries of arXiv 2305.13245."""

    kind: Literal["llama"] = "llama"
    vocab_size: int = Field(4096, ge=2)  # rows of the embedding; at least the tokenizer's
    width: int = Field(128, ge=1)  # of the residual stream
    num_layers: int = Field(2, ge=1)
    num_heads: int = Field(4, ge=1)
    num_kv_heads: int | None = Field(None, ge=1)  # None: as many as heads
    head_dim: int | None = Field(None, ge=2)  # None: width / num_heads
    mlp_width: int | None = Field(None, ge=1)  # None: 8/3 of width, rounded up to a multiple of 32
    max_positions: int = Field(4096, ge=1)  # longest row the model is meant for
    rope_theta: float = Field(10_000.0, gt=0)
    norm_eps: float = Field(1e-5, gt=0)
    tie_embeddings: bool = True
    dtype: Dtype = "float32"  # of activations and matrix products
    param_dtype: Dtype = "float32"  # of the master weights
    init_std: float = Field(0.02, gt=0)  # of embeddings and matrices; outputs of blocks scaled by 1/sqrt(2 layers)
    remat: LlamaRematConfig = LlamaRematConfig()

    @model_validator(mode="after")
    def _fits(self) -> "LlamaConfig":
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(f"width {self.width} is not a multiple of num_heads {self.num_heads}; set head_dim or change one")
        if self.num_heads % self.kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.kv_heads}")
        if self.head_size % 2:
            raise ValueError(f"head_dim {self.head_size} is odd, and rotary positions turn pairs; make it even")
        return self

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads."""
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        """Dim of one head."""
        return self.head_dim or self.width // self.num_heads

    @property
    def hidden(self) -> int:
        """Width of the feed-forward layer."""
        return self.mlp_width or -(-self.width * 8 // 3 // 32) * 32

    def flops_per_token(self, seq_len: int) -> float:
        """6N + 12 L H Q T of PaLM (arXiv 2204.02311, appendix B), with N the parameters that take part in a product of matrices.

        An embedding of its own does not: its rows are looked up. One that is tied counts, as the head. As in the paper the
        attention of a row counts in full, though no token looks ahead or into other documents.
        """
        heads = self.width * self.head_size * (2 * self.num_heads + 2 * self.kv_heads)
        products = self.num_layers * (heads + 3 * self.width * self.hidden) + self.vocab_size * self.width
        return 6.0 * products + 12.0 * self.num_layers * self.num_heads * self.head_size * seq_len

    def build(self) -> Model:
        """The model; its flax modules are in `transformer.py`."""
        from .linen import LinenModel
        from .transformer import Transformer

        return LinenModel(Transformer(self), compute_dtype=self.dtype)
