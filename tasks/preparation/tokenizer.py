"""Makes `tokenizer.json`: byte pairs learnt from text, plain bytes, or a given file.

All are byte-level: any text becomes bytes first, so nothing is unknown and every text comes back exactly.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from configs.prepare import TokenizerConfig
from trainer.data.tokenizer import EOS

from .sources.find import file_system, storage_errors


def given_file(config: TokenizerConfig) -> bytes | None:
    """The bytes of the tokenizer.json that a config names, from a path or any address that fsspec opens; None if it names none."""
    if config.path is None:
        return None
    address = config.path if "://" in config.path else str(Path(config.path).expanduser().absolute())
    fs, path = file_system(address, "data.tokenizer.path")
    with storage_errors(f"data.tokenizer.path {config.path}", wants="name a tokenizer.json"):
        if fs.isdir(path):
            path = f"{path.rstrip('/')}/tokenizer.json"
        with fs.open(path, "rb") as f:
            return f.read()


def make_tokenizer(path: Path, config: TokenizerConfig, texts: Iterable[str], given: bytes | None) -> None:
    """Write the tokenizer of a config to `path`; byte pairs are learnt from `texts`. Raises DataError if a given one does not serve."""
    part = path.with_name(path.name + ".part")
    if given is not None:
        part.write_bytes(given)
    elif config.kind == "byte":
        make_byte(config.specials).save(str(part))
    else:
        assert config.vocab_size is not None  # the config fills it in
        train_bpe(texts, vocab_size=config.vocab_size, specials=config.specials).save(str(part))
    part.replace(path)


def _byte_level(model: models.Model) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def train_bpe(documents: Iterable[str], *, vocab_size: int, specials: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """Byte pairs of `documents`, at most `vocab_size` tokens; 0 is the end of a document, `specials` follow. Equal text, equal file."""
    made = _byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, *specials],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all 256 bytes, also those that the text lacks
        show_progress=False,
    )
    made.train_from_iterator(documents, trainer)
    return made


def make_byte(specials: Sequence[str] = ()) -> tokenizers.Tokenizer:
    """One token a byte: 0 is the end of a document, 1 to 256 the bytes in the order of their byte-level characters, then `specials`."""
    vocab = {EOS: 0} | {char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()), 1)}
    made = _byte_level(models.BPE(vocab=vocab, merges=[]))
    made.add_special_tokens([EOS, *specials])
    return made
