"""A two-layer perceptron on a mean squared error, with the public names alone: `python -m tests.trainer.example`."""

from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from trainer import TrainerConfig, TrainerModule
from trainer.models import ModelConfig
from trainer.models.linen import LinenModel
from trainer.optimizers import AdamWConfig, ScheduleConfig


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(1)(nn.tanh(nn.Dense(32)(x)))


class MLPConfig(ModelConfig):
    kind: Literal["tests.trainer.example:MLPConfig"] = "tests.trainer.example:MLPConfig"

    def build(self):
        return LinenModel(MLP())


class Regression(TrainerModule):
    def loss_function(self, params, apply_fn, batch, rng, train=True):
        loss = jnp.mean((apply_fn({"params": params}, batch["inputs"], train=train)[:, 0] - batch["targets"]) ** 2)
        return loss, ({"loss": loss}, {})


x = np.random.default_rng(0).uniform(-1, 1, (10, 16, 2)).astype(np.float32)
batches = [{"inputs": a, "targets": np.sin(3 * a[:, 0]) * a[:, 1]} for a in x]
optimizer = AdamWConfig(schedule=ScheduleConfig(kind="constant", lr=2e-2))
result = Regression(TrainerConfig(), MLPConfig(), optimizer, batches[0]).train_model(batches[:8], batches[8:], num_epochs=12)
