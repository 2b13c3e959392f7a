"""Several kinds of text in chosen proportions: each is prepared by itself, and training draws rows from all.

What shapes rows is said once, on the mixture, and given to all parts. That the held-out fractions are among it keeps exact
copies apart: a document's split is a function of its text, so one that two parts share is held out in both or in neither.
Paragraphs that one part holds out are left out of the others' training text.
"""

from typing import Literal

from pydantic import Field, model_validator

from trainer.config import Config, part_union
from trainer.data import PackedConfig

from .packed import PackedDataConfig
from .prepare import TextDataConfig, TokenizerConfig

SHARED = ("seq_len", "batch_size", "eval_batch_size", "leave_out", "tokenizer", "val_fraction", "test_fraction")


class MixturePartConfig(Config):
    """Some text and its share of the training rows."""

    weight: float = Field(gt=0, allow_inf_nan=False)  # in proportion to the other parts'
    data: TextDataConfig


class MixtureDataConfig(PackedConfig):
    """Rows of several texts. A part that sets one of SHARED to another value than the mixture is refused."""

    kind: Literal["mixture"] = "mixture"
    parts: tuple[MixturePartConfig, ...] = Field(min_length=1, max_length=1000)
    tokenizer: TokenizerConfig = TokenizerConfig()  # bpe: learnt from the training text of the first part, and given to the others
    val_fraction: float = Field(0.05, gt=0)  # of the documents of each part
    test_fraction: float = Field(0.05, ge=0)  # 0: no test split

    @model_validator(mode="after")
    def _give_to_parts(self) -> "MixtureDataConfig":
        shared = {key: getattr(self, key) for key in SHARED}
        for i, part in enumerate(self.parts):
            for key, value in shared.items():
                own = getattr(part.data, key)
                if key in part.data.model_fields_set and own != value:
                    raise ValueError(
                        f"parts.{i}.data.{key} {_shown(own)} differs from the mixture's {key} {_shown(value)}, which holds for all parts; "
                        f"set data.{key} and leave it out of the part"
                    )
        filled = tuple(part.replace(data=part.data.replace(**shared)) for part in self.parts)
        object.__setattr__(self, "parts", filled)  # frozen is meant for readers; this is still the making
        return self

    @property
    def weights(self) -> tuple[float, ...]:
        """Of the parts; together 1."""
        total = sum(part.weight for part in self.parts)
        return tuple(part.weight / total for part in self.parts)


def _shown(value: object) -> object:
    return value.model_dump(mode="json", exclude_defaults=True) if isinstance(value, Config) else value


AnyDataConfig = part_union(PackedConfig, TextDataConfig, MixtureDataConfig, PackedDataConfig, default="text")
