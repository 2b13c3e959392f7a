"""Rematerialisation and memory: less is kept, the gradients stay, and what a step takes is the compiler's own count."""

import functools
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from configs.load import load
from trainer import TrainerConfig, TrainerModule
from trainer.callbacks import SummaryConfig
from trainer.errors import ConfigError
from trainer.memory import step_memory
from trainer.models import LlamaConfig
from trainer.objectives import LMObjectiveConfig
from trainer.optimizers import AdamWConfig
from trainer.params import flatten

ROOT = Path(__file__).resolve().parent.parent.parent
ROWS, SEQ = 8, 64


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 32, (ROWS, SEQ + 1)).astype(np.int32)
    places = np.broadcast_to(np.arange(SEQ, dtype=np.int32), (ROWS, SEQ))
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": np.ones((ROWS, SEQ), np.int32), "positions": places}


def make_trainer(remat, **config):
    return TrainerModule(
        TrainerConfig(enable_progress_bar=False, **config),
        LlamaConfig(vocab_size=32, width=32, num_layers=3, num_heads=4, remat=remat),
        AdamWConfig(weight_decay_exclude="embed|norm"),
        batch(),
        objective=LMObjectiveConfig().build(),
    )


@functools.cache
def found(**remat):
    """The gradients of a model, and the bytes that its forward pass hands to the backward pass."""
    trainer = make_trainer(remat)
    params = trainer.model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, trainer.inputs(batch()))["params"]

    def loss(p):
        (total, weight), _ = trainer.objective.loss(p, trainer.model.apply, batch(), jax.random.key(0), True)
        return total / weight

    kept = jax.tree.leaves(jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params))
    return jax.jit(jax.grad(loss))(params), sum(x.size * x.dtype.itemsize for x in kept)


@pytest.mark.parametrize("remat", [{"block": "full"}, {"block": "dots"}, {"attention": "full", "mlp": "dots"}, {"mlp": "full"}])
def test_what_is_computed_again_changes_no_gradient_and_keeps_less(remat):
    grads, kept = found(**remat)
    plain, more = found()
    assert jax.tree.structure(grads) == jax.tree.structure(plain), "another checkpoint would not fit"
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
    assert kept < more


def test_the_more_is_computed_again_the_less_is_kept_and_never_attention_scores():
    everything = found()[1]
    assert found(block="full")[1] < found(block="dots")[1] < 0.6 * everything
    scores = 3 * ROWS * 4 * SEQ * SEQ * 4  # layers, rows, heads, queries, keys, bytes
    for remat in ({"block": "dots"}, {"block": "full"}, {"attention": "dots"}, {"attention": "full"}):
        assert everything - found(**remat)[1] > scores, remat


# The default scheduler for CPUs runs what is computed again as early as it can, which is in vain; the other one does as a GPU's.
COMPILED = """
import sys
from tests.trainer.test_remat import make_trainer
from trainer.memory import step_memory
print(step_memory(make_trainer({"block": sys.argv[1]}))["temporaries"])
"""


def test_the_compiled_step_takes_less_memory_where_the_scheduler_minds_it():
    flags = {"XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=false"}
    temporaries = {}
    for choice in ("none", "full"):
        command = [sys.executable, "-c", COMPILED, choice]
        run = subprocess.run(command, cwd=ROOT, env=os.environ | flags, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-2000:]
        temporaries[choice] = int(run.stdout.splitlines()[-1])
    assert temporaries["full"] < 0.9 * temporaries["none"], temporaries


def test_a_kind_of_block_that_there_is_not_is_answered_with_those_there_are():
    with pytest.raises(ConfigError, match=r"model\.remat\.convolution.*expected one of block, attention, mlp"):
        load("tiny", ["model.remat.convolution=full"])
    with pytest.raises(ConfigError, match=r"model\.remat\.block='all'.*'none', 'dots' or 'full'"):
        load("tiny", ["model.remat.block=all"])
    with pytest.raises(ValidationError):
        LlamaConfig(remat="block")
    assert load("tiny", ["model.remat.attention=dots"]).model.remat.attention == "dots"


# What a step takes.


def test_the_memory_of_a_step_is_that_of_its_state_once_and_compiling_for_it_is_not_done_again():
    trainer = make_trainer({})
    used = step_memory(trainer)
    assert trainer._state is None, "asking allocated the state"
    state = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(trainer.shapes))
    rows = sum(x.nbytes for x in batch().values())
    assert state + rows <= used["arguments"] <= state + rows + 4096  # and the window
    assert state <= used["aliased"] <= used["outputs"] <= used["arguments"]  # the new state lies where the old one did
    assert used["peak"] == used["arguments"] + used["outputs"] - used["aliased"] + used["temporaries"]
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(lambda name, _, **__: compiled.append(name) if "backend_compile" in name else None)
    arguments = trainer.state, trainer.init_train_metrics(), trainer.put_train([batch()])
    alive = jax.device_put(np.array(True), jax.tree.leaves(arguments[1])[0].sharding)
    jnp.sin(jnp.ones(17)).block_until_ready()
    assert compiled, "the listener hears nothing"
    compiled.clear()
    trainer.train_step(*arguments, alive)
    assert compiled == []


def test_the_memory_of_a_step_that_is_no_compiled_program_is_not_known():
    assert step_memory(make_trainer({}, debug=True)) is None
    trainer = make_trainer({})
    trainer.train_step = functools.partial(trainer.train_step)  # no jitted function, as a trainer of one's own may have it
    assert step_memory(trainer) is None


def test_the_summary_says_of_each_parameter_whether_it_decays_and_what_a_step_takes(caplog):
    trainer = make_trainer({}, callbacks=(SummaryConfig(),), check_val_every_n_epoch=-1)
    with caplog.at_level(logging.INFO, logger="trainer.callbacks.summary"):
        trainer.train_model([batch()], None, num_train_steps=1)
    text, memory = caplog.messages
    assert text == f"parameters:\n{trainer.tabulate_params()}"
    said = {line.split()[0]: line.split()[-2] for line in text.splitlines()[2:-1]}
    # By hand what the optimizer does to weights that have no gradient: those it makes smaller decay.
    ones = jax.tree.map(lambda x: jnp.ones(x.shape), trainer.shapes.params)
    nothing = jax.tree.map(jnp.zeros_like, ones)
    updates, _ = trainer.optimizer.tx.update(nothing, trainer.optimizer.tx.init(ones), ones)
    schedule = float(trainer.optimizer.schedule(0))
    assert schedule > 0
    assert said == {path: "yes" if float(jnp.max(x)) < 0 else "no" for path, x in flatten(updates).items()}
    assert set(said.values()) == {"yes", "no"} and "a step takes" in memory and "temporaries" in memory


def test_nothing_decays_where_there_is_no_decay():
    trainer = make_trainer({})
    off = trainer.optimizer_config.replace(weight_decay=0.0).build(num_steps=1)
    assert not any(jax.tree.leaves(off.decays(trainer.shapes.params)))
