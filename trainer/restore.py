"""Loading: a trainer's own checkpoints, another run's weights, a whole trainer from a directory."""

import importlib
import json
import logging
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from . import manifest
from .checkpoint import owned, read_state, read_weights
from .config import load_object
from .errors import CheckpointError, ConfigError, DamagedError, StorageError
from .feed import has_state
from .files import write_atomic
from .mesh import MeshConfig, replicated
from .retention import best_step
from .spikes import no_losses
from .state import TrainState

if TYPE_CHECKING:
    from .module import TrainerModule

log = logging.getLogger(__name__)

HYPERPARAMETERS = "trainer.json"


def state_to_evaluate(trainer: "TrainerModule", folder: Path, step: int) -> TrainState:
    """The state of a committed step, to evaluate with: its statistics are None save for a schedule-free optimizer, which needs them.

    They are most of a state, and there may be no room for them beside the trained one.
    """
    if trainer.optimizer.eval_params:
        return read_state(folder, step, trainer.shapes)
    params, mutable = read_weights(folder, step, trainer.shapes)
    return TrainState(jax.device_put(np.int32(step), replicated(trainer.mesh)), params, None, mutable)


def load_model(trainer: "TrainerModule", *, step_idx: int, required: bool) -> int | None:
    """Restore state, windows and callbacks of a checkpoint in the log directory; its step, or None where there is none."""
    store = trainer.desk.store
    step = store.newest_whole() if step_idx == -1 else step_idx
    if step is None or step not in store.steps():
        what = f"no checkpoint of step {step_idx}" if step_idx != -1 else "no checkpoint"
        message = f"{what} in {store.root}; there are {store.steps() or 'none'}"
        if required:
            raise CheckpointError(message)
        log.warning("%s", message)
        return None
    desk = trainer.desk
    desk.reset_windows()
    like = jax.device_put({"open": desk.window, "row": desk.pieces.row, "epoch": desk.pieces.epoch}, replicated(trainer.mesh))
    try:
        found = store.restore(step, trainer.shapes, like)
    except DamagedError as e:
        if step_idx != -1:
            raise
        store.set_aside(step, [str(e)])
        return load_model(trainer, step_idx=-1, required=required)
    windows = found.window
    trainer.state, trainer.global_step = found.state, step
    desk.window = windows["open"]
    desk.pieces.row, desk.pieces.epoch = (jax.device_get(windows[k]) for k in ("row", "epoch"))
    desk.val_rows = [(at, values) for at, values in found.meta.get("val_rows", [])]
    trainer.audience.set_state(found.extra)
    return step


def load_data_loaders(trainer: "TrainerModule", *, step_idx: int, train: Any, val: Any, test: Any) -> None:
    """Put loaders to the places that the checkpoint of a step has for them."""
    step = trainer.global_step if step_idx == -1 else step_idx
    places = _meta(trainer.desk.store.root, step)["loader"]
    place_loaders(places, train=train, val=val, test=test)
    if train is not None and "train" in places:
        trainer.desk.place(train)


def place_loaders(places: Mapping[str, Any], **loaders: Any) -> None:
    """Put each loader to its place of the same name; one without a place, or that cannot go there, is told."""
    for name, loader in loaders.items():
        if loader is None:
            continue
        if has_state(loader) and places.get(name) is not None:
            loader.set_state(places[name])
        else:
            log.warning("the %s loader stays where it is: %s", name, "it has no set_state" if places.get(name) else "no place was saved")


def restore_model(trainer: "TrainerModule", found: Mapping[str, Any]) -> None:
    """Take over what a dictionary holds of a state; shapes and dtypes must be the trainer's."""
    shapes = trainer.shapes
    state = trainer.state
    names = {"params": "params", "opt_state": "opt_state", "mutable_variables": "mutable", "step": "step"}
    changes: dict[str, Any] = {}
    for name, field in names.items():
        if name in found:
            like = getattr(shapes, field)
            given = found[name] if field != "step" else np.asarray(found[name], np.int32)
            _compare_tree(name, like, given)
            changes[field] = owned(jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), given, like))
    trainer.state = state.replace(**changes)
    trainer.global_step = int(trainer.state.step)


def _compare_tree(name: str, like: Any, given: Any) -> None:
    if str(jax.tree.structure(like)) != str(jax.tree.structure(given)):
        raise CheckpointError(f"{name} of the dictionary has another structure than the trainer's; use the same model config")
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(like), jax.tree.leaves(given), strict=True):
        if a.shape != np.shape(b) or a.dtype != np.asarray(b).dtype:
            where = jax.tree_util.keystr(path)
            raise CheckpointError(f"{name}{where} is {np.asarray(b).dtype}{list(np.shape(b))}, the trainer's is {a.dtype}{list(a.shape)}")


def load_pretrained(
    trainer: "TrainerModule", path: Any, *, step_idx: int, best: bool, optimizer: bool, loaders: Mapping[str, Any], delete_first: bool
) -> int:
    """Weights of another run, and with `optimizer` all of its state, on this trainer's mesh; returns the step they are of."""
    folder = fetch(path)
    steps = manifest.steps_in(folder / "checkpoints")
    step = step_idx if step_idx != -1 else _best(folder, steps) if best else (steps[-1] if steps else -1)
    if step not in steps:
        raise CheckpointError(f"no checkpoint of step {step} in {path}; there are {steps or 'none'}")
    if delete_first and trainer._state is not None:
        jax.tree.map(lambda x: x.delete(), trainer.state.params)
        trainer.state = None  # it is made or restored when it is next asked for
    if optimizer:
        trainer.state, trainer.global_step = read_state(folder, step, trainer.shapes), step
    else:
        params, mutable = read_weights(folder, step, trainer.shapes)
        trainer.state = _begun_at(trainer, params, mutable)
        trainer.global_step = 0  # weights without statistics are where a training begins
    trainer.desk.reset_windows()
    place_loaders(_meta(folder / "checkpoints", step)["loader"], **{k: v for k, v in loaders.items() if v is not None})
    return step


def _begun_at(trainer: "TrainerModule", params: Any, mutable: Any) -> TrainState:
    """The state of step 0 with these weights. Statistics are begun with them too: some optimizers hold parameters of their own."""
    shardings = jax.tree.map(lambda x: x.sharding, trainer.shapes)
    begin = jax.jit(
        lambda params, mutable: TrainState(
            jnp.zeros((), jnp.int32), params, trainer.optimizer.tx.init(params), mutable, no_losses(trainer.trainer_config)
        ),
        out_shardings=shardings,
    )
    return begin(params, mutable)


def _best(folder: Path, steps: list[int]) -> int:
    from . import rows
    from .retention import CheckpointConfig

    kept = _hyperparameters(folder)
    config = CheckpointConfig.model_validate(kept.get("checkpoint", {}))
    found = _meta(folder / "checkpoints", steps[-1]).get("val_rows") if steps else None
    if found is None:
        found = [[r["step"], rows.values_of(r)] for r in rows.read(folder / "metrics.jsonl") if r["split"] == "val"]
    step = best_step(((at, values) for at, values in found), config)
    if step is None:
        raise CheckpointError(f"{folder} has no validation with a finite {config.monitor!r}, so none of its checkpoints is the best")
    return step


def write_hyperparameters(trainer: "TrainerModule") -> None:
    """Write what makes a trainer like this one, as JSON, into its log directory."""
    folder = trainer.log_dir
    assert folder is not None
    folder.mkdir(parents=True, exist_ok=True)
    leaves, _ = jax.tree_util.tree_flatten_with_path(trainer.exmp_batch)
    configs = {"trainer": trainer.trainer_config, "model": trainer.model_config, "optimizer": trainer.optimizer_config}
    data = {
        "class": f"{type(trainer).__module__}:{type(trainer).__qualname__}",
        "configs": {k: {"class": f"{type(c).__module__}:{type(c).__qualname__}", "value": c.to_dict()} for k, c in configs.items()},
        "mesh": trainer.mesh_config.to_dict(),
        "checkpoint": trainer.desk.checkpoints.to_dict(),
        "num_steps": trainer.num_steps,
        "batch": {jax.tree_util.keystr(path): [list(x.shape), str(x.dtype)] for path, x in leaves},
    }
    write_atomic(folder / HYPERPARAMETERS, json.dumps(data, indent=2).encode())


def _hyperparameters(folder: Path) -> dict[str, Any]:
    """What makes the trainer of a directory: of train_model, or of the pipeline."""
    for name in (HYPERPARAMETERS, "config.json"):
        if (folder / name).exists():
            return json.loads((folder / name).read_text())
    return {}


def load_from_checkpoint(cls: type["TrainerModule"], checkpoint: Any, *, batch: Any, batch_size: int, trust_code: bool) -> "TrainerModule":
    """A trainer with the configs of a directory and its newest weights, on the devices that are here."""
    from .assemble import trainer_class
    from .module import TrainerModule

    folder = fetch(checkpoint)
    found = _hyperparameters(folder)
    if not found:
        raise CheckpointError(f"{checkpoint} has neither {HYPERPARAMETERS} nor config.json: it is no directory of a training")
    if "://" in str(checkpoint) and not trust_code and (foreign := sorted(set(_foreign_code(found.get("configs", found))))):
        raise ConfigError(f"{checkpoint} names code that is not ours and would be run: {', '.join(foreign)}; allow it by trust_code=True")
    configs, more = _of_train_model(found, batch) if "configs" in found else _of_a_run(found, batch)
    if batch_size > 0:
        more["batch"] = jax.tree.map(lambda x: jax.ShapeDtypeStruct((batch_size, *x.shape[1:]), x.dtype), more["batch"])
    logger = configs["trainer_config"].logger
    if logger is not None and logger.path:  # it may have been moved here
        configs["trainer_config"] = configs["trainer_config"].replace(logger=logger.replace(path=str(folder)))
    if cls is TrainerModule:
        cls = trainer_class(configs["trainer_config"])
    mesh = MeshConfig.model_validate(found["mesh"]).fitting(jax.device_count())
    trainer = cls(**configs, **more, mesh_config=mesh, num_steps=found["num_steps"])
    load_pretrained(trainer, folder, step_idx=-1, best=False, optimizer=True, loaders={}, delete_first=False)
    return trainer


def _foreign_code(data: Any) -> Iterator[str]:
    """The import paths in what was kept of a trainer, save for those of this package."""
    for key, value in data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ():
        if key in ("kind", "class") and isinstance(value, str) and ":" in value and not value.startswith("trainer."):
            yield value
        yield from _foreign_code(value)


def _of_train_model(found: dict[str, Any], batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The three configs that `write_hyperparameters` wrote, and what else makes a trainer."""
    configs = {f"{k}_config": load_object(c["class"]).model_validate(c["value"]) for k, c in found["configs"].items()}
    return configs, {"batch": _batch(found["batch"]) if batch is None else batch}


def _of_a_run(found: dict[str, Any], batch: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same of a pipeline's config."""
    from .assemble import TrainingConfig, example_batch

    data = {k: found["data"][k] for k in ("kind", "seq_len", "batch_size")}
    parts = {k: found[k] for k in TrainingConfig.model_fields if k in found}
    config = TrainingConfig.model_validate({**parts, "data": data, "config_digest": ""})
    configs = {"trainer_config": config.trainer, "model_config": config.model, "optimizer_config": config.optimizer}
    return configs, {"batch": example_batch(config.data) if batch is None else batch, "objective": config.objective.build()}


def _batch(kept: Mapping[str, Any]) -> Any:
    """The example batch from its kept leaves; batches of other kinds than dictionaries are handed in."""
    out: dict[str, Any] = {}
    for path, (shape, dtype) in kept.items():
        names = [p.strip("'\"") for p in path.strip("[]").split("][")]
        place = out
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = jax.ShapeDtypeStruct(tuple(shape), np.dtype(dtype))
    return out


def _meta(root: Path, step: int) -> dict[str, Any]:
    return json.loads((root / manifest.name_of(step) / "meta" / "metadata").read_text())


def fetch(path: Any) -> Path:
    """A directory on this machine: itself, or a copy of what an fsspec address holds, which lives as long as the process."""
    if "://" not in str(path):
        return Path(path).expanduser().absolute()
    fsspec = importlib.import_module("fsspec")
    target = tempfile.mkdtemp(prefix="everstep-")
    try:
        fs, inner = fsspec.core.url_to_fs(str(path))
        fs.get(inner.rstrip("/") + "/", target, recursive=True)
    except Exception as e:
        raise StorageError(f"{path} cannot be read: {e}") from e
    return Path(target)
