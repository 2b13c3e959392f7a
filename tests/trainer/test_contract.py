"""Mistakes of a loss function or a loader are named before anything is trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer.toy import Regression, make_data, make_trainer
from trainer.errors import ConfigError, DataError

DATA, VAL = make_data(3), make_data(2, seed=1)

GARBAGE = {
    "a loss alone": (lambda loss, aux: loss, ConfigError, r"returned float32\[\]; it must return \(loss, \(metrics, mutable\)\)"),
    "nothing": (lambda loss, aux: None, ConfigError, "returned a NoneType"),
    "metrics without mutable": (lambda loss, aux: (loss, aux[0]), ConfigError, "returned a tuple of 2: .*dict"),
    "three in a row": (lambda loss, aux: (loss, *aux), ConfigError, "returned a tuple of 3"),
    "a loss per row": (lambda loss, aux: (jnp.zeros(16) + loss, aux), ConfigError, r"a loss that is float32\[16\]"),
    "a weight per row": (lambda loss, aux: ((loss, jnp.ones(16)), aux), ConfigError, r"weight of the loss that is float32\[16\]"),
    "a loss of three": (lambda loss, aux: ((loss, 1.0, 1.0), aux), ConfigError, "a loss of 3 parts"),
    "a loss of integers": (lambda loss, aux: (jnp.int32(1), aux), ConfigError, "a loss of dtype int32"),
    "no loss": (lambda loss, aux: (None, aux), ConfigError, "a loss that is a NoneType"),
    "a list of metrics": (lambda loss, aux: (loss, ([loss], {})), ConfigError, "metrics of type list"),
    "no mutable": (lambda loss, aux: (loss, (aux[0], None)), ConfigError, "mutable of type NoneType"),
    "a metric per row": (lambda loss, aux: (loss, ({"errors": jnp.ones(16)}, {})), ValueError, r"metric 'errors' has shape \(16,\)"),
    "a count per row": (
        lambda loss, aux: (loss, ({"errors": {"value": loss, "count": jnp.ones(16)}}, {})),
        ValueError,
        r"count of metric 'errors' has shape \(16,\)",
    ),
    "a metric of text": (lambda loss, aux: (loss, ({"kind": "mse"}, {})), ValueError, "metric 'kind' has type str"),
    "an unknown mode": (lambda loss, aux: (loss, ({"x": {"value": loss, "log_modes": ("med",)}}, {})), ValueError, "'med' is none of"),
}


def with_loss(wrong, *, in_training=True):
    """A trainer whose loss function returns what `wrong` makes of the right answer, in training or in evaluation alone."""

    class Wrong(Regression):
        def loss_function(self, params, apply_fn, batch, rng, train=True):
            """Something else."""
            right = super().loss_function(params, apply_fn, batch, rng, train)
            return wrong(*right) if train == in_training else right

    base = make_trainer(check_val_every_n_steps=1)
    return Wrong(base.trainer_config, base.model_config, base.optimizer_config, base.exmp_batch)


class Watched:
    """A loader that counts what is taken from it."""

    def __init__(self, batches):
        self.batches, self.taken = batches, 0

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        for batch in self.batches:
            self.taken += 1
            yield batch


@pytest.mark.parametrize("in_training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("case", GARBAGE)
def test_a_loss_function_that_returns_something_else_is_told_before_a_batch_is_taken(case, in_training):
    wrong, error, message = GARBAGE[case]
    if case == "an unknown mode" and not in_training:
        return  # an evaluation knows but means and sums
    trainer, train, val = with_loss(wrong, in_training=in_training), Watched(DATA), Watched(VAL)
    with pytest.raises(error, match=message):
        trainer.train_model(train, val, num_train_steps=3)
    assert train.taken == val.taken == 0 and trainer.global_step == 0 and trainer.first_step


def change(batch, **fields):
    return {**batch, **fields}


WRONG = {
    "columns": (change(DATA[0], inputs=np.zeros((16, 3), np.float32)), r"float32\[(16|rows), 3\].*float32\[(16|rows), 2\]"),
    "dtype": (change(DATA[0], inputs=np.zeros((16, 2), np.int32)), r"int32\[(16|rows), 2\].*float32\[(16|rows), 2\]"),
    "a field too many": (change(DATA[0], more=np.zeros(16, np.float32)), "more"),
    "no batch": ([1.0, 2.0], "trainer was made for"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_batch_of_other_shapes_or_dtypes_than_the_example_is_refused_and_nothing_is_trained(case):
    wrong, message = WRONG[case]
    trainer = make_trainer(check_val_every_n_steps=1)
    with pytest.raises(DataError, match=message):
        trainer.train_model([wrong, *DATA], VAL, num_train_steps=2)
    assert trainer.global_step == 0 and trainer.first_step
    train = Watched(DATA)
    with pytest.raises(DataError, match=message):
        trainer.train_model(train, {"good": VAL, "bad": [wrong]}, num_train_steps=2)  # told before training, not at its first validation
    assert train.taken == 0


def test_batches_of_64_bits_are_those_of_32():
    wide = jax.tree.map(lambda x: x.astype(np.float64), DATA)
    a, b = make_trainer(), make_trainer()
    a.train_model(wide, None, num_train_steps=3)
    b.train_model(DATA, None, num_train_steps=3)
    for x, y in zip(jax.tree.leaves(a.state), jax.tree.leaves(b.state), strict=True):
        np.testing.assert_array_equal(x, y)
