"""Makes `tokenizer.json`: byte pairs learnt from text, plain bytes, or a given file.

All are byte-level: any text becomes bytes first, so nothing is unknown and every text comes back exactly.
"""

from collections.abc import Iterable

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from trainer.data.tokenizer import EOS


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def train_bpe(documents: Iterable[str], *, vocab_size: int) -> tokenizers.Tokenizer:
    """Byte pairs of `documents`, at most `vocab_size` tokens; 0 is the end of a document. Equal text, equal file."""
    made = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, also those that the text lacks
        show_progress=False,
    )
    made.train_from_iterator(documents, trainer)
    return made


def make_byte() -> tokenizers.Tokenizer:
    """One token a byte: 0 is the end of a document, 1 to 256 the bytes in the order of their byte-level characters."""
    vocab = {EOS: 0} | {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    made = _byte_level(models.BPE(vocab=vocab, merges=[]))
    made.add_special_tokens([EOS])
    return made
