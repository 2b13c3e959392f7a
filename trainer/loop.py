"""The loop: batches in, records of completed steps out.

At most two steps are in flight: while one runs the next is dispatched, and only then is the first one looked at. So the
device never waits for the host, and a step that diverged is noticed one step later, before anything is committed.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from .errors import DataError, DivergedError
from .metrics import Window
from .state import TrainState


class Record(NamedTuple):
    """One dispatch. `state` is donated to the next one: use it before asking for it."""

    step: int  # completed with this dispatch
    state: TrainState
    window: Window  # the open logging window, empty where one was just closed
    closed: tuple[tuple[int, Window], ...]  # (step, window on the host) of windows that turned out complete
    settled: bool  # nothing is in flight: all windows up to here were given, and `state` may be committed

    def before(self) -> tuple[tuple[int, Window], ...]:
        """Windows of earlier steps. Told before this step is, and its own after it, rows and steps come in one order in every life."""
        return tuple(one for one in self.closed if one[0] < self.step)

    def own(self) -> tuple[tuple[int, Window], ...]:
        """The window that closed with this very step, if it did and the step is settled."""
        return tuple(one for one in self.closed if one[0] == self.step)


def train(
    train_step: Callable,
    state: TrainState,
    window: Window,
    batches: Iterator[Any],
    *,
    start: int,
    until: int,
    empty: Callable[[], Window],
    closes: Callable[[int], bool],
    pause: Callable[[int], bool] = lambda step: False,
    per_dispatch: int = 1,
    why: Callable[[int, TrainState], str] = lambda step, state: f"loss or gradients of step {step} are not finite",
) -> Iterator[Record]:
    """Steps `start + 1` to `until`, a record for each dispatch of `per_dispatch` of them, all borders being its multiples.

    A window closes at the steps that `closes` names; `empty()` is the next, laid out like the first. What is in flight is
    settled at `until` and wherever `pause(step)` says so. Raises DivergedError with the step that was refused, for loss or gradients
    were not finite or a spike, what `why` says of it, and the state before it; DataError where the batches run dry.
    """
    assert start % per_dispatch == until % per_dispatch == 0, f"steps {start} to {until} do not lie on multiples of {per_dispatch}"
    alive: Any = jax.device_put(np.array(True), window.values.sharding)
    flying: deque[tuple[int, Any, Window | None]] = deque()

    def settle(leave: int) -> tuple[tuple[int, Window], ...]:
        closed = []
        while len(flying) > leave:
            step, ok, full = flying.popleft()
            if not np.asarray(ok):  # waits for that dispatch; bool(ok) would take eight times as long
                bad = int(state.step) + 1  # from the bad step on nothing was changed, whatever was in flight
                raise DivergedError(why(bad, state), step=bad, state=state)
            if full is not None:
                closed.append((step, full.on_host()))
        return tuple(closed)

    for step in range(start + per_dispatch, until + 1, per_dispatch):
        if (batch := next(batches, None)) is None:
            raise DataError(f"there is no batch for step {int(state.step) + 1}, and {until} is to be reached; give batches without end")
        state, window, alive = train_step(state, window, batch, alive)
        full = window if closes(step) else None
        if full is not None:
            full.values.copy_to_host_async()
            window = empty()
        flying.append((step, alive, full))
        settled = step == until or pause(step)
        yield Record(step, state, window, settle(leave=0 if settled else 1), settled)
