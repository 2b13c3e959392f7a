"""A restored state is as good as a new one: steps after it reuse its buffers, and whoever it was taken from keeps theirs."""

import gc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.toy import Regression, make_data, make_trainer
from trainer import LoggerConfig
from trainer.callbacks import CheckpointCallbackConfig
from trainer.checkpoint import read_state

DATA = make_data()


def saving(path):
    return make_trainer(noisy=True, logger=LoggerConfig(path=str(path)), callbacks=(CheckpointCallbackConfig(every_n_steps=4),))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A directory with a checkpoint of step 4, and the trainer that wrote it."""
    path = tmp_path_factory.mktemp("saved")
    trainer = saving(path)
    trainer.train_model(DATA, None, num_train_steps=4)
    return path, trainer


def fresh(path, _):
    return saving(path)


def newest(path, _):
    trainer = saving(path)
    trainer.load_model()
    return trainer


def pretrained(path, _):
    trainer = saving(path)
    assert trainer.state.step == 0  # the weights it had are given up
    trainer.load_pretrained_model(path)
    return trainer


def weights_alone(path, _):
    trainer = saving(path)
    trainer.load_pretrained_model(path, load_optimizer=False)
    return trainer


def whole_trainer(path, _):
    return Regression.load_from_checkpoint(path)


def state_alone(path, _):
    trainer = saving(path)
    trainer.state = read_state(path, 4, trainer.shapes)
    return trainer


def dictionary(path, source):
    trainer = saving(path)
    s = source.state
    trainer.restore_model({"params": s.params, "opt_state": s.opt_state, "mutable_variables": s.mutable, "step": s.step})
    return trainer


def host_dictionary(path, source):
    trainer = saving(path)
    trainer.restore_model({"params": jax.device_get(source.state.params)})
    return trainer


def buffers(tree):
    return {shard.data.unsafe_buffer_pointer() for x in jax.tree.leaves(tree) for shard in x.addressable_shards}


def one_step(trainer):
    """By how many bytes a step lets grow what is alive, and the share of the state's buffers that it used again."""
    state, window, trainer.state, trainer.desk.window = trainer.state, trainer.init_train_metrics(), None, None
    old, places = jax.tree.leaves(state), buffers(state)
    alive = jax.device_put(np.array(True))
    batch = trainer.put_train([DATA[0]])
    gc.collect()
    already = sum(x.nbytes for x in jax.live_arrays())
    state, window, _ = jax.block_until_ready(trainer.train_step(state, window, batch, alive))
    assert all(x.is_deleted() for x in old)
    return sum(x.nbytes for x in jax.live_arrays()) - already, len(buffers(state) & places) / len(places)


@pytest.fixture(scope="module")
def new_one(saved):
    """The bytes that a step from a new state takes."""
    grown, reused = one_step(fresh(*saved))
    assert reused == 1.0
    return grown


WAYS = [newest, pretrained, weights_alone, whole_trainer, state_alone, dictionary, host_dictionary]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_a_step_reuses_every_buffer_of_a_restored_state_and_takes_no_more_memory_than_from_a_new_one(saved, new_one, way):
    grown, reused = one_step(way(*saved))
    assert reused == 1.0 and grown <= new_one


def test_a_state_taken_from_another_trainer_leaves_it_its_own(saved, tmp_path):
    source, target = saved[1], make_trainer(noisy=True)
    params = jax.device_get(source.state.params)
    target.restore_model({"params": source.state.params})
    target.train_model(DATA, None, num_train_steps=2)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(source.state.params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_host_arrays_that_were_restored_from_are_not_written_to(saved):
    target = make_trainer(noisy=True)
    given = jax.tree.map(np.array, saved[1].state.params)
    before = jax.tree.map(np.copy, given)
    target.restore_model({"params": given})
    target.train_model(DATA, None, num_train_steps=2)
    assert jax.tree.all(jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), given, before))


def test_weights_alone_are_where_also_an_optimizer_begins_that_holds_parameters_of_its_own(tmp_path):
    from trainer.optimizers import ScheduleConfig
    from trainer.optimizers.schedule_free import ScheduleFreeAdamWConfig

    def schedule_free(trainer):
        optimizer = ScheduleFreeAdamWConfig(schedule=ScheduleConfig(kind="constant", lr=1e-5))
        return Regression(trainer.trainer_config, trainer.model_config, optimizer, trainer.exmp_batch)

    source, target = saving(tmp_path), schedule_free(make_trainer(noisy=True, seed=1))
    source.train_model(DATA, None, num_train_steps=4)
    target.load_pretrained_model(tmp_path, load_optimizer=False)
    target.train_model(DATA, None, num_train_steps=3)
    for a, b in zip(jax.tree.leaves(source.state.params), jax.tree.leaves(target.weights(target.state)[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_a_callback_gets_its_own_state_back_though_others_came_or_went(tmp_path):
    from trainer.callbacks import EarlyStoppingConfig, EMAConfig

    def watched(*callbacks):
        base = saving(tmp_path)
        config = base.trainer_config.replace(callbacks=(*callbacks, *base.trainer_config.callbacks))
        return Regression(config, base.model_config, base.optimizer_config, base.exmp_batch)

    source = watched(EMAConfig(decay=0.5))
    source.train_model(DATA, None, num_train_steps=4)
    target = watched(EarlyStoppingConfig(), EMAConfig(decay=0.5))
    target.load_model()
    a, b = (list(trainer.audience.averages()) for trainer in (source, target))
    assert all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)) and a


def test_the_newest_checkpoint_that_gives_back_what_was_saved_is_loaded(tmp_path, monkeypatch):
    from trainer import checkpoint
    from trainer.errors import DamagedError

    saving(tmp_path).train_model(DATA, None, num_train_steps=8)
    right = checkpoint.digest.digests
    trainer = saving(tmp_path)

    def failing(flat):  # as a machine whose memory fails would find it
        return dict.fromkeys(flat, "0" * 16) if trainer.desk.store.steps()[-1] == 8 else right(flat)

    monkeypatch.setattr(checkpoint.digest, "digests", failing)
    with pytest.raises(DamagedError, match="checkpoint 8 gives back other values"):
        trainer.load_model(8)
    assert trainer.load_model() == 4 and trainer.state.step == 4
