"""A table of the parameters, and what a train step takes of a device's memory.

`table` needs shapes only, so it can be shown before anything is allocated; the memory is the compiler's own count.
"""

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from ..params import flatten
from .base import NOTHING, Answer, Callback, CallbackPartConfig, Moment

if TYPE_CHECKING:
    from ..state import TrainState

log = logging.getLogger(__name__)
HEADER = ("parameter", "shape", "dtype", "sharding", "decay", "count")


class SummaryConfig(CallbackPartConfig):
    """Nothing to choose."""

    kind: Literal["summary"] = "summary"

    def build(self) -> "Summary":
        """The callback."""
        return Summary()


class Summary(Callback):
    """Logs the table at the start of each life, on process 0, and the memory, for which the step is compiled then instead of later."""

    asks = ("decays", "step_memory")

    def on_training_start(self, moment: Moment) -> Answer:
        """Log it."""
        import jax

        if moment.state is not None and jax.process_index() == 0:
            log.info("parameters:\n%s", table(moment.state, moment.info.get("decays")))
            if memory := moment.info.get("step_memory"):
                log.info("a step takes %s of a device: %s", _size(memory["peak"]), ", ".join(f"{k} {_size(v)}" for k, v in memory.items()))
        return NOTHING


def table(state: "TrainState", decays: Mapping[str, bool] | None = None) -> str:
    """A line per parameter of `state` (arrays or shapes with shardings), in the tree's order, and a last one with their total.

    The sharding is a mesh axis or "-" per dim; "whole" is a parameter that every device has all of. `decays` says by path
    whether weight decay applies; "?" where nobody knows.
    """
    flat = flatten(state.params)
    known = {None: "?", True: "yes", False: "no"}
    rows = [(p, _dims(x.shape), str(x.dtype), _cut(x), known[(decays or {}).get(p)], f"{x.size:,}") for p, x in flat.items()]
    total = ("total", "", "", "", "", f"{sum(x.size for x in flat.values()):,}")
    lines = [HEADER, *rows, total]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: tuple[str, ...], widths: list[int]) -> str:
    left = [cell.ljust(width) for cell, width in zip(cells[:-1], widths[:-1], strict=True)]
    return "  ".join([*left, cells[-1].rjust(widths[-1])])


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _dims(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape)) or "scalar"


def _cut(x: Any) -> str:
    sharding = getattr(x, "sharding", None)
    if sharding is None or sharding.is_fully_replicated:
        return "whole"
    axes = ["-" if a is None else a if isinstance(a, str) else "+".join(a) for a in getattr(sharding, "spec", ())]
    return ", ".join([*axes, *["-"] * (len(x.shape) - len(axes))])
