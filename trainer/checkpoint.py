"""Checkpoints of a run: saved by Orbax, made final by a manifest, verified before anything is read.

A commit is a transaction: parameters, optimizer, mutable variables, the open logging window and the loader's place are
one checkpoint, and before its manifest stands nothing of it exists. What a kill left behind is moved away before Orbax
looks, for Orbax would count it.
"""

import json
import logging
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import orbax.checkpoint as ocp

from . import digest, manifest
from .errors import CheckpointError, DamagedError
from .files import fsync
from .manifest import DIGITS, Commit, name_of, steps_in
from .params import digest as sha256_of
from .params import flatten, nested, paths, unflatten
from .state import TrainState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds."""

    state: TrainState
    window: Any  # the open logging window
    meta: dict[str, Any]  # JSON types
    extra: dict[str, Any]  # callbacks' states, as nested dictionaries of host arrays


class Checkpoints:
    """The checkpoints of one run; one writer. `run_dir` holds `checkpoints/` and, where needed, `damaged/`."""

    def __init__(self, run_dir: Path | str, *, device_digest: Literal["sampled", "full", "off"] = "sampled"):
        run_dir = Path(run_dir).absolute()  # Orbax takes absolute paths only, and says so in the background
        self.root, self.damaged = run_dir / "checkpoints", run_dir / "damaged"
        self.root.mkdir(parents=True, exist_ok=True)
        self._saving: int | None = None
        self._device_digest = device_digest
        self._just_verified: set[int] = set()  # steps whose files were read since this was opened; up to the first save or restore
        self._set_aside_what_is_not_whole()
        handlers = {
            "params": ocp.PyTreeCheckpointHandler(use_compression=False),
            "train": ocp.PyTreeCheckpointHandler(use_compression=False),
            "meta": ocp.JsonCheckpointHandler(),
        }
        # No limit on what is kept: Orbax would delete before our manifest exists.
        options = ocp.CheckpointManagerOptions(
            step_name_format=ocp.path.step.standard_name_format(step_format_fixed_length=DIGITS), enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self.root, options=options, item_names=tuple(handlers), item_handlers=handlers)

    def steps(self) -> list[int]:
        """Committed steps, ascending."""
        return [s for s in steps_in(self.root) if s != self._saving]

    def save(self, state: TrainState, window: Any, meta: dict[str, Any], extra: Any = None) -> None:
        """Begin to save; the arrays may be donated once this returns. `finish` makes it final.

        `window` and `extra` (callbacks' states) are trees of arrays, `meta` is of JSON types.

        Raises CheckpointError where a checkpoint of that step stands.
        """
        assert self._saving is None, "a save is under way: finish it first"
        self._just_verified.clear()
        step = int(state.step)
        params, train, held = flatten(state.params, "params"), _train_arrays(state, window), flatten(extra, "extra")
        digests = digest.digests(digest.choose({**params, **train, **held}, step=step, how=self._device_digest))
        args = ocp.args.Composite(
            params=ocp.args.PyTreeSave(state.params),
            train=ocp.args.PyTreeSave({**train, **held}),
            meta=ocp.args.JsonSave({"step": step, "extra": paths(extra), "device_digest": digests, **meta}),
        )
        if not self._manager.save(step, args=args):
            newest = max(self.steps(), default=None)
            raise CheckpointError(f"step {step} cannot be saved: the newest checkpoint is {newest}; roll back to one before {step} first")
        self._saving = step

    def finish(self) -> Commit:
        """Wait for the save under way and commit it. Raises what went wrong in the background."""
        assert self._saving is not None, "nothing is being saved"
        step = self._saving
        self._manager.wait_until_finished()
        folder = self.root / name_of(step)
        crc = manifest.write(folder, step)
        fsync(self.root)
        self._saving = None
        return Commit(step, crc)

    def restore(self, step: int, state: TrainState, window: Any) -> Restored:
        """A committed step, laid out as `state` and `window` (arrays or shapes with shardings).

        Raises DamagedError where the files are damaged, or what comes of them on the devices is not what was there when it was
        saved; CheckpointError where they hold other shapes or dtypes.
        """
        self._check(step)
        like = _train_arrays(state, window)
        saved = _paths_of_extra(json.loads((self.root / name_of(step) / "meta" / "metadata").read_text()))
        train = _restore_args(like)
        train.restore_args.update({path: ocp.RestoreArgs(restore_type=np.ndarray) for path in saved})
        found = self._manager.restore(
            step, args=ocp.args.Composite(params=_restore_args(state.params), train=train, meta=ocp.args.JsonRestore())
        )
        extra = {path: found.train.pop(path) for path in saved}  # a name may have a dot: a path alone does not say how they are nested
        _compare(step, {**flatten(state.params, "params"), **like}, {**flatten(found.params, "params"), **found.train})
        params, flat = owned((found.params, found.train))
        self._check_digests(step, found.meta.get("device_digest", {}), {**flatten(params, "params"), **flat, **extra})
        opt_state, mutable, losses = (unflatten(getattr(state, k), flat, k) for k in ("opt_state", "mutable", "losses"))
        return Restored(
            TrainState(flat["step"], params, opt_state, mutable, losses),
            unflatten(window, flat, "window"),
            found.meta,
            nested((saved[path], x) for path, x in extra.items()),
        )

    def remove(self, steps: list[int]) -> None:
        """Delete checkpoints that nothing keeps."""
        for step in steps:
            gone = self.root / f".trash-{name_of(step)}"
            os.rename(self.root / name_of(step), gone)  # at once: what is half deleted must not look like a checkpoint
            shutil.rmtree(gone)
        if steps:
            self._manager.reload()

    def abandon(self, steps: list[int]) -> None:
        """Move checkpoints that were rolled back to `abandoned/`, where nothing reads them; the newest first."""
        for step in sorted(steps, reverse=True):
            self._move(step, self.root.parent / "abandoned")
        if steps:
            self._manager.reload()

    def newest_whole(self) -> int | None:
        """The newest step whose files are all as its manifest says; damaged ones on the way are set aside with a warning."""
        for step in reversed(self.steps()):
            if wrong := self._problems(step):
                self.set_aside(step, wrong)
            else:
                return step
        return None

    def close(self) -> None:
        """Wait for the background and let go; an unfinished save does not become a checkpoint."""
        try:
            self._manager.close()
        except Exception as e:  # of a save, which `finish` has told already; raised here it would hide the reason
            log.debug("a save did not end well: %s", e)

    def set_aside(self, step: int, wrong: list[str]) -> None:
        """Move a checkpoint that cannot be used to `damaged/`, where nothing reads it."""
        self._set_aside(step, wrong)
        self._manager.reload()

    def _check_digests(self, step: int, saved: dict[str, str], found: dict[str, Any]) -> None:
        now = digest.digests({path: found[path] for path in saved})
        if wrong := [path for path in saved if now[path] != saved[path]]:
            raise DamagedError(
                f"checkpoint {step} gives back other values than the devices held at {', '.join(wrong[:3])}"
                + (f" and {len(wrong) - 3} more arrays" if len(wrong) > 3 else "")
                + ": memory or a disk of this machine may be failing"
            )

    def _check(self, step: int) -> None:
        wrong = self._problems(step)
        self._just_verified.clear()
        if wrong:
            raise DamagedError(f"checkpoint {step} is damaged: {'; '.join(wrong[:3])}; run `everstep verify` for all of it")

    def _problems(self, step: int) -> list[str]:
        """What is wrong with the files of a step. Who opens, looks for the newest and restores it reads them once, not three times."""
        wrong = [] if step in self._just_verified else manifest.problems(self.root / name_of(step), step)
        self._just_verified |= set() if wrong else {step}
        return wrong

    def _set_aside_what_is_not_whole(self) -> None:
        for path in self.root.iterdir():
            if not path.name.isdigit():
                shutil.rmtree(path) if path.is_dir() else path.unlink()  # a save that was cut off
        for step in steps_in(self.root):
            if wrong := self._problems(step):
                self._set_aside(step, wrong)

    def _set_aside(self, step: int, wrong: list[str]) -> None:
        target = self._move(step, self.damaged)
        log.warning("checkpoint %d was set aside in damaged/%s: %s", step, target.name, "; ".join(wrong[:3]))

    def _move(self, step: int, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        n = 1
        while (target := folder / f"{step}-{n}").exists():
            n += 1
        os.rename(self.root / name_of(step), target)
        fsync(self.root)
        return target


def owned(tree: Any) -> Any:
    """A copy of the arrays of `tree` in buffers of their own, laid out alike, which a step can reuse.

    What Orbax or `device_put` made may lie in memory of NumPy's or of another array: donated, it would not be reused, or be lost
    to its other owner.
    """
    return jax.jit(lambda x: x, out_shardings=jax.tree.map(lambda x: x.sharding, tree))(tree)


def _train_arrays(state: TrainState, window: Any) -> dict[str, Any]:
    """All arrays but the parameters, flat: no container of optax or of ours is part of the format."""
    return {
        "step": state.step,
        **flatten(state.opt_state, "opt_state"),
        **flatten(state.mutable, "mutable"),
        **flatten(state.losses, "losses"),
        **flatten(window, "window"),
    }


def _paths_of_extra(meta: dict[str, Any]) -> dict[str, list[str]]:
    """{dotted path: names on it} of what callbacks kept; older checkpoints have the dotted paths alone."""
    found = (names.split(".")[1:] if isinstance(names, str) else names for names in meta.get("extra", []))
    return {f"extra.{'.'.join(names)}".strip("."): names for names in found}


def _restore_args(like: Any) -> ocp.args.PyTreeRestore:
    """Shapes and dtypes as saved, to be compared afterwards; asked for, Orbax would cast and pad without a word."""
    return ocp.args.PyTreeRestore(restore_args=jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding), like))


def _compare(step: int, want: dict[str, Any], found: dict[str, Any]) -> None:
    for path in sorted(want.keys() | found.keys()):
        a, b = want.get(path), found.get(path)
        if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
            have, need = (f"{x.dtype}{list(x.shape)}" if x is not None else "nothing" for x in (b, a))
            raise CheckpointError(f"checkpoint {step} holds {have} at {path}, but the config needs {need}; use the run's own config")


def verify(run_dir: Path | str) -> list[dict[str, Any]]:
    """Every checkpoint of a run, ascending: `step`, `ok`, `problems`, and the digests of what it holds. Changes nothing.

    `params_sha256` and `state_sha256` are taken over restored arrays, so they are equal exactly where the logical values are.
    """
    root = Path(run_dir).absolute() / "checkpoints"
    out = []
    for step in steps_in(root):
        folder = root / name_of(step)
        wrong = manifest.problems(folder, step)
        row: dict[str, Any] = {"step": step, "ok": not wrong, "problems": wrong, "params_sha256": None, "state_sha256": None}
        if not wrong:
            params, rest = (_load(folder / item) for item in ("params", "train"))
            meta = json.loads((folder / "meta" / "metadata").read_text())
            loader = np.frombuffer(json.dumps(meta.get("loader"), sort_keys=True).encode(), np.uint8)
            flat = flatten(params, "params")
            row |= {"params_sha256": sha256_of(flat), "state_sha256": sha256_of({**flat, **rest, "loader": loader})}
        out.append(row)
    return out


def read_weights(run_dir: Path | str, step: int, state: TrainState) -> tuple[Any, dict[str, Any]]:
    """Parameters and mutable variables of a committed step, laid out as `state`; for readers beside a live run: changes nothing.

    Raises CheckpointError where the files are damaged or hold other shapes or dtypes.
    """
    folder = Path(run_dir).absolute() / "checkpoints" / name_of(step)
    if wrong := manifest.problems(folder, step):
        raise CheckpointError(f"checkpoint {step} is damaged: {'; '.join(wrong[:3])}; run `everstep verify` for all of it")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as reader:
        params = reader.restore(folder / "params", args=_restore_args(state.params))
    flat = {k: v for k, v in _load(folder / "train").items() if k.startswith("mutable")} if state.mutable else {}
    like = flatten(state.mutable, "mutable")
    _compare(step, {**flatten(state.params, "params"), **like}, {**flatten(params, "params"), **flat})
    flat = {k: jax.device_put(v, like[k].sharding) for k, v in flat.items()}
    return owned((params, unflatten(state.mutable, flat, "mutable")))


def read_state(run_dir: Path | str, step: int, like: TrainState) -> TrainState:
    """The state of a committed step, laid out as `like`, whatever windows and callbacks were saved beside it. Changes nothing.

    Raises CheckpointError as `read_weights` does.
    """
    params, mutable = read_weights(run_dir, step, like)
    flat = _load(Path(run_dir).absolute() / "checkpoints" / name_of(step) / "train")
    wanted = {"step": like.step, **flatten(like.opt_state, "opt_state")}
    found = {path: flat[path] for path in wanted if path in flat}
    _compare(step, wanted, found)
    placed = owned({path: jax.device_put(x, wanted[path].sharding) for path, x in found.items()})
    losses = like.losses
    if losses is not None:
        saved = flat.get("losses", np.empty(0))  # a run that did not look for spikes, or further back, begins to do so
        losses = owned(
            jax.device_put(saved if saved.shape == losses.shape else np.full(losses.shape, np.inf, losses.dtype), losses.sharding)
        )
    return TrainState(placed["step"], params, unflatten(like.opt_state, placed, "opt_state"), mutable, losses)


def _load(folder: Path) -> Any:
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as reader:
        metadata = reader.metadata(folder).item_metadata.tree
        args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata)
        return reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=args))
