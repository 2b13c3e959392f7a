"""How fast a training is: seconds per step, tokens per second, and what share of the devices' peak the model makes use of.

Only the loop is timed. Where nothing is in flight (a validation, a commit) the time until the next step does not count.
Otherwise one step is in flight, and the device works on behind the host's back: then it counts, but as no more than a step.
"""

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax

from . import metrics

if TYPE_CHECKING:
    from .loop import Record
    from .module import TrainerModule

# bfloat16 products per second and device, without sparsity, as the makers state them, by what `device_kind` has in it. The
# first that fits counts.
PEAKS = (
    (r"H100 PCIe", 756e12),
    (r"H100 NVL", 835e12),
    (r"H[12]00\b", 989.4e12),  # SXM
    (r"B200\b", 2250e12),
    (r"A100\b", 312e12),
    (r"L40S\b", 362e12),
    (r"L4\b", 121e12),
    (r"TPU v6", 918e12),
    (r"TPU v5 ?(lite|e)", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v4$", 275e12),
)


def peak_flops(device_kind: str, *, dtype: str) -> float | None:
    """Floating point operations per second of one device; None where the kind is not known or `dtype` is not bfloat16.

    In float32 the peak depends on what the backend makes of a product (float32, TF32, passes of bfloat16), which a config does
    not say.
    """
    return next((peak for kind, peak in PEAKS if dtype == "bfloat16" and re.search(kind, device_kind)), None)


class Stopwatch:
    """Times the steps after `step`; `tokens` were in the open window already. `peak` is that of all devices together."""

    def __init__(
        self,
        *,
        step: int,
        tokens: float = 0.0,
        flops_per_token: float | None = None,
        peak: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.step = step  # last dispatched
        self._done = self._timed = self._row = step  # last completed; up to which time was read; of the last row
        self._tokens, self._clock = tokens, clock
        self._flops_share = flops_per_token / peak if flops_per_token and peak else None
        self._loop = self._step_s = 0.0
        self._between: list[float] = []

    def watch(self, records: "Iterable[Record]") -> "Iterator[Record]":
        """The same records; what happens until the next one is asked for is between steps."""
        records, began, first = iter(records), self._clock(), True
        while (record := next(records, None)) is not None:
            if record.settled or not first:  # the first dispatch may have compiled the step
                self._loop += self._clock() - began
            self._done, self.step, first = record.step if record.settled else self.step, record.step, False
            handed = self._clock()
            yield record
            began = self._clock()
            if not record.settled:
                self._between.append(began - handed)
            if len(self._between) == 1000:  # so that rows far apart do not gather without end
                self._loop, self._between = step_seconds(self._loop, self._between, self._since) * self._since, []

    @property
    def _since(self) -> int:
        return self._done - self._timed

    def row(self, step: int, values: Mapping[str, float]) -> dict[str, float]:
        """`time_step_s`, `throughput_tokens_per_s` where there is `tokens_sum`, and `mfu` where peak and FLOPs are known.

        `mfu` is the model FLOPs utilisation of PaLM (arXiv 2204.02311, appendix B): the tokens per second that were seen, times
        the FLOPs that the model needs for one of them, over the peak. Padding is no token and recomputation is not needed, so
        both lower it.
        """
        if self._since:  # otherwise another row came with the same record: they share its time
            self._step_s = max(step_seconds(self._loop, self._between, self._since), 1e-9)
            self._timed, self._loop, self._between = self._done, 0.0, []
        steps, self._row = step - self._row, step
        out = {"time_step_s": round(self._step_s, 6)}
        if "tokens_sum" in values:
            rate = (values["tokens_sum"] - self._tokens) / (max(1, steps) * self._step_s)
            out["throughput_tokens_per_s"] = round(rate, 1)
            if self._flops_share:
                out["mfu"] = round(rate * self._flops_share, 4)
        self._tokens = 0.0
        return out


def step_seconds(loop: float, between: Sequence[float], steps: int) -> float:
    """Seconds per step, of `loop` seconds in the loop and what was `between` steps, where each counts as no more than a step."""
    total, left = loop + sum(between), steps
    for pause in sorted(between, reverse=True):
        if left == 1 or pause <= total / left:
            break
        total, left = total - pause, left - 1  # it is a step, as long as the others turn out to be
    return total / left


def stopwatch(trainer: "TrainerModule", windows: Iterable[Any], *, step: int) -> Stopwatch:
    """One for the steps after `step`; `windows` are the open ones of the row to come."""
    held = (metrics.compute(jax.device_get(w)).get("tokens_sum", 0.0) for w in windows)
    config, mesh = trainer.model_config, trainer.mesh
    inputs = jax.tree.leaves(trainer.inputs(trainer.exmp_batch))[0]
    peak = peak_flops(mesh.devices.flat[0].device_kind, dtype=getattr(config, "dtype", "float32"))
    return Stopwatch(
        step=step,
        tokens=sum(held),
        flops_per_token=config.flops_per_token(inputs.shape[1]) if len(inputs.shape) > 1 else None,
        peak=peak * mesh.size if peak else None,
    )
