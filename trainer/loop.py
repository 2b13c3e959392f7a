"""The loop: batches in, records of completed steps out.

At most two steps are in flight: while one runs the next is dispatched, and only then is the first one looked at. So the
device never waits for the host, and a step that diverged is noticed one step later, before anything is committed.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from .errors import DivergedError
from .state import TrainState


@dataclass(frozen=True)
class Record:
    """One dispatched step. `state` and `window` are donated to the next one: use them before asking for it."""

    step: int  # completed with this one
    state: TrainState
    window: Any  # the open logging window, empty where one was just closed
    closed: tuple[tuple[int, Any], ...]  # (step, window on the host) of windows that turned out complete
    settled: bool  # nothing is in flight: all windows up to here were given, and `state` may be committed


def train(
    train_step: Callable,
    state: TrainState,
    window: Any,
    batches: Iterator[Any],
    *,
    start: int,
    until: int,
    empty: Callable[[], Any],
    closes: Callable[[int], bool],
    pause: Callable[[int], bool] = lambda step: False,
) -> Iterator[Record]:
    """Steps `start + 1` to `until`, a record each.

    A window closes at the steps that `closes` names; `empty()` makes the next, laid out like the first. What is in flight is
    settled at `until` and wherever `pause(step)` says so. Raises DivergedError with the step whose loss or gradients were not
    finite, and the state before it.
    """
    alive: Any = jax.device_put(np.array(True), jax.tree.leaves(window)[0].sharding)
    flying: deque[tuple[int, Any, Any]] = deque()

    def settle(leave: int) -> tuple[tuple[int, Any], ...]:
        closed = []
        while len(flying) > leave:
            step, ok, full = flying.popleft()
            if not ok:  # waits for that step
                raise DivergedError(
                    f"loss or gradients of step {step} are not finite; lower the learning rate or look at the data", step=step, state=state
                )
            if full is not None:
                closed.append((step, jax.device_get(full)))
        return tuple(closed)

    for step in range(start + 1, until + 1):
        state, window, alive = train_step(state, window, next(batches), alive)
        closing = closes(step)
        flying.append((step, alive, window if closing else None))
        if closing:
            window = empty()
        settled = step == until or pause(step)
        yield Record(step, state, window, settle(leave=0 if settled else 1), settled)
