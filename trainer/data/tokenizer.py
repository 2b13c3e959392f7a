"""Text to tokens and back, by a `tokenizer.json` of Hugging Face tokenizers.

Special tokens are never read out of text: a document that spells one is only text, and the id of the end of a document
stands nowhere but at ends.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import DataError

if TYPE_CHECKING:
    import numpy as np

EOS = "<|eos|>"
EOS_NAMES = (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "[SEP]")  # looked for in this order


class Tokenizer:
    """The face of a tokenizer: `vocab_size` is one more than the highest id, `eos_id` ends a document."""

    def __init__(self, inner: Any, *, source: str):
        vocab = inner.get_vocab(with_added_tokens=True)
        eos = next((name for name in EOS_NAMES if name in vocab), None)
        if eos is None:
            raise DataError(f"tokenizer {source} has no token for the end of a document; add one of {', '.join(EOS_NAMES)} to it")
        inner.encode_special_tokens = True  # not kept in the file
        inner.no_truncation()
        inner.no_padding()
        self._inner = inner
        self.vocab_size: int = max(vocab.values()) + 1
        self.eos_id: int = vocab[eos]

    def encode(self, text: str) -> "np.ndarray":
        """The tokens of `text`, int32, without an end."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> "list[np.ndarray]":
        """The tokens of each text, on all cores."""
        import numpy as np

        encoded = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(e.ids, np.int32) for e in encoded]

    def decode(self, ids: "Iterable[int] | np.ndarray") -> str:
        """The text of tokens; ends are left out, and bytes that are no UTF-8 become U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, or of the folder that holds one. Raises DataError if there is none."""
    import tokenizers

    path = Path(path)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise DataError(f"no tokenizer at {file}; prepare the data again, or name a tokenizer.json")
    try:
        inner = tokenizers.Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises bare Exception
        raise DataError(f"{file} is no tokenizer.json that can be read: {e}; prepare the data again, or name another") from e
    return Tokenizer(inner, source=str(file))
