"""Generation: the token that a forward pass over the whole text would give, one seed one text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.generate import generate
from trainer.models import LlamaConfig

CONFIG = LlamaConfig(vocab_size=31, width=32, num_layers=1, num_heads=2, init_std=0.3)
EOS = 30


@pytest.fixture(scope="module")
def model():
    return CONFIG.build()


@pytest.fixture(scope="module")
def params(model):
    shape = jnp.zeros((1, 4), jnp.int32)
    inputs = {"tokens": shape, "segment_ids": shape, "positions": shape}
    return model.init({"params": jax.random.key(3), "dropout": jax.random.key(0)}, inputs)["params"]


def text(model, params, prompt, **options):
    return list(generate(model.apply, params, prompt, eos_id=EOS, window=16, **options))


def test_greedy_tokens_are_the_likeliest_after_a_forward_pass_over_all_that_stands(model, params):
    found = text(model, params, [1, 2, 3], max_tokens=4, temperature=0)
    tokens = [EOS, 1, 2, 3]
    for token in found:
        row = jnp.asarray([tokens], jnp.int32)
        inputs = {"tokens": row, "segment_ids": jnp.ones_like(row), "positions": jnp.arange(len(tokens), dtype=jnp.int32)[None]}
        assert token == int(jnp.argmax(model.apply({"params": params}, inputs)[0, -1]))
        tokens.append(token)
    assert len(found) == 4 or int(np.asarray(tokens)[-1]) != EOS


def test_one_seed_gives_one_text_and_another_seed_another(model, params):
    first, again, other = (text(model, params, [4, 5], max_tokens=24, temperature=1.5, top_k=None, seed=s) for s in (1, 1, 2))
    assert first == again and first != other


def test_a_text_longer_than_the_window_goes_on_and_top_1_is_greedy(model, params):
    assert len(text(model, params, list(range(20)), max_tokens=5, temperature=0)) <= 5
    greedy = text(model, params, [7], max_tokens=10, temperature=0)
    assert text(model, params, [7], max_tokens=10, temperature=1.0, top_k=1, seed=9) == greedy


def test_it_ends_with_the_document_and_never_shows_the_end(model, params):
    texts = [text(model, params, [s], max_tokens=60, temperature=3.0, top_k=None, seed=s) for s in range(4)]
    assert all(EOS not in t for t in texts) and any(len(t) < 60 for t in texts)
