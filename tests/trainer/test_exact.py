"""What exactness asks of the program: no scatter whose order is not fixed, and dtypes that are what the config says."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from trainer import TrainerConfig, TrainerModule, backend
from trainer.models import LlamaConfig, embedding
from trainer.models.embedding import add_by_product, add_by_scatter, lookup, unembed
from trainer.objectives import LMObjectiveConfig, cross_entropy
from trainer.objectives.softmax import log_z_and_chosen
from trainer.optimizers import AdamWConfig

SHAPE = jax.ShapeDtypeStruct((8, 6), jnp.int32)
BATCH = dict.fromkeys(("inputs", "targets", "segment_ids", "positions"), SHAPE)


def make_trainer(*, dtype="float32", tied=True, **config):
    return TrainerModule(
        TrainerConfig(enable_progress_bar=False, **config),
        LlamaConfig(vocab_size=19, width=16, num_layers=1, num_heads=2, dtype=dtype, tie_embeddings=tied),
        AdamWConfig(weight_decay=0.1),
        BATCH,
        objective=LMObjectiveConfig(z_loss=1e-4).build(),
    )


def scatters_on_a_gpu(trainer):
    """How many scatters the whole train step has, lowered for a platform that need not be there."""
    step = jax.jit(trainer.create_training_step_function())
    lowered = step.trace(trainer.shapes, trainer.window_shapes, trainer.exmp_batch, True).lower(lowering_platforms=("cuda",))
    return len(re.findall(r"\"stablehlo\.(?:select_and_)?scatter\"\(", lowered.as_text()))


@pytest.fixture
def exact(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", backend.DETERMINISTIC)


def plain(logits, targets):
    return jax.nn.logsumexp(logits, axis=-1), jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def test_the_losses_gradient_is_that_of_the_plain_formula_whatever_is_made_of_its_two_numbers():
    rng = np.random.default_rng(0)
    logits = jnp.asarray(rng.normal(size=(2, 5, 7)) * 10, jnp.float32).at[0, 0, 3].set(300.0)
    targets, weights = jnp.asarray(rng.integers(0, 7, (2, 5))), jnp.asarray(rng.normal(size=(2, 5)), jnp.float32)

    def loss(f, x):
        log_z, chosen = f(x, targets)
        return jnp.sum(weights * (log_z - chosen)) + 0.1 * jnp.sum(log_z**2) + jnp.sum(jnp.sin(chosen))

    for got, want in zip(*(jax.value_and_grad(functools.partial(loss, f))(logits) for f in (log_z_and_chosen, plain)), strict=True):
        np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
    low = jax.grad(functools.partial(loss, log_z_and_chosen))(logits.astype(jnp.bfloat16))
    assert low.dtype == jnp.bfloat16


@pytest.mark.parametrize("chunk", [2**26, 60, 1])
def test_adding_up_by_a_product_gives_what_a_loop_over_tokens_gives_however_it_is_cut(chunk, monkeypatch):
    monkeypatch.setattr(embedding, "ONE_HOT_VALUES", chunk)
    rng = np.random.default_rng(1)
    tokens, grad = rng.integers(0, 5, (2, 7)), rng.normal(size=(2, 7, 3)).astype(np.float32)
    want = np.zeros((6, 3))
    for token, g in zip(tokens.ravel(), grad.reshape(-1, 3), strict=True):
        want[token] += g
    for add in (add_by_product, add_by_scatter):
        np.testing.assert_allclose(add(jnp.asarray(tokens), jnp.asarray(grad), vocab=6), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("numerics", ["exact", "fast"])
def test_the_gradients_of_lookup_and_logits_are_those_of_indexing_and_a_product(numerics, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", backend.DETERMINISTIC if numerics == "exact" else "")
    rng = np.random.default_rng(2)
    table, tokens = jnp.asarray(rng.normal(size=(11, 4)), jnp.float32), jnp.asarray(rng.integers(0, 11, (3, 5)))
    weights = jnp.asarray(rng.normal(size=(3, 5, 11)), jnp.float32)
    ours = jax.jit(jax.grad(lambda t: jnp.sum(weights * unembed(lookup(t, tokens), t))))(table)
    want = jax.grad(lambda t: jnp.sum(weights * jnp.einsum("bsw,vw->bsv", t[tokens], t)))(table)
    np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2])
def test_an_exact_train_step_has_no_scatter_on_a_gpu(parts, exact):
    assert scatters_on_a_gpu(make_trainer(gradient_accumulate_steps=parts)) == 0
    assert scatters_on_a_gpu(make_trainer(gradient_accumulate_steps=parts, dtype="bfloat16", tied=False)) == 0


def test_a_scatter_is_seen_where_there_is_one(exact, monkeypatch):
    monkeypatch.setattr(cross_entropy, "log_z_and_chosen", plain)
    assert scatters_on_a_gpu(make_trainer()) == 1
    monkeypatch.undo()
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert backend.numerics() == "fast" and scatters_on_a_gpu(make_trainer()) == 1  # the lookup's


# Dtypes.


def casts(jaxpr, var, *, inside=()):
    """(dtype, names of the loops around) of every conversion of the value `var`, followed into all that is called with it."""
    for eqn in jaxpr.eqns:
        places = [i for i, v in enumerate(eqn.invars) if v is var]
        if places and eqn.primitive.name == "convert_element_type":
            yield str(eqn.outvars[0].aval.dtype), inside
        for inner in jaxprs_in_params(eqn.params):
            loop = (eqn.primitive.name,) if eqn.primitive.name in ("scan", "while") else ()
            for i in places:
                yield from casts(inner, inner.invars[i - len(eqn.invars)], inside=inside + loop)


def products(jaxpr):
    """(dtypes of both operands, dtype of the result) of every product."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            yield {str(v.aval.dtype) for v in eqn.invars}, str(eqn.outvars[0].aval.dtype), eqn.outvars[0].aval.shape
        for inner in jaxprs_in_params(eqn.params):
            yield from products(inner)


def traced(trainer):
    return jax.make_jaxpr(trainer.create_training_step_function())(trainer.shapes, trainer.window_shapes, trainer.exmp_batch, True).jaxpr


@pytest.mark.parametrize(
    "config", [{}, {"gradient_accumulate_steps": 4}, {"gradient_accumulate_steps": 4, "gradient_accumulate_scan": True}]
)
def test_in_bfloat16_each_matrix_is_cast_once_per_step_outside_of_the_microbatches_and_no_scale_is(config):
    trainer = make_trainer(dtype="bfloat16", tied=False, **config)
    assert {x.dtype for x in jax.tree.leaves((trainer.shapes.params, trainer.shapes.opt_state)) if x.ndim} == {np.dtype("float32")}
    jaxpr = traced(trainer)
    first = 1  # state.step comes before the parameters
    for var, x in zip(jaxpr.invars[first:], jax.tree.leaves(trainer.shapes.params), strict=False):
        assert var.aval.shape == x.shape
        low = [inside for dtype, inside in casts(jaxpr, var) if dtype == "bfloat16"]
        assert low == ([()] if len(x.shape) > 1 else []), (x.shape, low)


def test_in_bfloat16_products_take_bfloat16_and_logits_and_scores_are_summed_in_float32():
    trainer = make_trainer(dtype="bfloat16", tied=False)
    found = list(products(traced(trainer)))
    logits = [(operands, out) for operands, out, shape in found if shape == (8, 6, 19)]
    assert logits == [({"bfloat16"}, "float32")]
    assert all(operands == {"bfloat16"} for operands, _, shape in found if 19 in shape or 16 in shape), found


def test_norms_softmax_and_loss_are_float32_in_bfloat16():
    text = str(traced(make_trainer(dtype="bfloat16")))
    for name in ("rsqrt", "exp", "log", "reduce_max", "sqrt", "sin", "cos"):
        assert re.search(rf"f32\[[\d,]*\] = {name}\b", text), name
        assert not re.search(rf"bf16\[[\d,]*\] = {name}\b", text), name
