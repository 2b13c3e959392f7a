"""TrainerModule: one trainer for a notebook and for the pipeline; a thin face over the small modules that do the work.

Making one allocates nothing: mesh, model, optimizer and the shapes of the state are known, and the state itself is made when
it is first asked for, or restored. A subclass may override how any of it is done; the pipeline drives the same methods.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import jax

from . import contract, evaluate, fit, fsdp, loop, metrics, params, per_sample, restore, spikes
from .audience import Audience
from .callbacks.base import Callback
from .config import LoggerConfig, TrainerConfig
from .desk import Desk
from .dispatch import misfit, unheard
from .errors import ConfigError
from .feed import grouped, kept, placer
from .hooks import Hooks
from .mesh import BATCH_AXES, MeshConfig, batch_sharding, check_batch, replicated
from .models.base import Model, ModelConfig
from .objectives.base import Objective
from .optimizers.base import Optimizer, OptimizerConfig
from .state import TrainState, make_init, model_rngs, state_shardings
from .step import empty_window, make_eval_step, make_train_step, several


class TrainerModule(Hooks):
    """Trains one model on one mesh.

    `batch` is an example batch: a tree of arrays or of `jax.ShapeDtypeStruct` with the global batch as first dim. What is
    minimised is `objective.loss`, or an overridden `loss_function`. `num_steps` is the length of a schedule that ends with the run.
    Raises ConfigError where batch, mesh and microbatches, or steps per dispatch and callbacks, do not fit.
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
        check_batch(self.mesh, self.exmp_batch, parts=trainer_config.gradient_accumulate_steps)
        self.model = self.build_model(model_config)
        self.optimizer = self.init_optimizer(optimizer_config)
        self.dataset: Any = None
        self.folder: Path | None = None  # the run directory, in the pipeline
        self.global_step = 0
        self.first_step = True  # no step was dispatched by this object yet
        self._state: TrainState | None = None
        self._train_metric_shapes: Any = None
        self._eval_metric_shapes: Any = None
        self.loggers: list[Any] = []
        self.init_callbacks(trainer_config.callbacks)
        if problem := unheard(trainer_config.steps_per_dispatch, self.callbacks):
            raise ConfigError(problem)
        self.audience, self.desk = Audience(self), Desk(self)
        self.create_jitted_functions()

    # How it is made; a subclass may do any of it otherwise.

    @staticmethod
    def batch_to_input(batch: Any) -> Any:
        """What of a batch the model gets: `batch.inputs`, or `batch["inputs"]`. An objective has its own answer."""
        return batch["inputs"] if isinstance(batch, Mapping) else batch.inputs

    def init_mesh(self, model_config: ModelConfig, mesh: Any = None) -> Any:
        """The given mesh, or one over all devices by the mesh config."""
        return self.mesh_config.build() if mesh is None else mesh

    def build_model(self, model_config: ModelConfig) -> Model:
        """The model of a config."""
        return model_config.build()

    def init_optimizer(self, optimizer_config: OptimizerConfig) -> Optimizer:
        """The optax transformation and schedule of a config."""
        return optimizer_config.build(num_steps=self.num_steps)

    def init_logger(self, logger_config: LoggerConfig | None) -> None:
        """Make the loggers of a config, and the directory they keep files in. None: no logger."""
        self.loggers = []
        if logger_config is not None and logger_config.parts:
            folder = self.log_dir
            if folder is None:
                raise ConfigError("trainer.logger has parts that write files, but no path; set logger.path to a directory")
            folder.mkdir(parents=True, exist_ok=True)
            self.loggers = [cast(Any, part).build(folder) for part in logger_config.parts]

    def init_callbacks(self, callback_configs: Iterable[Any]) -> None:
        """Make the callbacks of their configs; they are told of everything in this order."""
        self.callbacks: list[Callback] = [config.build() for config in callback_configs]

    def get_metric_postprocess_fn(self) -> Callable[[dict[str, Any]], dict[str, Any]]:
        """What is done with host values before anybody sees them. By default nothing; an objective may have its own."""
        return getattr(self.objective, "postprocess", None) or (lambda values: values)

    @staticmethod
    def get_model_rng(rng: Any) -> dict[str, Any]:
        """The keys of the model's initialisation, by name: parameters and dropout."""
        return model_rngs(rng)

    def run_model_init(self, exmp_input: Any, init_rng: Any) -> dict[str, Any]:
        """The model's variables for inputs of the shapes of `exmp_input`."""
        return self.model.init(self.get_model_rng(init_rng), exmp_input)

    def loss_function(self, params: Any, apply_fn: Callable, batch: Any, rng: Any, train: bool = True) -> tuple[Any, tuple[dict, dict]]:
        """`(loss, (metrics, mutable))`: a mean, or a pair (sum, weight) that is divided once for the whole batch.

        `apply_fn` carries the model's mutable collections already; `mutable` are those it returned.
        """
        if self.objective is None:
            raise ConfigError("there is nothing to minimise: pass an objective to the trainer, or override loss_function")
        return self.objective.loss(params, apply_fn, batch, rng, train)

    def create_training_step_function(self) -> Callable:
        """`(state, window, batch, alive) -> (state, window, alive)`, not jitted; see trainer.step."""
        mesh, shapes, c = self.mesh_config, self.shapes, self.trainer_config
        cast = fsdp.make_cast(mesh, shapes.params, getattr(self.model, "cast", lambda params: params))
        exchange = fsdp.make_exchange(mesh, self.mesh, shapes.params, mutable=shapes.mutable)
        return make_train_step(self.loss_function, self.model.apply, self.optimizer, c, cast=cast, exchange=exchange)

    def create_evaluation_step_function(self) -> Callable:
        """`(params, mutable, window, batch) -> window`, not jitted."""
        return make_eval_step(self.loss_function, self.model.apply, self.trainer_config)

    # What it is made of.

    def inputs(self, batch: Any) -> Any:
        """The model's inputs of a batch: the objective's, unless a subclass has its own `batch_to_input`."""
        overridden = type(self).batch_to_input is not TrainerModule.batch_to_input
        return self.batch_to_input(batch) if overridden or self.objective is None else self.objective.inputs(batch)

    @functools.cached_property
    def _init(self) -> Callable[[], TrainState]:
        c, inputs = self.trainer_config, self.inputs(self.exmp_batch)
        return make_init(self.run_model_init, self.optimizer, inputs, seed=c.seed, losses=lambda: spikes.no_losses(c))

    @functools.cached_property
    def shapes(self) -> TrainState:
        """The state as shapes with shardings; nothing is allocated."""
        shapes = jax.eval_shape(self._init)
        params.flatten(shapes)  # what cannot be named in a checkpoint is refused before it is trained
        inputs, small = self.inputs(self.exmp_batch), self.mesh_config.fsdp_min_size
        shardings = state_shardings(self.mesh, shapes, self.model, inputs, optimizer=self.optimizer, fsdp_min_size=small)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings)

    def create_jitted_functions(self) -> None:
        """Make `train_step` and `eval_step`, jitted with the state's shardings unless `trainer_config.debug`."""
        c, evaluation = self.trainer_config, self.create_evaluation_step_function()
        step = several(self.create_training_step_function(), c.steps_per_dispatch, rolled=not c.debug)
        if c.debug:
            self.train_step, self.eval_step = step, evaluation
            return
        state = jax.tree.map(lambda x: x.sharding, self.shapes)
        whole = replicated(self.mesh)
        # Not the window: it is one short vector, and so the empty one can be used again and again.
        self.train_step = jax.jit(step, donate_argnums=(0,) if c.donate_train_state else (), out_shardings=(state, whole, whole))
        self.eval_step = jax.jit(evaluation, out_shardings=whole)

    def init_model(self, exmp_input: Any = None) -> None:
        """Make the state of step 0, each part on the devices that will hold it."""
        shardings = jax.tree.map(lambda x: x.sharding, self.shapes)
        self.state = jax.jit(self._init, out_shardings=shardings)()
        self.global_step = 0

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

    def init_train_metrics(self, batch: Any = None) -> metrics.Window:
        """A logging window that holds no step, on the mesh. Its metrics come from the step; nothing is computed."""
        if self._train_metric_shapes is None or batch is not None:
            found = empty_window(self.create_training_step_function(), self.shapes, batch=self.exmp_batch if batch is None else batch)
            self._train_metric_shapes = jax.device_put(found, replicated(self.mesh))
        return self._train_metric_shapes

    def init_eval_metrics(self, batch: Any = None) -> metrics.Window:
        """The same for an evaluation."""
        if self._eval_metric_shapes is None or batch is not None:
            shapes, step = self.shapes, self.create_evaluation_step_function()
            found = empty_window(step, shapes.params, shapes.mutable, batch=self.exmp_batch if batch is None else batch)
            self._eval_metric_shapes = jax.device_put(found, replicated(self.mesh))
        return self._eval_metric_shapes

    @property
    def window_shapes(self) -> metrics.Window:
        """A logging window as shapes on the mesh."""
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), self.init_train_metrics())

    def put(self, batch: Any) -> Any:
        """A host batch of any number of rows on the mesh, cut over data and fsdp; whole on each device where it does not divide."""
        contract.check_batch_like(batch, self.exmp_batch, rows=False, what="a batch")
        ways = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
        divides = all(x.shape[0] % ways == 0 for x in jax.tree.leaves(batch))
        # A copy: the device may read what it is given when the loader is at the next batch already.
        return jax.device_put(kept(batch), batch_sharding(self.mesh) if divides else replicated(self.mesh))

    @functools.cached_property
    def put_train(self) -> Callable[[Sequence[Any]], Any]:
        """Gives the batches of one dispatch as `train_step` takes them. Raises DataError where one has not the example's shapes."""
        return placer(self.exmp_batch, batch_sharding(self.mesh, stacked=self.trainer_config.steps_per_dispatch > 1))

    def get_num_params(self) -> int:
        """Number of parameters."""
        return params.count(self.shapes.params)

    def tabulate_params(self) -> str:
        """The parameters as a table: path, shape, dtype, sharding, whether weight decay applies, count."""
        from .callbacks.summary import table

        decays = self.optimizer.decays
        return table(self.shapes, params.flatten(decays(self.shapes.params)) if decays else None)

    def set_dataset(self, dataset: Any) -> None:
        """Keep a data set at hand, as `self.dataset`, for overridden methods."""
        self.dataset = dataset

    @property
    def log_dir(self) -> Path | None:
        """Where loggers keep their files and `train_model` its checkpoints: the run directory, or `logger.path`; None: nowhere."""
        path = self.trainer_config.logger and self.trainer_config.logger.path
        return self.folder or (Path(path).expanduser().absolute() if path else None)

    # Training.

    def train_model(
        self,
        train_loader: Any,
        val_loader: Any,
        test_loader: Any = None,
        num_epochs: int | None = None,
        num_train_steps: int | None = None,
        steps_per_epoch: int | None = None,
    ) -> dict[str, dict[str, Any]]:
        """Train until so many epochs or steps are done, earlier ones included; validate on the way, test the best at the end.

        Loaders are any iterables of batches; a dictionary of loaders gives values `<name>_<metric>`. Returns values by
        `val_step_<s>`, `val_epoch_<e>` and `test`. Raises DivergedError, leaving the last good state; ConfigError, DataError.
        """
        plan = fit.make_plan(self, train_loader, num_epochs=num_epochs, num_steps=num_train_steps, per_epoch=steps_per_epoch)
        return fit.fit(self, plan, train_loader=train_loader, val_loader=val_loader, test_loader=test_loader)

    def train_until(
        self,
        step: int,
        batches: Iterable[Any],
        *,
        window: metrics.Window | None = None,
        closes: Callable[[int], bool] = lambda step: False,
        pause: Callable[[int], bool] = lambda step: False,
    ) -> Iterator[loop.Record]:
        """Advance the state to `step` by the batches that follow it: to be iterated, it gives a record for each dispatch.

        `window` is the open logging window (None: one of no step), which ends where `closes` says; nothing is in flight after
        `step` and the steps that `pause` names. `train_model` and the pipeline train by this. Raises DivergedError; DataError
        where there are too few batches; ConfigError where these steps do not fit those of a dispatch, or are more than a schedule has.
        """
        num, borders = self.trainer_config.steps_per_dispatch, {"the step to go on from": self.global_step, "the step to reach": step}
        if problem := misfit(num, borders) or fit.outgrown(self, step):
            raise ConfigError(problem)
        for record in loop.train(
            self.train_step,
            self.state,
            self.init_train_metrics() if window is None else window,
            map(self.put_train, grouped(batches, num)),
            start=self.global_step,
            until=step,
            per_dispatch=num,
            empty=self.init_train_metrics,
            closes=closes,
            pause=pause,
            why=lambda bad, state: spikes.in_words(bad, state.losses, self.trainer_config),
        ):
            self.state, self.global_step, self.first_step = record.state, record.step, False
            yield record

    def tracker(self, iterator: Iterable[Any], **kwargs: Any) -> Iterable[Any]:
        """The iterator, with a progress bar where that is enabled and stderr is a terminal (keywords as of rich's `track`)."""
        return fit.tracked(iterator, enabled=self.trainer_config.enable_progress_bar and jax.process_index() == 0, **kwargs)

    def eval_model(self, data_loader: Any, mode: str, epoch_idx: int) -> dict[str, Any]:
        """Host values over a loader, or over each of a dictionary of them, logged as split `mode` if a training is under way."""
        self.desk.write(mode, self.global_step, values := fit.over_loaders(data_loader, lambda x: self._evaluate(x, mode, epoch_idx)))
        return values

    def _evaluate(self, loader: Any, mode: str, epoch_idx: int) -> dict[str, Any]:
        return self.get_metric_postprocess_fn()(metrics.compute(jax.device_get(self._run_model_eval(loader, mode, epoch_idx))))

    def _run_model_eval(self, data_loader: Any, mode: str = "", epoch_idx: int = -1) -> Any:
        """The window over all batches of one loader, on the device. Raises DataError where there is none."""
        return evaluate.run(self.eval_step, self.weights(self.state), map(self.put, data_loader), empty=self.init_eval_metrics())

    def weights(self, state: TrainState) -> tuple[Any, dict[str, Any]]:
        """(params, mutable) to evaluate with: a schedule-free optimizer trains other parameters than it is judged by."""
        judged = self.optimizer.eval_params
        return (judged(state.opt_state, state.params) if judged else state.params), state.mutable

    def run_evaluation(self, weights: tuple[Any, dict[str, Any]], batches: Iterable[Any]) -> dict[str, float]:
        """Host values over host batches, with any weights (params, mutable); nothing is logged."""
        window = evaluate.run(self.eval_step, weights, map(self.put, batches), empty=self.init_eval_metrics())
        return self.get_metric_postprocess_fn()(metrics.compute(jax.device_get(window)))

    def eval_metrics(self) -> list[str]:
        """The names of the values that an evaluation gives."""
        return sorted(self.get_metric_postprocess_fn()(metrics.compute(jax.device_get(self.init_eval_metrics()))))

    def _eval_model_in_train_loop(self, val_loader: Any, epoch_idx: int) -> dict[str, Any]:
        """A validation between its two hooks."""
        self.on_validation_epoch_start(epoch_idx, self.global_step)
        values = fit.over_loaders(val_loader, lambda loader: self._evaluate(loader, "val", epoch_idx))
        self.on_validation_epoch_end(values, epoch_idx, self.global_step)
        self.desk.write("val", self.global_step, values)
        fit.validate_averages(self, val_loader)
        return values

    def test_model(self, test_loader: Any, apply_callbacks: bool = False, epoch_idx: int = 0) -> dict[str, Any]:
        """Values of the current weights on a test set, with the test hooks if `apply_callbacks`."""
        if apply_callbacks:
            self.on_test_epoch_start(epoch_idx)
        values = fit.over_loaders(test_loader, lambda loader: self._evaluate(loader, "test", epoch_idx))
        if apply_callbacks:
            self.on_test_epoch_end(values, epoch_idx)
        self.desk.write("test", self.global_step, values)
        return values

    def evaluate_per_sample(self, data_loader: Any) -> dict[str, Any]:
        """{metric: (samples,) float32}: the value of each row of the loader's batches, in order, without rows of padding."""
        return fit.over_loaders(data_loader, lambda loader: per_sample.evaluate(self, loader))

    def test_eval_function(self, val_loader: Any) -> None:
        """Trace the evaluation function on shapes, so that a mistake shows before hours of training; no batch is used up."""
        fit.check_evaluation(self, val_loader)

    def log_training_info(
        self, num_epochs: Any, num_train_steps: Any, steps_per_epoch: Any, train_loader: Any, val_loader: Any, test_loader: Any
    ) -> dict[str, Any]:
        """Facts of the training to come, told once to loggers and callbacks; returns them."""
        counts = {"num_epochs": num_epochs, "num_train_steps": num_train_steps, "steps_per_epoch": steps_per_epoch}
        info = fit.training_info(self, train=train_loader, val=val_loader, test=test_loader) | counts
        self.audience.start(info)
        return info

    # Load and restore; see trainer.restore.

    def load_model(self, step_idx: int = -1, raise_if_not_found: bool = True) -> int | None:
        """Load state and logging window of a checkpoint in the log directory: the newest, or that of a step. Returns its step."""
        return restore.load_model(self, step_idx=step_idx, required=raise_if_not_found)

    def load_data_loaders(self, step_idx: int = -1, train_loader: Any = None, val_loader: Any = None, test_loader: Any = None) -> None:
        """Put loaders to their places at a step (the current one, if -1)."""
        restore.load_data_loaders(self, step_idx=step_idx, train=train_loader, val=val_loader, test=test_loader)

    def restore_model(self, state_dict: Mapping[str, Any]) -> None:
        """Take over `params` and, where there, `step`, `opt_state`, `mutable_variables`; the rest of the state stays."""
        restore.restore_model(self, state_dict)

    @staticmethod
    def restore_data_loaders(
        state_dict: Mapping[str, Any], train_loader: Any = None, val_loader: Any = None, test_loader: Any = None
    ) -> None:
        """Put loaders to the places under "train", "val" and "test" of a dictionary."""
        restore.place_loaders(state_dict, train=train_loader, val=val_loader, test=test_loader)

    def load_pretrained_model(
        self,
        checkpoint_path: Any,
        step_idx: int = -1,
        load_best: bool = False,
        load_optimizer: bool = True,
        train_loader: Any = None,
        val_loader: Any = None,
        test_loader: Any = None,
        delete_params_before_loading: bool = True,
    ) -> int:
        """Start from a checkpoint of another run, on this trainer's mesh; returns its step.

        Without the optimizer training begins at step 0 with these weights.
        """
        return restore.load_pretrained(
            self,
            checkpoint_path,
            step_idx=step_idx,
            best=load_best,
            optimizer=load_optimizer,
            loaders={"train": train_loader, "val": val_loader, "test": test_loader},
            delete_first=delete_params_before_loading,
        )

    @classmethod
    def load_from_checkpoint(
        cls, checkpoint: Any, exmp_input: Any = None, batch_size: int = -1, *, trust_code: bool = False
    ) -> "TrainerModule":
        """A trainer with the configs and newest weights of a log or run directory, or an fsspec address; called on TrainerModule, of
        the run's own class. An address that names code which is not ours needs `trust_code`."""
        return restore.load_from_checkpoint(cls, checkpoint, batch=exmp_input, batch_size=batch_size, trust_code=trust_code)
