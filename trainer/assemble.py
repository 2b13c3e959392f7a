"""From configs to a trainer. Reading this file's config imports no jax; assembling does, and allocates nothing."""

from typing import TYPE_CHECKING, Any

from pydantic import SerializeAsAny

from .config import Config, TrainerConfig, load_object
from .data import PackedConfig
from .errors import ConfigError
from .mesh import MeshConfig
from .models import AnyModelConfig
from .objectives import AnyObjectiveConfig
from .optimizers import AnyOptimizerConfig
from .retention import CheckpointConfig

if TYPE_CHECKING:
    from .module import TrainerModule


class TrainingConfig(Config):
    """All that the trainer process is told of a run: the parts of a RunConfig that decide the weights, and what identifies them."""

    num_steps: int
    model: AnyModelConfig
    objective: AnyObjectiveConfig
    optimizer: AnyOptimizerConfig
    trainer: TrainerConfig
    mesh: MeshConfig
    checkpoint: CheckpointConfig
    data: SerializeAsAny[PackedConfig]
    config_digest: str  # of the whole RunConfig


def example_batch(data: PackedConfig) -> dict[str, Any]:
    """The shapes of a training batch."""
    import jax
    import numpy as np

    from .data.base import FIELDS

    return {name: jax.ShapeDtypeStruct((data.batch_size, data.seq_len), np.int32) for name in FIELDS}


def trainer_class(config: TrainerConfig) -> "type[TrainerModule]":
    """`TrainerModule`, or the subclass that `trainer.kind` names. Raises ConfigError where it is none."""
    from .module import TrainerModule

    if config.kind == "default":
        return TrainerModule
    cls = load_object(config.kind)
    if not (isinstance(cls, type) and issubclass(cls, TrainerModule)):
        raise ConfigError(f"trainer.kind {config.kind!r} is {cls!r}, not a subclass of trainer.TrainerModule")
    return cls


def assemble(config: TrainingConfig) -> "TrainerModule":
    """The trainer of a run. Raises ConfigError where parts do not fit."""
    return trainer_class(config.trainer)(
        config.trainer,
        config.model,
        config.optimizer,
        example_batch(config.data),
        objective=config.objective.build(),
        mesh_config=config.mesh,
        num_steps=config.num_steps,
    )
