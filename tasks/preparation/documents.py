"""What a document is made of, and which split it goes into.

A document's split is a function of its text alone, so it stays where it is when others come or go.
"""

import re

import numpy as np

BLANK_LINES = re.compile(r"\n\s*\n")
SPLITS = ("train", "val", "test")
DROPPED = -1  # in place of the index of a split
FOR_BASELINE, FOR_TOKENIZER = 1, 2  # what a document is drawn for


def paragraphs(text: str) -> list[str]:
    """The stretches of `text` between blank lines, stripped; none is empty."""
    return [stripped for part in BLANK_LINES.split(text) if (stripped := part.strip())]


def without(text: str, taken: np.ndarray) -> str:
    """`text` without the `paragraphs` that are `taken`. Unchanged to the byte if none is."""
    if not taken.any():
        return text
    parts = BLANK_LINES.split(text)
    number, kept = 0, []
    for part in parts:
        if part.strip():
            number += 1
            if taken[number - 1]:
                continue
        kept.append(part)
    return "\n\n".join(kept)


def splits_of(places: np.ndarray, *, val: float, test: float) -> np.ndarray:
    """The index in SPLITS of documents that lie at `places` in [0, 1): test from 0, then val, then training."""
    return np.where(places < test, SPLITS.index("test"), np.where(places < test + val, SPLITS.index("val"), SPLITS.index("train")))
