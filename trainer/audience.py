"""The audience of a training: its callbacks and loggers, what they are told, and what the callbacks ask for.

The trainer computes and the loop counts; whoever wants to be told of it sits here, told through the trainer's hooks.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from .callbacks.base import Answer, Callback, Moment
from .errors import ConfigError
from .names import named

if TYPE_CHECKING:
    from .module import TrainerModule

log = logging.getLogger(__name__)


class Audience:
    """Those whom `trainer` has, and what they asked for since its training began."""

    def __init__(self, trainer: "TrainerModule"):
        self.trainer = trainer
        self.stop_reason: str | None = None  # why training ends here, where one of them said so
        self.facts: dict[str, Any] = {}  # what the surroundings know of the training beside what the trainer does
        self._info: dict[str, Any] = {}
        self._save_asked = False

    def forget(self) -> None:
        """Nothing that callbacks asked for in an earlier training is in the way."""
        self.stop_reason, self._save_asked = None, False

    def start(self, info: Mapping[str, Any]) -> None:
        """Tell loggers and callbacks the facts of the training to come."""
        self._info = {**info, **self.facts}
        for logger in self.trainer.loggers:
            logger.start(self.trainer.global_step, self._info)
        self._info |= {name: self._fact(name) for callback in self.trainer.callbacks for name in callback.asks}

    def _fact(self, name: str) -> Any:
        """A fact that a callback asks for; None where there is none."""
        from . import memory, params

        t = self.trainer
        if name == "step_memory":
            return memory.step_memory(t)
        assert name == "decays", name
        return params.flatten(t.optimizer.decays(t.shapes.params)) if t.optimizer.decays else None

    def tell(self, hook: str, values: dict[str, Any] | None = None, *, epoch: int = 0, step: int | None = None) -> None:
        """Tell all callbacks of a moment; what they add goes into `values`, what else they want is noted.

        Raises ConfigError where one asks for a stop or a commit at a step that may be in flight: how late that is seen depends on
        where chunks end, and with it the step at which it would be obeyed.
        """
        t = self.trainer
        if not t.callbacks:
            return
        at = t.global_step if step is None else step
        for callback in t.callbacks:
            state = t.state if at == t.global_step and hook != "on_row" else None
            answer: Answer = getattr(callback, hook)(Moment(at, epoch, state, dict(values or {}), self._info))
            if wrong := [name for name in answer.values if name in ("step", "split") or "/" in name]:
                raise ConfigError(f"{type(callback).__name__} adds a value named {wrong[0]!r} to a row; choose another name, without '/'")
            if values is not None:
                values.update(answer.values)
            if (answer.stop or answer.save) and not _may_decide(callback, hook, at):
                way_out = "say `decides_on_rows = True`" if hook == "on_row" else "name the step in `wants`"
                raise ConfigError(f"{type(callback).__name__} asked for a stop or a commit in {hook} at step {at} unannounced; {way_out}")
            self.stop_reason = self.stop_reason or answer.stop
            self._save_asked = self._save_asked or answer.save

    def wants(self, step: int, *, row: bool) -> bool:
        """Whether somebody waits for this step to be finished; `row`: a row ends with it."""
        return any(callback.wants(step) or (row and callback.decides_on_rows) for callback in self.trainer.callbacks)

    def averages(self) -> Iterator[Any]:
        """The parameters that callbacks want evaluated beside the state's own."""
        found = (callback.evaluation_params(self.trainer.state) for callback in self.trainer.callbacks)
        return (params for params in found if params is not None)

    def take_save(self) -> bool:
        """Whether a commit was asked for since this was last called."""
        asked, self._save_asked = self._save_asked, False
        return asked

    def get_state(self) -> dict[str, Any]:
        """The callbacks' states, by class and place among those of it."""
        states = {name: callback.get_state() for name, callback in named(self.trainer.callbacks)}
        return {k: v for k, v in states.items() if v is not None}

    def set_state(self, states: Mapping[str, Any], *, stop_reason: str | None = None) -> None:
        """Go on from a commit: give the callbacks their states back; one that has none begins anew."""
        self.stop_reason = stop_reason
        for name, callback in named(self.trainer.callbacks):
            callback.set_state(states.get(name))

    def finalize(self, status: str) -> None:
        """Tell everybody of the end, whatever it was; one that fails does not keep the others from being told."""
        for one in (*self.trainer.callbacks, *self.trainer.loggers):
            try:
                one.finalize(status)
            except Exception:
                log.exception("%s could not be finalized", type(one).__name__)
        self.trainer.loggers = []  # they take no rows any more: what is evaluated after the training is for its caller


def _may_decide(callback: Callback, hook: str, step: int) -> bool:
    """Whether the step of a moment is finished in every life when `callback` is told of it."""
    if hook == "on_row":
        return callback.decides_on_rows
    return hook != "on_training_step" or callback.wants(step)
