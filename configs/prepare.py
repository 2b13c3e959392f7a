"""What text to train on, and how it becomes rows of tokens.

The documents are part of a preparation's identity by what they say, not by where they lie, so the same text under
another path is not prepared again.
"""

import operator
from collections.abc import Callable
from typing import Any, Literal

from pydantic import Field, model_validator

from trainer.config import Config
from trainer.data import PackedConfig
from trainer.data.tokenizer import EOS

BYTE_VOCAB_SIZE = 257  # the end of a document, and 256 bytes


class TokenizerConfig(Config):
    """How text becomes tokens: byte pairs learnt from a sample of the training split, plain bytes, or a tokenizer.json."""

    kind: Literal["bpe", "byte", "file"] = "bpe"
    vocab_size: int | None = Field(None, ge=BYTE_VOCAB_SIZE)  # bpe: at most so many, 4096 if None; file: always None
    path: str | None = None  # kind file: a tokenizer.json of Hugging Face tokenizers, or its fsspec URL (hf://org/repo/tokenizer.json)
    sample_bytes: int = Field(16_000_000, ge=1)  # bpe: bytes of text it is learnt from
    seed: int = Field(0, ge=0, lt=2**32)  # bpe: which documents those are
    specials: tuple[str, ...] = ()  # bpe, byte: more special tokens, with the ids after the end's; text never reads as one

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
        if self.specials and self.kind == "file":
            raise ValueError(f"specials {list(self.specials)} are for a tokenizer that is made here; the file has its own: leave them out")
        if len({EOS, "", *self.specials}) != len(self.specials) + 2:
            raise ValueError(f"specials {list(self.specials)} have one twice, an empty one or {EOS}, which is there already; leave it out")
        if self.vocab_size is not None and self.kind == "bpe" and self.vocab_size < BYTE_VOCAB_SIZE + len(self.specials):
            raise ValueError(f"vocab_size {self.vocab_size} has no room for 256 bytes, the end and {len(self.specials)} specials; raise it")
        return self

    def settings(self) -> dict[str, Any]:
        """What decides the tokenizer, in JSON terms, given a file's bytes or the training text."""
        if self.kind == "file":
            return {"kind": "file"}
        shaped = self.model_dump(mode="json", exclude={"path"})
        return shaped if self.kind == "bpe" else {k: shaped[k] for k in ("kind", "vocab_size", "specials")}


Plain = str | bool | int | float
OPS: dict[str, Callable[[Any, Any], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "in": lambda a, b: a in b,
    "not in": lambda a, b: a not in b,
    "contains": lambda a, b: b in a,
}


class FilterConfig(Config):
    """A rule that a row must keep to be a document. A row without the field, or with null there, does not."""

    field: str = Field(min_length=1)  # a key of the row, or a column
    op: Literal["==", "!=", "<", "<=", ">", ">=", "in", "not in", "contains"] = "=="
    value: Plain | tuple[Plain, ...]  # "in", "not in": a list; "contains": what the field's text has in it

    @model_validator(mode="after")
    def _makes_sense(self) -> "FilterConfig":
        several = isinstance(self.value, tuple)
        if several != (self.op in ("in", "not in")):
            wants = "a list of values" if not several else "one value"
            raise ValueError(f"filter {self.field} {self.op} wants {wants}, not {self.value!r}; give it, or choose another op")
        if several and not self.value:
            raise ValueError(f"filter {self.field} {self.op} [] would {'drop' if self.op == 'in' else 'keep'} every row; name values")
        if self.op in ("<", "<=", ">", ">=") and isinstance(self.value, bool):
            raise ValueError(f"filter {self.field} {self.op} {self.value}: a truth value has no order; use ==")
        if isinstance(self.value, float) and self.value != self.value:
            raise ValueError(f"filter {self.field} {self.op} nan is never true; give a number")
        if self.op == "contains" and (not isinstance(self.value, str) or not self.value):
            raise ValueError(f"filter {self.field} contains {self.value!r}: give some text to look for")
        return self

    def holds(self, found: Any) -> bool:
        """Whether a row with `found` in the field keeps the rule. Raises TypeError if the two cannot be compared."""
        if found is None:
            return False
        if isinstance(found, bytes):
            found = found.decode(errors="replace")
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        if not any(_kind(v) == _kind(found) for v in values):
            raise TypeError(f"is {found!r:.80}, and cannot be compared with {self.value!r}")
        return OPS[self.op](found, self.value)


def _kind(value: Any) -> type:
    """Numbers compare with numbers, text with text, truth values with truth values, and nothing else."""
    return float if type(value) is int else type(value)


class TextDataConfig(PackedConfig):
    """Documents from files, packed into rows; see `tasks/preparation`."""

    kind: Literal["text"] = "text"
    path: str = "bundled:python-docs"  # a file, folder, glob or fsspec URL (gs://, hf://, https://, ...); see sources/find.py
    text_field: str = Field("text", min_length=1)  # key or column of the text, where there are any
    filters: tuple[FilterConfig, ...] = ()  # rows that do not keep all of them are no documents
    limit: int | None = Field(None, ge=1)  # documents: the first so many, in the order of file names and rows
    max_document_bytes: int = Field(1 << 25, ge=1, le=1 << 30)  # of UTF-8; one is tokenized as a whole, in memory
    # Rows that are no text: null, broken, too long. 0 because text that is left out without a word is found when the model is
    # bad; whoever knows the data allows some, and finds them in the report. Empty text loses nothing and is only counted.
    max_bad_rows: int = Field(0, ge=0)
    tokenizer: TokenizerConfig = TokenizerConfig()
    # greedy: documents one after the other, cut where a row ends. best_fit: documents that fit into a row stand in it whole
    # (Ding et al. 2024, arXiv 2404.10830), for slightly more padding.
    packing: Literal["greedy", "best_fit"] = "greedy"
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
            "tokenizer": self.tokenizer.settings(),
            "packing": self.packing,
            "val_fraction": self.val_fraction,
            "test_fraction": self.test_fraction,
        }
