"""Batches of a training loader of any kind, epoch after epoch, from any step on.

Three kinds are told apart. A loader with `get_state` and `set_state` says where it stands, and is put there when training
goes on. One that can be iterated again is begun anew for each pass, and when training goes on in mid-epoch, what was
trained is read past. An iterator that can only be used once cannot go back, and says so when that would matter.
"""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .contract import check_batch_like
from .errors import DataError

log = logging.getLogger(__name__)


def has_state(loader: Any) -> bool:
    """Whether a loader can say where it stands and go there."""
    return callable(getattr(loader, "get_state", None)) and callable(getattr(loader, "set_state", None))


def length(loader: Any) -> int | None:
    """The number of batches of a pass, where the loader knows it."""
    try:
        return len(loader)
    except TypeError:
        return None


class Feed:
    """`next` gives the batch of the next step; `get_state` is the loader's place after the last one given, if it has one.

    `steps_per_epoch` cuts a pass that is longer; one that is shorter is begun again within the epoch. None: a pass is as long
    as it is. Raises DataError where a loader has run dry.
    """

    def __init__(self, loader: Any, *, step: int, steps_per_epoch: int | None, restored: bool = False):
        self._loader, self._per_epoch = loader, steps_per_epoch
        self._step = step
        self._in_pass = 0
        self._batches: Iterator[Any] | None = None
        if restored or not step:
            return
        if has_state(loader):
            raise DataError(
                f"the loader of step {step} was not put back to its place; call load_data_loaders, or give a loader without get_state"
            )
        if self._once():
            raise DataError(
                f"training goes on at step {step}, but the loader is an iterator that begins at its first batch; "
                "give one that can be iterated again, or that has get_state and set_state"
            )
        behind = step % steps_per_epoch if steps_per_epoch else step
        log.info("reading past %d batches of the loader, which were trained before step %d", behind, step)
        for _ in range(behind):
            self._take()

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        if self._per_epoch and self._step % self._per_epoch == 0 and not has_state(self._loader) and not self._once():
            self._batches = None  # each epoch begins with the loader's first batch
        batch = self._take()
        self._step += 1
        return batch

    def get_state(self) -> Any:
        """The loader's own state, in JSON terms; None where it has none."""
        return self._loader.get_state() if has_state(self._loader) else None

    def _once(self) -> bool:
        return iter(self._loader) is self._loader if not hasattr(self._loader, "__len__") else False

    def _take(self) -> Any:
        if self._batches is None:
            self._batches, self._in_pass = iter(self._loader), 0
        try:
            batch = next(self._batches)
        except StopIteration:
            if not self._in_pass or (self._once() and not has_state(self._loader)):
                why = "it is an iterator that can be used once; give one that can be iterated again" if self._in_pass else "it is empty"
                raise DataError(f"the training loader has no batch for step {self._step + 1}: {why}") from None
            self._batches, self._in_pass = iter(self._loader), 0
            return self._take()
        self._in_pass += 1
        return batch


def grouped(batches: Iterable[Any], num: int) -> Iterator[tuple[Any, ...]]:
    """The batches of each dispatch of `num` steps; none is taken before its dispatch is asked for, and a rest too small for one is none."""
    iterator = map(kept, batches) if num > 1 else iter(batches)
    while len(group := tuple(itertools.islice(iterator, num))) == num:
        yield group


def kept(batch: Any) -> Any:
    """A copy, which a loader that fills its arrays anew for the next batch leaves alone."""
    return jax.tree.map(lambda x: x.copy() if isinstance(x, np.ndarray) else x, batch)


def _flatten(tree: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(tree)


def placer(example: Any, sharding: Any) -> Callable[[Sequence[Any]], Any]:
    """Lays batches like `example` (arrays or shapes) out as `sharding` says: the only one, or all stacked along a new first dim.

    What lies as it should stays as it is. To a single device the step itself moves arrays of the host, quicker than `device_put`.
    Of what a loader may fill anew while the step is running, the step gets a copy. Raises DataError where a batch has other shapes
    than the example: they would compile another step.
    """
    known, wanted = _flatten(example)
    kinds = [(x.shape, x.dtype) for x in known]
    alone = sharding.num_devices == 1
    lone_cpu = alone and jax.default_backend() == "cpu"

    def leaves_of(batch: Any) -> list[Any]:
        leaves, structure = _flatten(batch)
        if structure != wanted or [(getattr(x, "shape", None), getattr(x, "dtype", None)) for x in leaves] != kinds:
            check_batch_like(batch, example, rows=True, what="a training batch")
        return leaves

    def one(*found: Any) -> Any:
        if not all(isinstance(x, np.ndarray) for x in found):
            x = jnp.stack(found) if len(found) > 1 else found[0]
            return x if getattr(x, "sharding", None) == sharding else jax.device_put(x, sharding)
        if len(found) > 1:
            x = np.stack(found)
        elif lone_cpu and found[0].ctypes.data % 64:
            x = found[0]  # a CPU copies what is not aligned before the call returns; the rest it would read where it lies
        else:
            x = found[0].copy()
        return x if alone else jax.device_put(x, sharding)

    return lambda batches: wanted.unflatten(map(one, *map(leaves_of, batches)))
