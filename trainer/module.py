"""TrainerModule: one trainer for a notebook and for the pipeline; a thin face over the small modules that do the work.

Making one allocates nothing: the mesh, the model and the compiled functions' shapes are known, and the state is made when it
is first asked for or restored from a checkpoint. A subclass may override how any of it is done.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax

from . import evaluate, metrics, params
from .config import TrainerConfig
from .errors import ConfigError
from .mesh import BATCH_AXES, MeshConfig, batch_sharding, replicated
from .models.base import Model, ModelConfig
from .objectives.base import Objective
from .optimizers.base import Optimizer, OptimizerConfig
from .state import TrainState, make_init, model_rngs, state_shardings
from .step import empty_window, make_eval_step, make_train_step


class TrainerModule:
    """Trains one model on one mesh.

    `batch` is an example batch, a tree of arrays or of `jax.ShapeDtypeStruct` with the global batch as first dim. What is
    minimised is `objective.loss`, or an overridden `loss_function`. Raises ConfigError where batch and mesh do not fit.
    """

    def __init__(
        self,
        trainer_config: TrainerConfig,
        model_config: ModelConfig,
        optimizer_config: OptimizerConfig,
        batch: Any,
        mesh: Any = None,
        *,
        objective: Objective | None = None,
        mesh_config: MeshConfig | None = None,
        num_steps: int = 1,
    ):
        self.trainer_config = trainer_config
        self.model_config = model_config
        self.optimizer_config = optimizer_config
        self.mesh_config = mesh_config or MeshConfig()
        self.objective = objective
        self.num_steps = num_steps
        self.exmp_batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        self.mesh = self.init_mesh(model_config, mesh)
        self.batch_partition_specs = jax.sharding.PartitionSpec(BATCH_AXES)
        self._check_batch(self.exmp_batch)
        self.model = self.build_model(model_config)
        self.optimizer = self.init_optimizer(optimizer_config)
        self._state: TrainState | None = None
        self.create_jitted_functions()

    # What a subclass may change.

    def init_mesh(self, model_config: ModelConfig, mesh: Any = None) -> Any:
        """The given mesh, or one over all devices by the mesh config."""
        return self.mesh_config.build() if mesh is None else mesh

    def build_model(self, model_config: ModelConfig) -> Model:
        """The model of a config."""
        return model_config.build()

    def init_optimizer(self, optimizer_config: OptimizerConfig) -> Optimizer:
        """The optax transformation and schedule of a config."""
        return optimizer_config.build(num_steps=self.num_steps)

    def batch_to_input(self, batch: Any) -> Any:
        """What of a batch the model gets."""
        return self.objective.inputs(batch) if self.objective else batch["inputs"]

    def loss_function(self, params: Any, apply_fn: Callable, batch: Any, rng: Any, train: bool = True) -> tuple[Any, tuple[dict, dict]]:
        """`(loss, (metrics, mutable))`: a mean, or a pair (sum, weight) that is divided once for the whole batch."""
        if self.objective is None:
            raise ConfigError("there is nothing to minimise: pass an objective to the trainer, or override loss_function")
        return self.objective.loss(params, apply_fn, batch, rng, train)

    def run_model_init(self, exmp_input: Any, init_rng: Any) -> dict[str, Any]:
        """The model's variables for inputs of the shapes of `exmp_input`."""
        return self.model.init(model_rngs(init_rng), exmp_input)

    def create_training_step_function(self) -> Callable:
        """`(state, window, batch) -> (state, window, ok)`, not jitted."""
        return make_train_step(self.loss_function, self.model.apply, self.optimizer, self.trainer_config)

    def create_evaluation_step_function(self) -> Callable:
        """`(params, mutable, window, batch) -> window`, not jitted."""
        return make_eval_step(self.loss_function, self.model.apply, self.trainer_config)

    # What it is made of.

    @functools.cached_property
    def _init(self) -> Callable[[], TrainState]:
        return make_init(self.run_model_init, self.optimizer, self.batch_to_input(self.exmp_batch), seed=self.trainer_config.seed)

    @functools.cached_property
    def shapes(self) -> TrainState:
        """The state as shapes with shardings; nothing is allocated."""
        shapes = jax.eval_shape(self._init)
        shardings = state_shardings(
            self.mesh,
            shapes,
            self.model,
            self.batch_to_input(self.exmp_batch),
            optimizer=self.optimizer,
            fsdp_min_size=self.mesh_config.fsdp_min_size,
        )
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    @functools.cached_property
    def _train_window(self) -> Any:
        return jax.device_get(empty_window(self.create_training_step_function(), self.shapes, batch=self.exmp_batch))

    @functools.cached_property
    def _eval_window(self) -> Any:
        step = self.create_evaluation_step_function()
        return jax.device_get(empty_window(step, self.shapes.params, self.shapes.mutable, batch=self.exmp_batch))

    @property
    def window_shapes(self) -> dict[str, Any]:
        """A logging window as shapes on the mesh."""
        whole = replicated(self.mesh)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole), self._train_window)

    def create_jitted_functions(self) -> None:
        """Make `train_step` and `eval_step`, jitted with the state's shardings unless `trainer_config.debug`."""
        step, evaluation = self.create_training_step_function(), self.create_evaluation_step_function()
        if self.trainer_config.debug:
            self.train_step, self.eval_step = step, evaluation
            return
        state = jax.tree.map(lambda x: x.sharding, self.shapes)
        whole = replicated(self.mesh)
        donated = (0, 1) if self.trainer_config.donate_train_state else (1,)
        self.train_step = jax.jit(step, donate_argnums=donated, out_shardings=(state, whole, whole))
        self.eval_step = jax.jit(evaluation, donate_argnums=(2,), out_shardings=whole)

    def init_model(self, exmp_input: Any = None) -> None:
        """Make the state of step 0, each part on the devices that will hold it."""
        shardings = jax.tree.map(lambda x: x.sharding, self.shapes)
        self._state = jax.jit(self._init, out_shardings=shardings)()

    @property
    def state(self) -> TrainState:
        """The current state; made by `init_model` when first asked for."""
        if self._state is None:
            self.init_model()
        assert self._state is not None
        return self._state

    @state.setter
    def state(self, state: TrainState | None) -> None:
        self._state = state

    def empty_window(self) -> dict[str, Any]:
        """A logging window that holds no step."""
        return jax.device_put(self._train_window, replicated(self.mesh))

    def put(self, batch: Any) -> Any:
        """A host batch on the mesh, cut along its first dim over data and fsdp."""
        return jax.device_put(batch, batch_sharding(self.mesh))

    def get_num_params(self) -> int:
        """Number of parameters."""
        return params.count(self.shapes.params)

    def run_evaluation(self, state: TrainState, batches: Iterable[Any]) -> dict[str, float]:
        """Values over all host batches of a split."""
        empty = jax.device_put(self._eval_window, replicated(self.mesh))
        return evaluate.evaluate(self.eval_step, state, map(self.put, batches), empty=empty)

    def eval_metrics(self) -> list[str]:
        """The names of the values that an evaluation gives."""
        return sorted(metrics.compute(self._eval_window))

    def _check_batch(self, batch: Any) -> None:
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        parts = self.trainer_config.gradient_accumulate_steps
        for x in jax.tree.leaves(batch):
            if x.shape[0] % (ways * parts):
                raise ConfigError(
                    f"a batch of {x.shape[0]} rows does not divide over {ways} devices (data x fsdp) and {parts} microbatches; "
                    f"make data.batch_size a multiple of {ways * parts}"
                )
