"""What text to train on, and how it becomes rows of tokens.

The documents are part of a preparation's identity by what they say, not by where they lie, so the same text under
another path is not prepared again.
"""

from typing import Any, Literal

from pydantic import Field, model_validator

from trainer.config import Config, part_union
from trainer.data import PackedConfig

BYTE_VOCAB_SIZE = 257  # the end of a document, and 256 bytes


class TokenizerConfig(Config):
    """How text becomes tokens: byte pairs learnt from the training split, plain bytes, or a tokenizer.json."""

    kind: Literal["bpe", "byte", "file"] = "bpe"
    vocab_size: int | None = Field(None, ge=BYTE_VOCAB_SIZE)  # bpe: at most so many, 4096 if None; file: always None
    path: str | None = None  # kind file: a tokenizer.json of Hugging Face tokenizers

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("vocab_size") is None:
            default = {"bpe": 4096, "byte": BYTE_VOCAB_SIZE}.get(data.get("kind", "bpe"))
            return {**data, "vocab_size": default}
        return data

    @model_validator(mode="after")
    def _fits(self) -> "TokenizerConfig":
        if self.kind == "byte" and self.vocab_size != BYTE_VOCAB_SIZE:
            raise ValueError(f"a byte tokenizer has {BYTE_VOCAB_SIZE} tokens, not vocab_size {self.vocab_size}; set vocab_size to null")
        if self.kind == "file" and self.vocab_size is not None:
            raise ValueError(f"the file says how many tokens there are, not vocab_size {self.vocab_size}; set it to null")
        if self.kind == "file" and not self.path:
            raise ValueError("a tokenizer of kind file needs path, a tokenizer.json")
        if self.kind != "file" and self.path is not None:
            raise ValueError(f"path {self.path!r} is for kind file, but kind is {self.kind}; set kind=file or leave path out")
        return self


class TextDataConfig(PackedConfig):
    """Documents from files, packed into rows; see `tasks/preparation`."""

    kind: Literal["text"] = "text"
    path: str = "bundled:python-docs"  # a file, folder, glob or fsspec URL of .txt, .md, .jsonl (also .gz, .xz), .parquet
    text_field: str = "text"  # key or column of the text in .jsonl and .parquet
    tokenizer: TokenizerConfig = TokenizerConfig()
    val_fraction: float = Field(0.05, gt=0)  # of the documents, by their hash
    test_fraction: float = Field(0.05, ge=0)  # 0: no test split

    @model_validator(mode="after")
    def _leaves_training(self) -> "TextDataConfig":
        if self.val_fraction + self.test_fraction > 0.5:
            raise ValueError(
                f"val_fraction {self.val_fraction} + test_fraction {self.test_fraction} leave less than half of the "
                "documents to train on; lower them to 0.5 together"
            )
        if not self.path:
            raise ValueError("path is empty; name a file, a folder or bundled:python-docs")
        return self

    def prepare_settings(self) -> dict[str, Any]:
        """The settings, in JSON terms, that decide what is prepared from given documents (and a given tokenizer file)."""
        return {
            "seq_len": self.seq_len,
            "tokenizer": {"kind": self.tokenizer.kind, "vocab_size": self.tokenizer.vocab_size},
            "val_fraction": self.val_fraction,
            "test_fraction": self.test_fraction,
        }


AnyDataConfig = part_union(PackedConfig, TextDataConfig)
