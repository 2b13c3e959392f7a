"""A toy regression with the public API alone: what a newcomer writes in a notebook."""

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from trainer import MeshConfig, TrainerConfig, TrainerModule
from trainer.models import ModelConfig
from trainer.models.linen import LinenModel
from trainer.optimizers import AdamWConfig, ScheduleConfig


class MLP(nn.Module):
    """Two layers; with `noisy` also batch norm and dropout."""

    noisy: bool

    @nn.compact
    def __call__(self, x, *, train=False):
        """`x` (batch, 2) -> (batch, 1)."""
        x = nn.tanh(nn.Dense(32, kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("embed", "mlp")))(x))
        if self.noisy:
            x = nn.Dropout(0.1)(nn.BatchNorm(momentum=0.9)(x, use_running_average=not train), deterministic=not train)
        return nn.Dense(1, kernel_init=nn.with_logical_partitioning(nn.initializers.lecun_normal(), ("mlp", None)))(x)


class MLPConfig(ModelConfig):
    """The model's config; `kind` is its import path."""

    kind: Literal["tests.trainer.toy:MLPConfig"] = "tests.trainer.toy:MLPConfig"
    noisy: bool = False

    def build(self):
        """The model."""
        return LinenModel(MLP(self.noisy))


class Regression(TrainerModule):
    """Mean squared error."""

    def loss_function(self, params, apply_fn, batch, rng, train=True):
        """The mean over the batch."""
        y, mutable = apply_fn({"params": params}, batch["inputs"], train=train, rngs={"dropout": rng}, mutable=["batch_stats"])
        errors = (y[:, 0] - batch["targets"]) ** 2
        return jnp.mean(errors), ({"loss": {"value": jnp.sum(errors), "count": errors.size}}, dict(mutable))


def make_data(num_batches=8, rows=16, seed=0):
    """Batches of a smooth function of two variables."""
    rng = np.random.default_rng(seed)
    x = rng.uniform(-1, 1, (num_batches, rows, 2)).astype(np.float32)
    return [{"inputs": a, "targets": np.sin(3 * a[:, 0]) * a[:, 1]} for a in x]


def make_trainer(noisy=False, mesh=None, lr=2e-2, **config):
    """A trainer of the toy, on the first devices that the `mesh` config asks for, or on all."""
    mesh = mesh or MeshConfig(fsdp_min_size=0)
    devices = jax.devices()[: mesh.data * mesh.fsdp * mesh.model] if mesh.data > 0 else None
    config = {"enable_progress_bar": False, "check_val_every_n_epoch": -1, **config}
    return Regression(
        TrainerConfig(**config),
        MLPConfig(noisy=noisy),
        AdamWConfig(schedule=ScheduleConfig(kind="constant", lr=lr), weight_decay=0.0),
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_data(1)[0]),
        mesh.build(devices),
        mesh_config=mesh,
    )
