"""Optimizers and schedules against their papers' equations, written out in numpy with float64."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from pydantic import TypeAdapter, ValidationError

from trainer.errors import ConfigError
from trainer.optimizers import (
    BUILT_IN,
    AdafactorConfig,
    AdaMaxConfig,
    AdamConfig,
    AdamWConfig,
    AnyOptimizerConfig,
    LambConfig,
    LionConfig,
    MuonConfig,
    NAdamConfig,
    RAdamConfig,
    ScheduleConfig,
    ScheduleFreeAdamWConfig,
    SGDConfig,
)
from trainer.optimizers.base import spread
from trainer.optimizers.muon import matrix_shape
from trainer.params import flatten, unflatten

SHAPES = {
    "embed": (9, 8),
    "block_0": {"norm": {"scale": (8,)}, "mlp": {"up": (8, 12)}, "attention": {"query": (8, 2, 3), "out": (2, 3, 8)}},
}
RATE = ScheduleConfig(kind="linear", lr=0.02, warmup_steps=3, decay_steps=10)  # each of the first updates has another rate
STEPS = 8


def draw(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s).astype(np.float32), SHAPES, is_leaf=lambda x: isinstance(x, tuple))


def grads_of(step):
    return draw(100 + step)


def zeros(params):
    return jax.tree.map(np.zeros_like, params)


def rate(i):
    return 0.02 * (i + 1) / 3 if i < 3 else 0.02 + (0.002 - 0.02) * (i - 3) / 7


def train(config, params, *, grads=grads_of, steps=STEPS):
    """Parameters and optimizer state after `steps` updates."""
    optimizer = config.build(num_steps=10)

    @jax.jit
    def update(params, state, grads):
        updates, state = optimizer.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.tx.init(params)
    for i in range(steps):
        params, state = update(params, state, grads(i))
    return params, state


# The papers' updates. Each takes one parameter's gradient g, its memory s, the number t of the update from 1 and the weights
# x, and gives the direction d of x <- x - lr (d + decay x).


def moments(g, s, t, b1=0.9, b2=0.999):
    s["m"] = b1 * s.get("m", 0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0) + (1 - b2) * g**2
    return s["m"] / (1 - b1**t), s["v"] / (1 - b2**t)


def adam(g, s, t, x, *, b2=0.999, eps=1e-8):
    m, v = moments(g, s, t, b2=b2)
    return m / (np.sqrt(v) + eps)


def nadam(g, s, t, x):
    _, v = moments(g, s, t)
    m = 0.9 * s["m"] / (1 - 0.9 ** (t + 1)) + 0.1 * g / (1 - 0.9**t)
    return m / (np.sqrt(v) + 1e-8)


def radam(g, s, t, x):
    m, v = moments(g, s, t)
    longest = 2 / (1 - 0.999) - 1
    rho = longest - 2 * t * 0.999**t / (1 - 0.999**t)
    if rho < 5:
        return m
    r = math.sqrt((rho - 4) * (rho - 2) * longest / ((longest - 4) * (longest - 2) * rho))
    return r * m / (np.sqrt(v) + 1e-8)


def adamax(g, s, t, x):
    s["m"] = 0.9 * s.get("m", 0) + 0.1 * g
    s["u"] = np.maximum(0.999 * s.get("u", 0), np.abs(g) + 1e-8)
    return s["m"] / (1 - 0.9**t) / s["u"]


def lion(g, s, t, x):
    m = s.get("m", np.zeros_like(g))
    s["m"] = 0.99 * m + 0.01 * g
    return np.sign(0.9 * m + 0.1 * g)


def momentum(g, s, t, x, *, nesterov):
    s["b"] = 0.8 * s.get("b", 0) + g
    return g + 0.8 * s["b"] if nesterov else s["b"]


def rms(x):
    return np.sqrt(np.mean(x**2))


def adafactor(g, s, t, x):
    b2, squared = 1 - t**-0.8, g**2 + 1e-30
    if g.ndim == 2:
        s["r"] = b2 * s.get("r", 0) + (1 - b2) * squared.sum(1)
        s["c"] = b2 * s.get("c", 0) + (1 - b2) * squared.sum(0)
        v = np.outer(s["r"], s["c"]) / s["r"].sum()
    else:
        v = s["v"] = b2 * s.get("v", 0) + (1 - b2) * squared
    u = g / np.sqrt(v)
    return u / max(1, rms(u) / 1.0) * max(1e-3, rms(x))


def orthogonalised(m):
    """Newton and Schulz's iteration with Jordan's coefficients on rows <= columns."""
    x = m if m.shape[0] <= m.shape[1] else m.T
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if m.shape[0] <= m.shape[1] else x.T


MATRICES = {"block_0.mlp.up": (8, 12), "block_0.attention.query": (8, 6), "block_0.attention.out": (6, 8)}


def muon(g, s, t, x, *, path):
    if path not in MATRICES:
        return adam(g, s, t, x, b2=0.95)
    s["m"] = 0.95 * s.get("m", 0) + 0.05 * g
    m = 0.95 * s["m"] / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
    shape = MATRICES[path]
    return (0.2 * math.sqrt(max(shape)) * orthogonalised(m.reshape(shape))).reshape(g.shape)


def expected(direction, params, *, decay, by_path=False, trust=False):
    flat = {p: x.astype(np.float64) for p, x in flatten(params).items()}
    memory = {p: {} for p in flat}
    for i in range(STEPS):
        for path, g in flatten(grads_of(i)).items():
            x = flat[path]
            d = direction(g.astype(np.float64), memory[path], i + 1, x, **({"path": path} if by_path else {}))
            d = d + (decay * x if x.ndim >= 2 else 0)
            if trust:
                d = d * np.linalg.norm(x) / np.linalg.norm(d)
            flat[path] = x - rate(i) * d
    return flat


CASES = {
    "adamw": (AdamWConfig, {}, functools.partial(adam, b2=0.95), {"decay": 0.1}),
    "adam": (AdamConfig, {"weight_decay": 0.1}, adam, {"decay": 0.1}),
    "nadam": (NAdamConfig, {"weight_decay": 0.1}, nadam, {"decay": 0.1}),
    "radam": (RAdamConfig, {"weight_decay": 0.1}, radam, {"decay": 0.1}),
    "adamax": (AdaMaxConfig, {"weight_decay": 0.1}, adamax, {"decay": 0.1}),
    "sgd": (SGDConfig, {"weight_decay": 0.1}, lambda g, *_: g, {"decay": 0.1}),
    "momentum": (SGDConfig, {"momentum": 0.8}, functools.partial(momentum, nesterov=False), {"decay": 0}),
    "nesterov": (SGDConfig, {"momentum": 0.8, "momentum_kind": "nesterov"}, functools.partial(momentum, nesterov=True), {"decay": 0}),
    "lion": (LionConfig, {}, lion, {"decay": 0.1}),
    "adafactor": (AdafactorConfig, {"min_dim_size_to_factor": 8, "weight_decay": 0.1}, adafactor, {"decay": 0.1}),
    "lamb": (LambConfig, {}, functools.partial(adam, eps=1e-6), {"decay": 0.01, "trust": True}),
    "muon": (MuonConfig, {}, muon, {"decay": 0.1, "by_path": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_the_papers_equations(case):
    config, fields, direction, how = CASES[case]
    params, _ = train(config(schedule=RATE, clip_norm=None, **fields), draw(0))
    want = expected(direction, draw(0), **how)
    for path, x in flatten(params).items():
        np.testing.assert_allclose(x, want[path], rtol=2e-4, atol=2e-5, err_msg=path)


def test_schedule_free_steps_z_averages_x_trains_y_and_evaluates_x():
    config = ScheduleFreeAdamWConfig(schedule=RATE, clip_norm=None)
    params, state = train(config, draw(0))
    evaluated = flatten(config.build(num_steps=10).eval_params(state, params))
    y = {p: a.astype(np.float64) for p, a in flatten(draw(0)).items()}
    x, z, memory, weights, highest = dict(y), dict(y), {p: {} for p in y}, 0.0, 0.0
    for i in range(STEPS):
        highest = max(highest, rate(i))
        weights += highest**2
        c = highest**2 / weights
        for p, g in flatten(grads_of(i)).items():
            _, v = moments(g.astype(np.float64), memory[p], i + 1)
            z[p] = z[p] - rate(i) * (g / (np.sqrt(v) + 1e-8) + (0.1 * y[p] if g.ndim >= 2 else 0))
            x[p] = (1 - c) * x[p] + c * z[p]
            y[p] = 0.1 * z[p] + 0.9 * x[p]
    for path, a in flatten(params).items():
        np.testing.assert_allclose(a, y[path], rtol=1e-4, atol=1e-5, err_msg=path)
        np.testing.assert_allclose(evaluated[path], x[path], rtol=1e-4, atol=1e-5, err_msg=path)
    assert all(c().build(num_steps=10).eval_params is None for c in BUILT_IN if c is not ScheduleFreeAdamWConfig)


@pytest.mark.fault(11)
@pytest.mark.parametrize("config", BUILT_IN, ids=lambda c: c().kind)
def test_decay_alone_makes_weights_smaller_at_the_same_pace_whatever_the_transform(config):
    schedule = ScheduleConfig(kind="constant", lr=0.1)
    ones = {"matrix": np.ones((2, 3), np.float32), "scale": np.ones(3, np.float32)}
    params, state = train(config(schedule=schedule, weight_decay=0.1), ones, grads=lambda _: zeros(ones), steps=10)
    share = {"lamb": 0.9**10}.get(config().kind, 0.99**10)  # LAMB's trust ratio makes the step as long as the weights
    optimizer = config().build(num_steps=10)
    for path, x in flatten(params).items():
        if x.ndim == 1:
            np.testing.assert_allclose(x, 1, rtol=1e-6)
        elif optimizer.eval_params is None:
            np.testing.assert_allclose(x, share, rtol=1e-5)
        else:
            averaged = flatten(optimizer.eval_params(state, params))[path]
            assert (share < x).all() and (x < averaged).all() and (averaged < 1).all()


def test_the_patterns_say_alone_what_decays():
    def decaying(**mask):
        return {p for p, decays in flatten(AdamWConfig(**mask).decays(draw(0))).items() if decays}

    everything = set(flatten(draw(0)))
    assert decaying() == everything - {"block_0.norm.scale"}
    assert decaying(weight_decay_include="norm|mlp") == {"block_0.norm.scale", "block_0.mlp.up"}
    assert decaying(weight_decay_exclude=r"^embed$|attention\.") == {"block_0.norm.scale", "block_0.mlp.up"}
    params, _ = train(
        SGDConfig(schedule=RATE, weight_decay=0.1, weight_decay_include="scale"), draw(0), grads=lambda _: zeros(draw(0)), steps=1
    )
    changed = {p for p, x in flatten(params).items() if (x != flatten(draw(0))[p]).any()}
    assert changed == {"block_0.norm.scale"}


def test_patterns_that_exclude_each_other_are_broken_or_fit_nothing_are_refused():
    with pytest.raises(ValidationError, match=r"'a' and weight_decay_exclude 'b' exclude each other"):
        AdamWConfig(weight_decay_include="a", weight_decay_exclude="b")
    with pytest.raises(ValidationError, match=r"'\(' is not a regular expression"):
        AdamWConfig(weight_decay_exclude="(")
    with pytest.raises(ConfigError, match=r"'embd' is found in no parameter; they are block_0.attention.out"):
        AdamWConfig(weight_decay_exclude="embd").build(num_steps=10).tx.init(draw(0))


def test_gradients_are_clipped_by_value_then_by_global_norm():
    schedule = ScheduleConfig(kind="constant", lr=1.0)
    small = jax.tree.map(lambda g: 1e-3 * g, grads_of(1))
    config = SGDConfig(schedule=schedule, clip_value=0.5, clip_norm=2.0)
    params, _ = train(config, draw(0), grads=[grads_of(0), small].__getitem__, steps=2)
    cut = {p: np.clip(g.astype(np.float64), -0.5, 0.5) for p, g in flatten(grads_of(0)).items()}
    norm = math.sqrt(sum((g**2).sum() for g in cut.values()))
    assert norm > 2
    for path, x in flatten(params).items():
        np.testing.assert_allclose(x, flatten(draw(0))[path] - cut[path] * 2 / norm - flatten(small)[path], rtol=1e-5, atol=1e-6)


def test_muon_turns_matrices_into_nearly_orthogonal_ones_of_its_scale():
    schedule = ScheduleConfig(kind="constant", lr=1.0)
    before = {"query": draw(0)["block_0"]["attention"]["query"]}
    grads = {"query": grads_of(0)["block_0"]["attention"]["query"]}
    after, _ = train(MuonConfig(schedule=schedule, weight_decay=0), before, grads=lambda _: grads, steps=1)
    singular = np.linalg.svd((after["query"] - before["query"]).reshape(8, 6), compute_uv=False)
    assert (singular > 0.5 * 0.2 * math.sqrt(8)).all() and (singular < 1.3 * 0.2 * math.sqrt(8)).all(), singular


@given(width=st.integers(2, 4096), heads=st.integers(1, 64), head_dim=st.integers(1, 256))
def test_attention_kernels_are_the_matrices_that_the_model_applies(width, heads, head_dim):
    if heads < width and head_dim <= width:
        assert matrix_shape((width, heads, head_dim)) == (width, heads * head_dim)
        assert matrix_shape((heads, head_dim, width)) == (heads * head_dim, width)


@pytest.mark.parametrize("config", BUILT_IN, ids=lambda c: c().kind)
def test_a_state_is_flat_by_unique_paths_and_statistics_lie_like_their_parameters(config):
    optimizer = (config(min_dim_size_to_factor=8) if config is AdafactorConfig else config()).build(num_steps=10)
    params = draw(0)
    shapes = jax.eval_shape(optimizer.tx.init, params)
    flat = flatten(shapes)
    assert jax.tree.structure(unflatten(shapes, flat)) == jax.tree.structure(shapes)
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in flat.values())
    paths = unflatten(params, {p: p for p in flatten(params)})
    laid = flatten(spread(optimizer.tx, shapes, paths, params=params, other=""))
    assert laid.keys() == flat.keys()
    for path, x in flat.items():
        owner = [p for p in flatten(params) if path.endswith("." + p)]
        has_its_shape = bool(owner) and x.shape == flatten(params)[owner[0]].shape
        assert laid[path] == (owner[0] if has_its_shape else ""), path
    if config is not SGDConfig:  # without momentum it has no statistics
        assert set(flatten(params)) - {"embed", "block_0.mlp.up"} <= set(laid.values())


@pytest.mark.parametrize("config", [AdafactorConfig(min_dim_size_to_factor=8), MuonConfig()], ids=lambda c: c.kind)
def test_factored_and_divided_states_are_made_under_their_parameters_shardings(config):
    mesh = Mesh(np.array(jax.devices()[:1]), ("model",))
    tx = config.build(num_steps=10).tx
    shardings = jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "model")), draw(0))
    shapes, whole = jax.eval_shape(tx.init, draw(0)), NamedSharding(mesh, PartitionSpec())
    laid = spread(tx, shapes, shardings, params=draw(0), other=whole)  # a spec of more dims than its array is an error
    state = jax.jit(tx.init, out_shardings=laid)(draw(0))
    assert all(x.sharding == s for x, s in zip(jax.tree.leaves(state), jax.tree.leaves(laid), strict=True))


def test_every_kind_is_chosen_by_its_name_survives_json_and_adamw_is_meant_by_none():
    parse = TypeAdapter(AnyOptimizerConfig).validate_python
    kinds = "adamw adam sgd nadam radam adamax lion adafactor lamb muon schedule_free_adamw"
    assert {c().kind for c in BUILT_IN} == set(kinds.split())
    for kind in kinds.split():
        config = parse({"kind": kind, "schedule": {"lr": 1e-2}})
        assert config.kind == kind and parse(json.loads(json.dumps(config.to_dict()))) == config
    assert parse({"weight_decay": 0.2}) == AdamWConfig(weight_decay=0.2)


# Schedules

INDICES = np.arange(200)


@st.composite
def schedules(draw, kinds=("constant", "linear", "cosine", "exponential", "inverse_sqrt", "wsd")):
    kind = draw(st.sampled_from(kinds))
    lr = draw(st.floats(1e-5, 10))
    warmup, main = draw(st.integers(0, 40)), draw(st.integers(1, 80))
    cooldown = draw(st.integers(1 if kind == "wsd" else 0, 40))
    share = draw(st.floats(1e-3, 1))
    end = {} if kind in ("constant", "inverse_sqrt", "wsd") else draw(st.sampled_from([{"end_lr": lr * share}, {"end_lr_factor": share}]))
    cooldown_lr = draw(st.floats(0, 1)) * lr * min(share, 0.01) if cooldown else 0.0
    return ScheduleConfig(
        kind=kind,
        lr=lr,
        warmup_steps=warmup,
        decay_steps=warmup + main + cooldown if end or cooldown else None,
        cooldown_steps=cooldown,
        cooldown_lr=cooldown_lr,
        **end,
    )


def values(config, num_steps=100):
    return np.broadcast_to(np.asarray(config.build(num_steps=num_steps)(INDICES), np.float64), INDICES.shape)


def value(c, i):
    """The learning rate of update i, read off semantics and docstring."""
    warmup = max(c.warmup_steps, 1)
    begin = math.inf if c.decay_steps is None else c.decay_steps - c.cooldown_steps
    end = c.lr * c.end_lr_factor if c.end_lr_factor is not None else c.end_lr
    if i < c.warmup_steps:
        return c.lr * (i + 1) / c.warmup_steps
    if i > begin and c.cooldown_steps:
        left = max(0, c.decay_steps - i) / c.cooldown_steps
        return c.cooldown_lr + (value(c, begin) - c.cooldown_lr) * left
    if c.kind in ("constant", "wsd"):
        return c.lr
    i = min(i, begin)
    if c.kind == "inverse_sqrt":
        return c.lr * math.sqrt(warmup / max(i, warmup))
    done = (i - c.warmup_steps) / (begin - c.warmup_steps)
    return {
        "linear": c.lr + (end - c.lr) * done,
        "cosine": end + (c.lr - end) * (1 + math.cos(math.pi * done)) / 2,
        "exponential": c.lr ** (1 - done) * end**done,
    }[c.kind]


@settings(deadline=None, max_examples=50)
@given(schedules())
def test_a_schedule_is_its_formula(config):
    np.testing.assert_allclose(values(config), [value(config, i) for i in INDICES], rtol=1e-4, atol=1e-6 * config.lr)


@settings(deadline=None, max_examples=50)
@given(schedules())
def test_a_schedule_is_never_negative_has_no_jump_and_rests_after_its_end(config):
    lr, seen = config.lr, values(config)
    assert (seen >= 0).all() and seen.max() == pytest.approx(lr, rel=1e-5)
    total = config.decay_steps or 120
    main = total - config.warmup_steps - config.cooldown_steps
    steepest = {"linear": 1.0, "cosine": math.pi / 2, "exponential": math.log(1e3), "inverse_sqrt": math.inf}.get(config.kind, 0)
    slope = max(1 / max(config.warmup_steps, 1), 1 / max(config.cooldown_steps, 1), steepest / main)
    if config.kind == "inverse_sqrt":
        w = max(config.warmup_steps, 1)
        slope = max(1 / w, 1 / max(config.cooldown_steps, 1), 1 - math.sqrt(w / (w + 1)))
    assert np.abs(np.diff(seen)).max() <= lr * (slope + 1e-5)
    assert (np.diff(seen[config.warmup_steps :]) <= 1e-6 * lr).all()
    if config.decay_steps is not None:
        last = config.cooldown_lr if config.cooldown_steps else value(config, config.decay_steps)
        np.testing.assert_allclose(seen[config.decay_steps :], last, rtol=1e-4, atol=1e-6 * lr)


KINDS = ["constant", "linear", "cosine", "exponential", "inverse_sqrt", "wsd"]


@pytest.mark.parametrize("decay_steps", [None, 90])
@pytest.mark.parametrize("cooldown", [0, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_a_schedule_says_whether_it_depends_on_the_number_of_steps(kind, cooldown, decay_steps):
    if kind == "wsd" and not cooldown:
        return
    end = {"end_lr_factor": 0.1} if kind == "exponential" else {}
    config = ScheduleConfig(kind=kind, lr=1.0, warmup_steps=5, cooldown_steps=cooldown, decay_steps=decay_steps, **end)
    differs = not np.array_equal(values(config, num_steps=100), values(config, num_steps=150))
    assert config.depends_on_num_steps == differs


@pytest.mark.fault(12)
def test_exponential_decay_falls_to_the_end_value_that_it_demands():
    with pytest.raises(ValidationError, match=r"without an end value would stay at lr; set end_lr_factor"):
        ScheduleConfig(kind="exponential")
    with pytest.raises(ValidationError, match=r"never reaches 0; set end_lr_factor"):
        ScheduleConfig(kind="exponential", end_lr_factor=0)
    seen = values(ScheduleConfig(kind="exponential", lr=1.0, decay_steps=100, end_lr=1e-4))
    assert (np.diff(seen[:101]) < 0).all() and seen[50] == pytest.approx(1e-2, rel=1e-4)
    np.testing.assert_allclose(seen[100:], 1e-4, rtol=1e-5)


@pytest.mark.fault(13)
@pytest.mark.parametrize("kind", KINDS)
def test_the_rate_a_schedule_names_for_a_step_is_the_one_the_update_uses(kind):
    end = {"end_lr_factor": 0.1} if kind == "exponential" else {}
    schedule = ScheduleConfig(kind=kind, lr=0.5, warmup_steps=4, cooldown_steps=5, **end)
    optimizer = SGDConfig(schedule=schedule, clip_norm=None).build(num_steps=20)
    update, named = jax.jit(optimizer.tx.update), jax.jit(optimizer.schedule)
    params, grads = {"w": jnp.zeros(3)}, {"w": jnp.ones(3)}
    state = optimizer.tx.init(params)
    for i in range(24):
        updates, state = update(grads, state, params)
        assert (updates["w"] <= 0).all()  # compiled, a line that ends at 0 may round to below
        np.testing.assert_allclose(updates["w"], -named(i), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"kind": "wsd"}, "needs cooldown_steps"),
        ({"end_lr": 1e-4, "end_lr_factor": 0.1}, "end_lr 0.0001 and end_lr_factor 0.1 exclude each other; .*end_lr_factor=null"),
        ({"kind": "constant", "end_lr": 1e-4}, "constant does not go to end_lr 0.0001; set cooldown_steps"),
        ({"end_lr": 1.0}, "end_lr 1.0 is above lr 0.001"),
        ({"cooldown_lr": 1e-4}, "0.0001 is not reached without a cooldown"),
        ({"cooldown_lr": 1.0, "cooldown_steps": 5}, "cooldown_lr 1.0 is above lr 0.001"),
        ({"warmup_steps": 10, "cooldown_steps": 10, "decay_steps": 20}, "decay_steps 20 counts .*leaves 0 for the cosine part"),
        ({"kind": "wsd", "warmup_steps": 10, "cooldown_steps": 11, "decay_steps": 20}, "leaves -1"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_with_the_way_out(fields, message):
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**fields)


def test_a_schedule_without_room_in_the_runs_steps_is_refused_when_built():
    with pytest.raises(ConfigError, match="num_steps 10, in place of decay_steps, counts warmup_steps 10"):
        ScheduleConfig(warmup_steps=10).build(num_steps=10)
    assert values(ScheduleConfig(kind="constant", lr=1.0, warmup_steps=10), num_steps=5)[9:] == pytest.approx(1.0)
