"""The decoder: causal, deaf to other documents, laid on a mesh by the names of its dims."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer import params as trees
from trainer.models import LlamaConfig
from trainer.objectives import LMObjectiveConfig

CONFIG = LlamaConfig(vocab_size=61, width=32, num_layers=2, num_heads=4, num_kv_heads=2)


def packed(tokens, lengths):
    """One row that holds documents of `lengths`."""
    segments = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    return {k: jnp.asarray(v, jnp.int32)[None] for k, v in [("tokens", tokens), ("segment_ids", segments), ("positions", positions)]}


@pytest.fixture(scope="module")
def model():
    return CONFIG.build()


@pytest.fixture(scope="module")
def variables(model):
    return model.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, packed(np.zeros(8), [8]))


def test_a_packed_document_gets_the_logits_it_gets_alone(model, variables):
    tokens = np.random.default_rng(0).integers(0, 61, 12)
    both = model.apply(variables, packed(tokens, [5, 7]))
    alone = model.apply(variables, packed(tokens[5:], [7]))
    np.testing.assert_allclose(both[:, 5:], alone, atol=1e-5)


def test_a_later_token_changes_no_earlier_logits(model, variables):
    tokens = np.random.default_rng(1).integers(0, 61, 10)
    changed = tokens.copy()
    changed[6] = (changed[6] + 1) % 61
    a, b = (model.apply(variables, packed(t, [10])) for t in (tokens, changed))
    np.testing.assert_array_equal(a[:, :6], b[:, :6])
    assert np.abs(a[:, 6:] - b[:, 6:]).max() > 1e-4


def test_rotary_attention_sees_distances_not_places(model, variables):
    row = packed(np.random.default_rng(2).integers(0, 61, 9), [9])
    moved = row | {"positions": row["positions"] + 100}
    np.testing.assert_allclose(model.apply(variables, row), model.apply(variables, moved), atol=1e-4)


def test_the_loss_is_the_mean_over_real_tokens_of_a_plain_cross_entropy(model, variables):
    rng = np.random.default_rng(3)
    row = packed(rng.integers(0, 61, 8), [5, 3])
    segments = row["segment_ids"].at[0, 6:].set(0)
    batch = {
        "inputs": row["tokens"],
        "targets": jnp.asarray(rng.integers(0, 61, (1, 8))),
        "segment_ids": segments,
        "positions": row["positions"],
    }
    objective = LMObjectiveConfig().build()
    (total, weight), (metrics, _) = objective.loss(variables["params"], model.apply, batch, jax.random.key(0), True)
    logits = np.asarray(model.apply(variables, objective.inputs(batch)), np.float64)[0, :6]
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -log_p[np.arange(6), np.asarray(batch["targets"])[0, :6]].sum()
    assert weight == 6 and float(total) == pytest.approx(expected, rel=1e-5)
    assert metrics["tokens"]["value"] == 6 and metrics["accuracy"]["count"] == 6


def test_the_number_of_parameters_is_what_the_config_says(variables):
    c = CONFIG
    block = 2 * c.width + c.width * c.head_size * (2 * c.num_heads + 2 * c.kv_heads) + 3 * c.width * c.hidden
    assert trees.count(variables["params"]) == c.vocab_size * c.width + c.num_layers * block + c.width


def test_a_digest_sees_one_bit_a_dtype_and_a_path():
    base = {"a": np.zeros((2, 3), np.float32), "b": np.ones(2, np.int32)}
    variants = [
        base | {"a": base["a"].reshape(3, 2)},
        base | {"a": np.nextafter(base["a"], 1)},
        base | {"b": base["b"].view(np.uint32)},
        {"a": base["a"], "c": base["b"]},
    ]
    assert len({trees.digest(x) for x in [base, *variants]}) == 5
    assert trees.digest(dict(reversed(base.items()))) == trees.digest(base)


ON_EIGHT = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import jax.numpy as jnp, numpy as np
from trainer.mesh import MeshConfig
from trainer.models import LlamaConfig
from trainer.optimizers import AdamWConfig
from trainer.state import make_init, model_rngs, state_shardings
model = LlamaConfig(vocab_size=64, width=32, num_layers=1, num_heads=4).build()
optimizer = AdamWConfig().build(num_steps=10)
shape = jax.ShapeDtypeStruct((8, 16), jnp.int32)
inputs = {k: shape for k in ("tokens", "segment_ids", "positions")}
init = make_init(lambda x, key: model.init(model_rngs(key), x), optimizer, inputs, seed=0)
mesh = MeshConfig(data=2, fsdp=2, model=2, fsdp_min_size=0).build()
shardings = state_shardings(mesh, jax.eval_shape(init), model, inputs, optimizer=optimizer, fsdp_min_size=0)
state, alone = jax.jit(init, out_shardings=shardings)(), jax.jit(init)()
q = state.params["block_0"]["attention"]["query"]
assert q.sharding.spec == jax.sharding.PartitionSpec("fsdp", "model", None), q.sharding
mu = [x for p, x in jax.tree_util.tree_leaves_with_path(state.opt_state) if "mu" in str(p) and "query" in str(p)]
assert len(mu) == 1 and mu[0].sharding.is_equivalent_to(q.sharding, 3), mu
assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(alone)))
"""


def test_on_eight_devices_parameters_and_their_statistics_are_cut_alike_and_hold_the_same_values():
    run = subprocess.run([sys.executable, "-c", ON_EIGHT], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
