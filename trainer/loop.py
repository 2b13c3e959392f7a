"""The loop: batches in, records of completed steps out.

At most two steps are in flight: while one runs the next is dispatched, and only then is the first one looked at. So the
device never waits for the host, and a step that diverged is noticed one step later, before anything is committed.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import jax

from . import metrics
from .errors import DivergedError
from .state import TrainState


@dataclass(frozen=True)
class Record:
    """One dispatched step. `state` and `window` are donated to the next one: use them before asking for it."""

    step: int  # completed with this one
    state: TrainState
    window: Any  # the open logging window, empty where a row was just closed
    rows: tuple[tuple[int, dict[str, float]], ...]  # (step, values) of windows that turned out complete
    settled: bool  # nothing is in flight: all rows up to here were given, and `state` may be committed


def train(
    train_step: Callable,
    state: TrainState,
    window: Any,
    batches: Iterator[Any],
    *,
    start: int,
    until: int,
    log_every: int,
    last: int,
    pause: Callable[[int], bool] = lambda step: False,
) -> Iterator[Record]:
    """Steps `start + 1` to `until`, a record each.

    A window closes at the multiples of `log_every` and at step `last` of the run. What is in flight is settled at `until` and
    wherever `pause(step)` says so. Raises DivergedError with the step whose loss or gradients were not finite.
    """
    empty = metrics.identity(window)
    flying: deque[tuple[int, Any, Any]] = deque()

    def settle(leave: int) -> tuple[tuple[int, dict[str, float]], ...]:
        rows = []
        while len(flying) > leave:
            step, ok, closed = flying.popleft()
            if not ok:  # waits for that step
                raise DivergedError(
                    f"loss or gradients of step {step} are not finite; lower the learning rate or look at the data", step=step
                )
            if closed is not None:
                rows.append((step, metrics.compute(jax.device_get(closed))))
        return tuple(rows)

    for step in range(start + 1, until + 1):
        state, window, ok = train_step(state, window, next(batches))
        closes = step % log_every == 0 or step == last
        flying.append((step, ok, window if closes else None))
        if closes:
            window = jax.tree.map(lambda x: x.copy(), empty)  # the step may donate its window
        settled = step == until or pause(step)
        yield Record(step, state, window, settle(leave=0 if settled else 1), settled)
