"""Several steps in one dispatch: what may not fall within one.

Dispatches lie on the absolute multiples of `trainer.steps_per_dispatch`, so that neither bits nor rows depend on where a
life began. Whatever has to happen between two steps must therefore happen at its multiples.
"""

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .callbacks.base import Callback

FIELD = "trainer.steps_per_dispatch"


def misfit(per_dispatch: int, borders: Mapping[str, int | None]) -> str | None:
    """What is wrong with the first of `borders` (in steps, by the name of its setting) that is no multiple; None: nothing is."""
    for name, value in borders.items():
        if value is not None and value % per_dispatch:
            below = value // per_dispatch * per_dispatch
            near = " or ".join(str(n) for n in (below, below + per_dispatch) if n)
            return (
                f"{name} {value} is no multiple of {FIELD} {per_dispatch}, so it would fall within a dispatch; "
                f"set it to {near}, or {FIELD} to {math.gcd(value, per_dispatch)}"
            )
    return None


def unheard(per_dispatch: int, callbacks: Iterable["Callback"]) -> str | None:
    """What is wrong with the first of `callbacks` that has to be told of more steps than the last of each dispatch."""
    for callback in callbacks:
        grid = callback.grid()
        if grid is not None and grid % per_dispatch:
            steps = "every step" if grid == 1 else f"the multiples of {grid}"
            return (
                f"{type(callback).__name__} has to be told of {steps}, but with {FIELD} {per_dispatch} only the last step of a dispatch "
                f"is told; set {FIELD} to {math.gcd(grid, per_dispatch)}, let it count by a multiple of {per_dispatch}, or leave it out"
            )
    return None
