"""TrainerModule by itself, as in a notebook: loops over loaders of every kind, resumes, restores, ends in every way."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.toy import Regression, make_data, make_trainer
from trainer import LoggerConfig, MeshConfig, fit
from trainer.callbacks import CheckpointCallbackConfig
from trainer.checkpoint import verify
from trainer.errors import CheckpointError, ConfigError, DataError, DivergedError
from trainer.feed import Feed
from trainer.retention import CheckpointConfig

DATA, VAL = make_data(), make_data(2, seed=1)


@pytest.fixture(scope="module")
def compiled():
    return {}


def leaves(state):
    return [np.asarray(x) for x in jax.tree.leaves(state)]


def equal(a, b):
    return all(np.array_equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def saving(path, **kwargs):
    """A trainer that keeps checkpoints and rows in `path`."""
    logger = LoggerConfig(log_every_n_steps=5, path=str(path), parts=({"kind": "jsonl"},))
    return make_trainer(logger=logger, callbacks=(CheckpointCallbackConfig(every_n_steps=4, after_validation=True),), **kwargs)


class Places:
    """A loader that says where it stands: endless over DATA, its state in JSON terms."""

    def __init__(self):
        self.at = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.at += 1
        return DATA[(self.at - 1) % len(DATA)]

    def get_state(self):
        """Batches handed out."""
        return {"at": self.at}

    def set_state(self, state):
        """Go to a place."""
        self.at = state["at"]


def test_a_toy_regression_learns_and_its_values_have_the_names_of_their_moments():
    trainer = make_trainer(check_val_every_n_steps=16, check_val_every_n_epoch=4)
    result = trainer.train_model(DATA, VAL, test_loader=VAL, num_epochs=8)
    assert set(result) == {"val_step_16", "val_step_32", "val_step_48", "val_step_64", "val_epoch_4", "val_epoch_8", "test"}
    assert result["val_epoch_8"] == result["val_step_64"]  # one validation serves both counts
    assert result["val_step_64"]["loss"] < 0.1 and trainer.global_step == 64


@pytest.mark.fault(22)
def test_without_logger_without_validation_and_with_a_dictionary_of_sets_it_works():
    trainer = make_trainer(check_val_every_n_epoch=1)
    assert trainer.train_model(DATA, None, num_train_steps=3) == {}
    result = trainer.train_model(DATA, {"a": VAL, "b": VAL[:1]}, num_epochs=1)
    assert result["val_epoch_1"].keys() == {"a_loss", "b_loss"}


@pytest.mark.fault(19)
def test_a_second_call_goes_on_from_where_the_first_ended_and_equals_one_call(tmp_path):
    twice, once = saving(tmp_path / "twice"), saving(tmp_path / "once")
    twice.train_model(DATA, VAL, num_epochs=1)
    twice.train_model(DATA, VAL, num_epochs=2)
    once.train_model(DATA, VAL, num_epochs=2)
    assert twice.global_step == 16 and equal(twice.state, once.state)
    assert {r["step"] for r in verify(tmp_path / "twice") if r["ok"]} == {r["step"] for r in verify(tmp_path / "once") if r["ok"]}


def rows(path):
    found = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    keys = [(r["split"], r["step"]) for r in found]
    assert len(keys) == len(set(keys)), "a row stands twice"
    return {k: {n: v for n, v in r.items() if not n.startswith(("time", "throughput", "memory"))} for k, r in zip(keys, found, strict=True)}


@pytest.mark.fault(17)
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("stop", [4, 12])
def test_stopped_in_mid_epoch_and_resumed_it_ends_bit_identical_with_the_same_rows(tmp_path, noisy, stop):
    whole = saving(tmp_path / "whole", noisy=noisy, check_val_every_n_epoch=1)
    whole.train_model(DATA, VAL, num_train_steps=24, steps_per_epoch=8)
    first = saving(tmp_path / "cut", noisy=noisy, check_val_every_n_epoch=1)
    with pytest.raises(RuntimeError, match="power cut"):
        first.train_model(_Failing(DATA, after=stop + 2), VAL, num_train_steps=24, steps_per_epoch=8)
    again = saving(tmp_path / "cut", noisy=noisy, check_val_every_n_epoch=1)
    assert again.load_model() == stop
    again.train_model(DATA, VAL, num_train_steps=24, steps_per_epoch=8)
    assert equal(whole.state, again.state)
    assert rows(tmp_path / "cut") == rows(tmp_path / "whole")


class _Failing:
    """A loader that fails for good after so many batches."""

    def __init__(self, data, after):
        self.data, self.left = data, after

    def __len__(self):
        return len(self.data)

    def __iter__(self):
        for batch in self.data:
            if not self.left:
                raise RuntimeError("power cut")
            self.left -= 1
            yield batch


@pytest.mark.fault(31)
def test_the_place_of_a_loader_is_in_the_checkpoint_in_json_and_is_found_again(tmp_path):
    whole = saving(tmp_path / "whole")
    whole.train_model(Places(), None, num_train_steps=12)
    first = saving(tmp_path / "cut")
    first.train_model(Places(), None, num_train_steps=7)
    loader, again = Places(), saving(tmp_path / "cut")
    again.load_model()
    again.load_data_loaders(train_loader=loader)
    assert loader.at == 7
    again.train_model(loader, None, num_train_steps=12)
    assert equal(whole.state, again.state)


def test_a_loader_with_places_that_was_not_put_back_is_refused_on_resume(tmp_path):
    first = saving(tmp_path)
    first.train_model(Places(), None, num_train_steps=5)
    again = saving(tmp_path)
    again.load_model()
    with pytest.raises(DataError, match="load_data_loaders"):
        again.train_model(Places(), None, num_train_steps=8)


def test_an_iterator_that_cannot_go_back_is_refused_on_resume_with_what_to_give_instead():
    trainer = make_trainer()
    trainer.train_model(iter(DATA), None, num_train_steps=3)
    with pytest.raises(DataError, match=r"goes on at step 3.*begins at its first batch.*get_state and set_state"):
        trainer.train_model((batch for batch in DATA), None, num_train_steps=5)
    assert trainer.global_step == 3


@pytest.mark.fault(15)
def test_an_iterator_that_runs_dry_ends_training_with_a_reason():
    with pytest.raises(DataError, match="can be used once"):
        make_trainer().train_model(iter(DATA), None, num_train_steps=20)
    with pytest.raises(DataError, match="empty"):
        make_trainer().train_model([], None, num_train_steps=2)


@pytest.mark.fault(16)
def test_steps_per_epoch_cuts_a_longer_loader_and_begins_a_shorter_one_again():
    def order(loader, per_epoch, steps):
        feed = Feed(loader, step=0, steps_per_epoch=per_epoch)
        return [next(feed) for _ in range(steps)]

    assert order([1, 2, 3, 4], 3, 6) == [1, 2, 3, 1, 2, 3]
    assert order([1, 2], 3, 6) == [1, 2, 1, 1, 2, 1]
    assert order([1, 2, 3], None, 7) == [1, 2, 3, 1, 2, 3, 1]
    for step in range(7):
        feed = Feed([1, 2, 3, 4], step=step, steps_per_epoch=3)
        assert [next(feed) for _ in range(6)] == order([1, 2, 3, 4], 3, 13)[step : step + 6]


@pytest.mark.fault(20)
def test_a_smaller_last_batch_is_refused_in_training_and_counts_in_evaluation():
    small = jax.tree.map(lambda x: x[:5], VAL[0])
    trainer = make_trainer()
    with pytest.raises(DataError, match="drop or pad"):
        trainer.train_model([*DATA[:2], small], None, num_train_steps=3)
    trainer = make_trainer()
    both, one, rest = (trainer.eval_model(x, "val", 1)["loss"] for x in ([VAL[0], small], [VAL[0]], [small]))
    assert both == pytest.approx((16 * one + 5 * rest) / 21, rel=1e-5)


@pytest.mark.fault(23)
def test_a_validation_iterator_that_can_be_used_once_is_evaluated_whole():
    trainer = make_trainer(check_val_every_n_steps=2)
    found = trainer.train_model(DATA, iter(VAL), num_train_steps=2)
    assert found["val_step_2"] == trainer.eval_model(VAL, "val", 1)


@pytest.mark.fault(14)
def test_dropout_and_batch_statistics_rest_in_evaluation():
    trainer, other = make_trainer(noisy=True), make_trainer(noisy=True, seed_eval=7)
    trainer.train_model(DATA, None, num_train_steps=8)
    before = leaves(trainer.state.mutable)
    found = trainer.eval_model(VAL, "val", 1)
    other.restore_model({"params": trainer.state.params, "mutable_variables": trainer.state.mutable})
    assert other.eval_model(VAL, "val", 1) == found  # nothing is drawn
    variables = {"params": trainer.state.params, **trainer.state.mutable}
    each = [(trainer.model.apply(variables, b["inputs"], train=False)[:, 0] - b["targets"]) ** 2 for b in VAL]
    assert found["loss"] == pytest.approx(float(jnp.mean(jnp.concatenate(each))), rel=1e-5)
    assert all(np.array_equal(a, b) for a, b in zip(before, leaves(trainer.state.mutable), strict=True))


@pytest.mark.fault(8)
@pytest.mark.parametrize(
    "config", [{}, {"gradient_accumulate_steps": 4}, {"gradient_accumulate_steps": 4, "gradient_accumulate_scan": True}]
)
def test_batch_statistics_move_in_training_and_keep_their_shapes(config):
    trainer = make_trainer(noisy=True, **config)
    before = jax.tree.map(lambda x: (x.shape, x.dtype), trainer.state.mutable)
    start = leaves(trainer.state.mutable)
    trainer.train_model(DATA, None, num_train_steps=4)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), trainer.state.mutable) == before
    assert not any(np.array_equal(a, b) for a, b in zip(start, leaves(trainer.state.mutable), strict=True))


class Told:
    """A callback and a logger that write down what they are told."""

    def __init__(self):
        self.statuses, self.rows = [], []

    def start(self, step, info):
        """Keep the facts."""
        self.info = info

    def row(self, split, step, values):
        """Keep the row."""
        self.rows.append((split, step, dict(values)))

    def finalize(self, status):
        """Keep the status."""
        self.statuses.append(status)


@pytest.mark.fault(18)
@pytest.mark.parametrize(("loader", "error", "status"), [(DATA, None, "success"), (_Failing(DATA, 3), RuntimeError, "error")])
def test_finalize_is_called_with_the_status_whatever_happens(loader, error, status):
    trainer, told = make_trainer(), Told()
    trainer.init_logger = lambda config: setattr(trainer, "loggers", [told])
    if error:
        with pytest.raises(error):
            trainer.train_model(loader, None, num_train_steps=6)
    else:
        trainer.train_model(loader, None, num_train_steps=6)
    assert told.statuses == [status] and told.info["num_parameters"] == trainer.get_num_params() == 2 * 32 + 32 + 32 + 1


class Poisoned(Regression):
    """Not a number where a batch says so."""

    def loss_function(self, params, apply_fn, batch, rng, train=True):
        """The mean, or not a number."""
        loss, aux = super().loss_function(params, apply_fn, batch, rng, train)
        return jnp.where(batch["targets"][0] > 90, jnp.inf, 1.0) * loss, aux


def poisoned(**config):
    good = make_trainer(**config)
    return Poisoned(good.trainer_config, good.model_config, good.optimizer_config, good.exmp_batch)


BAD = {"inputs": DATA[0]["inputs"], "targets": np.full_like(DATA[0]["targets"], 99.0)}


@pytest.mark.fault(27)
def test_a_divergence_saves_nothing_and_evicts_no_good_checkpoint(tmp_path):
    keep = CheckpointConfig(keep_latest=1)
    logger, callback = LoggerConfig(path=str(tmp_path)), CheckpointCallbackConfig(every_n_steps=2, after_validation=True, keep=keep)
    trainer, good = poisoned(logger=logger, callbacks=(callback,), check_val_every_n_steps=4), make_trainer()
    with pytest.raises(DivergedError, match="step 4"):
        trainer.train_model([*DATA[:3], BAD, *DATA[4:]], VAL, num_train_steps=8)
    assert [(r["step"], r["ok"]) for r in verify(tmp_path)] == [(2, True)]
    good.train_model(DATA, None, num_train_steps=2)
    again = poisoned(logger=logger, callbacks=(callback,))
    assert again.load_model() == 2 and equal(again.state, good.state)


@pytest.mark.fault(10)
def test_after_a_divergence_the_last_good_state_stands_and_training_can_go_on():
    trainer, good = poisoned(), make_trainer()
    with pytest.raises(DivergedError, match="step 4"):
        trainer.train_model([*DATA[:3], BAD, *DATA[4:]], None, num_train_steps=8)
    good.train_model(DATA, None, num_train_steps=3)
    assert equal(trainer.state, good.state) and trainer.state.step == 3
    assert trainer.global_step == 3
    trainer.train_model(DATA, None, num_train_steps=5)
    good.train_model(DATA, None, num_train_steps=5)
    assert equal(trainer.state, good.state)


def test_a_bad_batch_may_be_skipped_and_is_counted():
    trainer, told = poisoned(on_nonfinite="skip", logger=LoggerConfig(log_every_n_steps=4)), Told()
    trainer.init_logger = lambda config: setattr(trainer, "loggers", [told])
    trainer.train_model([DATA[0], BAD, *DATA[2:]], None, num_train_steps=4)
    assert trainer.state.step == 4
    ((_, _, values),) = [r for r in told.rows if r[0] == "train"]
    assert values["skipped_sum"] == 1 and np.isfinite(values["loss_mean"]) and np.isfinite(values["grad_norm_mean"])


@pytest.mark.fault(29)
@pytest.mark.fault(34)
def test_the_best_the_newest_or_any_step_is_loaded_with_or_without_the_optimizer(tmp_path):
    trainer = saving(tmp_path, check_val_every_n_steps=4, check_val_every_n_epoch=-1, lr=0.5)
    result = trainer.train_model(DATA, VAL, num_train_steps=12)
    losses = {int(k.split("_")[-1]): v["loss"] for k, v in result.items() if k.startswith("val_step")}
    best = min(losses, key=losses.get)
    assert best != 12, "the best is the newest: this shows nothing"
    other = make_trainer(lr=0.5)
    assert other.load_pretrained_model(tmp_path, load_best=True, load_optimizer=False) == best
    assert other.eval_model(VAL, "val", 1)["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert other.state.step == 0 and other.global_step == 0  # and so the schedule begins where the count does
    assert other.load_pretrained_model(str(tmp_path)) == 12 and equal(other.state, trainer.state) and other.global_step == 12
    assert other.load_pretrained_model(tmp_path, step_idx=4) == 4
    with pytest.raises(CheckpointError, match="no checkpoint of step 5"):
        other.load_pretrained_model(tmp_path, step_idx=5)


@pytest.mark.fault(24)
@pytest.mark.fault(25)
def test_the_best_weights_are_tested_and_the_trained_state_is_kept(tmp_path):
    trainer = saving(tmp_path / "tested", check_val_every_n_steps=4, check_val_every_n_epoch=-1, lr=0.5)
    result = trainer.train_model(DATA, VAL, test_loader=VAL, num_train_steps=12)
    losses = [v["loss"] for k, v in result.items() if k.startswith("val_step")]
    assert min(losses) < losses[-1], "the best is the newest: this shows nothing"
    assert result["test"]["loss"] == min(losses)
    untested = saving(tmp_path / "untested", check_val_every_n_steps=4, check_val_every_n_epoch=-1, lr=0.5)
    untested.train_model(DATA, VAL, num_train_steps=12)
    assert trainer.global_step == 12 and equal(trainer.state, untested.state)


@pytest.mark.fault(21)
def test_the_last_window_is_logged_however_short_it_is_and_counts_in_its_epoch():
    trainer, told = make_trainer(logger=LoggerConfig(log_every_n_steps=5)), Told()
    trainer.init_logger = lambda config: setattr(trainer, "loggers", [told])
    trainer.train_model(DATA, None, num_train_steps=8)
    found = {(split, step): values["loss_mean"] for split, step, values in told.rows}
    assert found.keys() == {("train", 5), ("train", 8), ("train_epoch", 8)}
    assert found["train_epoch", 8] == pytest.approx((5 * found["train", 5] + 3 * found["train", 8]) / 8, rel=1e-6)


@pytest.mark.fault(30)
def test_a_trainer_is_made_again_from_an_absolute_path_alone(tmp_path):
    trainer = saving(tmp_path)
    trainer.train_model(DATA, None, num_train_steps=6)
    again = Regression.load_from_checkpoint(str(tmp_path))
    assert isinstance(again, Regression) and equal(again.state, trainer.state) and again.model_config == trainer.model_config


def test_a_trainer_that_is_made_again_computes_in_the_dtypes_it_was_trained_in_also_on_fewer_devices(tmp_path):
    mesh = MeshConfig(fsdp=1, fsdp_min_size=7, fsdp_gather_dtype="bfloat16", fsdp_scatter_dtype="float32")
    base = saving(tmp_path, mesh=mesh)
    base.train_model(DATA, None, num_train_steps=4)
    assert Regression.load_from_checkpoint(tmp_path).mesh_config == mesh
    kept = json.loads((tmp_path / "trainer.json").read_text())
    kept["mesh"] |= {"data": 4, "fsdp": 8}  # as a machine with 32 devices would have left it
    (tmp_path / "trainer.json").write_text(json.dumps(kept))
    again = Regression.load_from_checkpoint(tmp_path)
    assert again.mesh_config == mesh and equal(again.state, base.state)


@pytest.mark.fault(33)
def test_a_trainer_is_made_again_from_an_object_store(tmp_path):
    import fsspec

    trainer = saving(tmp_path)
    trainer.train_model(DATA, None, num_train_steps=6)
    fsspec.filesystem("memory").put(f"{tmp_path}/", "/bucket/run/", recursive=True)
    with pytest.raises(ConfigError, match=r"tests\.trainer\.toy:MLPConfig; allow it by trust_code=True"):
        Regression.load_from_checkpoint("memory://bucket/run")
    again = Regression.load_from_checkpoint("memory://bucket/run", trust_code=True)
    assert equal(again.state, trainer.state)


def test_restore_model_takes_what_the_dictionary_has_and_refuses_other_shapes():
    source, target = make_trainer(), make_trainer()
    source.train_model(DATA, None, num_train_steps=5)
    before = leaves(target.state.opt_state)
    target.restore_model({"params": source.state.params, "step": 5})
    assert equal(target.state.params, source.state.params) and target.global_step == 5
    assert all(np.array_equal(a, b) for a, b in zip(before, leaves(target.state.opt_state), strict=True))
    wrong = jax.tree.map(lambda x: x[..., :1], source.state.params)
    with pytest.raises(CheckpointError, match="the trainer's is"):
        target.restore_model({"params": wrong})


@pytest.mark.parametrize("arguments", [{}, {"num_epochs": 1, "num_train_steps": 8}])
def test_exactly_one_of_epochs_and_steps_is_wanted(arguments):
    with pytest.raises(ConfigError, match="exactly one"):
        make_trainer().train_model(DATA, None, **arguments)


def test_epochs_of_a_loader_without_a_length_need_their_number_of_steps():
    with pytest.raises(ConfigError, match="steps_per_epoch"):
        make_trainer().train_model(iter(DATA), None, num_epochs=1)


def test_a_steady_run_compiles_one_step(monkeypatch):
    trainer = make_trainer(check_val_every_n_steps=4)
    trainer.train_model(DATA, VAL, num_train_steps=24)
    assert trainer.train_step._cache_size() == 1 and trainer.eval_step._cache_size() == 1


def test_the_table_of_parameters_has_a_row_for_each_and_their_number():
    trainer = make_trainer()
    text = trainer.tabulate_params()
    assert "Dense_0.kernel" in text and str(trainer.get_num_params()) in text.replace(",", "")


def test_the_host_programs_logging_is_left_alone():
    root = logging.getLogger()
    before = (root.level, root.handlers[:])
    make_trainer().train_model(DATA, VAL, num_train_steps=2)
    assert (root.level, root.handlers) == before


def test_a_schedule_free_run_is_judged_by_its_averages_also_from_a_checkpoint(tmp_path):
    from pydantic import TypeAdapter

    from trainer.optimizers import AnyOptimizerConfig, ScheduleConfig

    plain = saving(tmp_path, check_val_every_n_steps=6)
    schedule = ScheduleConfig(kind="constant", lr=2e-2).to_dict()
    config = TypeAdapter(AnyOptimizerConfig).validate_python({"kind": "schedule_free_adamw", "schedule": schedule})
    trainer = Regression(plain.trainer_config, plain.model_config, config, plain.exmp_batch)
    found = trainer.train_model(DATA, VAL, num_train_steps=6)["val_step_6"]["loss"]
    judged, _ = trainer.weights(trainer.state)
    assert not equal(judged, trainer.state.params)
    again = Regression.load_from_checkpoint(tmp_path)
    assert again.eval_model(VAL, "val", 1)["loss"] == pytest.approx(found, rel=1e-6)


def test_a_schedule_free_run_counts_a_skipped_step_in_its_rate_too():
    from trainer.optimizers import ScheduleConfig
    from trainer.optimizers.schedule_free import ScheduleFreeAdamWConfig

    base = poisoned(on_nonfinite="skip")
    optimizer = ScheduleFreeAdamWConfig(schedule=ScheduleConfig(kind="linear", lr=1.0, decay_steps=10))
    trainer = Poisoned(base.trainer_config, base.model_config, optimizer, base.exmp_batch)
    trainer.train_model([DATA[0], BAD, *DATA[2:]], None, num_train_steps=4)
    held = trainer.state.opt_state["schedule_free"]
    assert int(held.base_optimizer_state["rate"].count) == 4 and int(held.step_count) == 5, "optax counts these from 1"
    assert int(held.base_optimizer_state["transform"].count) == 3, "of statistics the bad batch is no part"


def test_after_a_skipped_step_the_logged_rate_is_still_the_one_used():
    from trainer.optimizers import AdamWConfig, ScheduleConfig

    base = poisoned(on_nonfinite="skip", logger=LoggerConfig(log_every_n_steps=1))
    optimizer = AdamWConfig(schedule=ScheduleConfig(kind="linear", lr=1.0, decay_steps=10))
    trainer, told = Poisoned(base.trainer_config, base.model_config, optimizer, base.exmp_batch), Told()
    trainer.init_logger = lambda config: setattr(trainer, "loggers", [told])
    trainer.train_model([DATA[0], BAD, *DATA[2:]], None, num_train_steps=4)
    logged = [values["lr_single"] for split, _, values in told.rows if split == "train"]
    assert logged == pytest.approx([float(trainer.optimizer.schedule(i)) for i in range(4)])
    assert int(trainer.state.opt_state["rate"].count) == 4


def test_averaged_parameters_are_validated_as_a_row_of_their_own_and_survive_a_stop(tmp_path):
    from trainer.callbacks import EMAConfig

    def averaging(path):
        base = saving(path, check_val_every_n_steps=4)
        config = base.trainer_config.replace(callbacks=(*base.trainer_config.callbacks, EMAConfig(decay=0.9)))
        return Regression(config, base.model_config, base.optimizer_config, base.exmp_batch)

    averaging(tmp_path / "whole").train_model(DATA, VAL, num_train_steps=12)
    averaging(tmp_path / "cut").train_model(DATA, VAL, num_train_steps=8)
    again = averaging(tmp_path / "cut")
    assert again.load_model() == 8
    again.train_model(DATA, VAL, num_train_steps=12)
    found, whole = rows(tmp_path / "cut"), rows(tmp_path / "whole")
    assert {step for split, step in whole if split == "val_ema"} == {4, 8, 12}
    assert {k: v for k, v in found.items() if k[0].startswith("val")} == {k: v for k, v in whole.items() if k[0].startswith("val")}
    assert whole["val_ema", 12]["loss"] != whole["val", 12]["loss"]


def test_once_a_training_is_over_its_trainer_evaluates_for_the_caller_alone(tmp_path):
    trainer = saving(tmp_path)
    trainer.train_model(DATA, VAL, num_train_steps=4)
    before = rows(tmp_path)
    assert trainer.eval_model(VAL, "val", 1)["loss"] == pytest.approx(trainer.test_model(VAL)["loss"])
    assert rows(tmp_path) == before


def test_a_step_that_is_trained_again_is_saved_again_and_never_beside_later_ones_of_another_course(tmp_path):
    trainer = saving(tmp_path)
    trainer.train_model(DATA, None, num_train_steps=8)
    trainer.load_model(4)
    with pytest.raises(ConfigError, match=r"begin at step 4, but .* later steps \(00000008\); call load_model\(\)"):
        trainer.train_model(DATA[::-1], None, num_train_steps=8)
    (tmp_path / "checkpoints" / "00000008").rename(tmp_path / "moved")
    trainer.train_model(DATA[::-1], None, num_train_steps=8)
    state = trainer.state
    assert saving(tmp_path).load_model() == 8
    again = saving(tmp_path)
    again.load_model()
    assert equal(again.state, state)


def test_a_schedule_that_ends_with_the_run_is_not_outlived_unseen():
    from trainer.optimizers import AdamWConfig, ScheduleConfig

    base = make_trainer()

    def trainer(**kind):
        return Regression(base.trainer_config, base.model_config, AdamWConfig(schedule=ScheduleConfig(**kind)), base.exmp_batch)

    with pytest.raises(ConfigError, match=r"cosine schedule .* num_steps=1, but is to train to step 8; make it with num_steps=8"):
        trainer(kind="cosine").train_model(DATA, None, num_epochs=1)
    with pytest.raises(ConfigError, match="num_steps=1, but is to train to step 2"):
        next(trainer(kind="cosine").train_until(2, DATA))
    for free in (trainer(kind="inverse_sqrt"), trainer(kind="cosine", decay_steps=4)):
        assert not fit.outgrown(free, 100)
    fitting = Regression(base.trainer_config, base.model_config, AdamWConfig(), base.exmp_batch, num_steps=2)
    assert not fit.outgrown(fitting, 1) and not fit.outgrown(fitting, 2), "less far is a stop on the way"


def test_where_a_callback_ends_training_its_last_state_is_kept_as_at_any_end(tmp_path):
    from trainer.callbacks import EarlyStoppingConfig

    base = saving(tmp_path, check_val_every_n_steps=2)
    callbacks = (CheckpointCallbackConfig(every_n_steps=100, after_validation=False), EarlyStoppingConfig(patience=1, min_delta=100))
    trainer = Regression(base.trainer_config.replace(callbacks=callbacks), base.model_config, base.optimizer_config, base.exmp_batch)
    trainer.train_model(DATA, VAL, num_train_steps=12)
    assert trainer.global_step == 4 and [row["step"] for row in verify(tmp_path)] == [4]
