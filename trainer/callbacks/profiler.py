"""A trace of a few steps by jax.profiler, for XProf, TensorBoard or Perfetto.

What is traced is a range of absolute steps, once: a life that begins within the range traces what is left of it, and a trace
that is there already, of this life or of one before, is left alone. With several steps per dispatch the range is widened to
whole dispatches, or where it falls within one, moved on to the next.
"""

import logging
from pathlib import Path
from typing import Literal

from pydantic import Field

from .base import NOTHING, Answer, Callback, CallbackPartConfig, Moment

log = logging.getLogger(__name__)


class ProfilerConfig(CallbackPartConfig):
    """Which steps to trace, and where the trace goes."""

    kind: Literal["profiler"] = "profiler"
    first_step: int = Field(10, ge=1)  # counted as completed steps are; the first of a life also holds its compilation
    num_steps: int = Field(5, ge=1)
    path: str = Field("profile", min_length=1)  # a folder; relative to the run directory, or without one to the working directory

    def build(self) -> "Profiler":
        """The callback, not yet tracing."""
        return Profiler(self)


class Profiler(Callback):
    """Waits for the device at both borders of the range, so that the trace holds its steps and no others."""

    def __init__(self, config: ProfilerConfig):
        self.config = config
        self._last = config.first_step + config.num_steps - 1
        self._path = Path(config.path)
        self._status: Literal["waiting", "tracing", "done"] = "waiting"

    def on_training_start(self, moment: Moment) -> Answer:
        """Find the place; begin where the next step is one to trace."""
        self._path = Path(moment.info.get("run_dir") or "") / self.config.path
        if moment.step >= self._last:
            self._status = "done"
        self._begin_or_end(moment)
        return NOTHING

    def on_training_step(self, moment: Moment) -> Answer:
        """Begin or end where the range does."""
        self._begin_or_end(moment)
        return NOTHING

    def finalize(self, status: str) -> None:
        """End a trace that was cut off; what was traced is kept."""
        if self._status == "tracing":
            self._end("cut off")

    def _begin_or_end(self, moment: Moment) -> None:
        if self._status == "tracing" and moment.step >= self._last:
            _wait_for(moment)
            self._end(f"up to step {moment.step}")
        elif self._status == "waiting" and moment.step >= self.config.first_step - 1:
            self._begin(moment)

    def _begin(self, moment: Moment) -> None:
        import jax

        self._status = "done"
        if any(self._path.glob("plugins/profile/*/*.xplane.pb")):
            log.info("profiled nothing: there is a trace in %s already; remove it to have another", self._path)
            return
        _wait_for(moment)
        try:
            jax.profiler.start_trace(self._path)
        except RuntimeError as e:  # someone else is tracing: no reason to end a training
            log.warning("profiled nothing: %s", e)
            return
        self._status = "tracing"

    def _end(self, how: str) -> None:
        import jax

        self._status = "done"
        jax.profiler.stop_trace()
        log.info("profiled %s into %s", how, self._path)


def _wait_for(moment: Moment) -> None:
    import jax

    jax.block_until_ready(moment.state)
