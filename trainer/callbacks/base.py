"""A callback is told what happened, in a frozen record, and may answer; it never gets hold of the trainer.

Whatever it needs from one moment to the next is in its state, which is part of every checkpoint; the rest it must be able
to compute anew. A callback that should change what is trained or evaluated says so through an answer of its method.

So that a run which was stopped goes on as if it had not been, answers and state are functions of the steps and rows seen,
never of the clock or of where a life began. Values that do depend on clock or machine are named time_*, throughput_*, mfu*
or memory_*; no name has a "/" in it.
"""

import ctypes
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..config import CallbackConfig

if TYPE_CHECKING:
    from ..state import TrainState  # imports jax, which reading a config must not


@dataclass(frozen=True)
class Moment:
    """What is known at a moment of training. `state` is valid during the call only: the next step may reuse its buffers.
    With a row there is none, for it may be seen a step late.

    `info` may hold `run_dir` (a path; where there is a run directory) and `eval_metrics` (names of the values of a validation),
    with which a callback finds its place and notices a misspelt name before the first step; it must do without them too.
    """

    step: int  # completed steps
    epoch: int  # counted from 1; 0 before the first
    state: "TrainState | None" = None
    values: Mapping[str, Any] = field(default_factory=dict)  # host values of the row this moment is about
    info: Mapping[str, Any] = field(default_factory=dict)  # facts of the run in JSON terms, at the start


@dataclass(frozen=True)
class Answer:
    """What a callback wants. The trainer merges the answers of all callbacks."""

    values: Mapping[str, Any] = field(default_factory=dict)  # to be added to the row
    stop: str | None = None  # the reason to end training after this step
    save: bool = False  # commit a checkpoint at this step; in the pipeline one more than `checkpoint` says


NOTHING = Answer()


class Callback:
    """Every method does nothing; a callback overrides those of the moments it cares about.

    What stops training, or asks for a commit, must do so at a step that is finished in every life: one that `wants` names, one
    that a row ends with where `decides_on_rows` is set, or an end of a validation or epoch. `asks` names facts that cost
    something and are in `info` only if somebody asks: `decays`, a bool per dotted path of a parameter, and `step_memory`, see
    trainer.memory; each None where it is not known.
    """

    decides_on_rows = False  # `on_row` may answer with a stop or a save: rows are then seen before the next step begins
    asks: tuple[str, ...] = ()

    def wants(self, step: int) -> bool:
        """Whether nothing may be in flight after this step, because something is to be done with its finished state."""
        return False

    def grid(self) -> int | None:
        """`on_training_step` must be told of all multiples of this number of steps (1: of every step); None: any will do."""
        return None

    def on_training_start(self, moment: Moment) -> Answer:
        """Before the first step of a life, after `set_state`; `info` is filled. A `stop` here means: train no further."""
        return NOTHING

    def on_training_step(self, moment: Moment) -> Answer:
        """After a step was dispatched; values are not known yet. Called after every step: be quick, do not wait for the device.

        With several steps per dispatch it is told of the last of each; a callback that needs others says so by its `grid`.
        """
        return NOTHING

    def on_row(self, moment: Moment) -> Answer:
        """A logging window closed: `values` is its row, which answers may add to."""
        return NOTHING

    def on_training_epoch_start(self, moment: Moment) -> Answer:
        """An epoch begins."""
        return NOTHING

    def on_training_epoch_end(self, moment: Moment) -> Answer:
        """An epoch ended: `values` over all of it."""
        return NOTHING

    def on_validation_epoch_start(self, moment: Moment) -> Answer:
        """A validation begins."""
        return NOTHING

    def on_validation_epoch_end(self, moment: Moment) -> Answer:
        """A validation ended with `values`. May be told of a step again: after a restore the newest one is validated anew."""
        return NOTHING

    def on_test_epoch_start(self, moment: Moment) -> Answer:
        """A test begins: the moment's state is the tested one, not the last, and its optimizer's statistics may be None."""
        return NOTHING

    def on_test_epoch_end(self, moment: Moment) -> Answer:
        """A test ended with `values`."""
        return NOTHING

    def on_training_end(self, moment: Moment) -> Answer:
        """After the last step."""
        return NOTHING

    def evaluation_params(self, state: "TrainState") -> Any | None:
        """Other parameters, like `state.params`, to validate with as well, as split `val_ema`; None: none. Valid until the next step."""
        return None

    def finalize(self, status: str) -> None:
        """The end, whatever it was: "success", "nan", "error" or, of a run that goes on later, "stopped".

        Called once, also where `on_training_end` was not.
        """

    def get_state(self) -> Any:
        """What must survive: nested dictionaries of arrays, or None for nothing (yet).

        Arrays of the device are valid until the next step. None is empty: Orbax cannot save an array without values. Shapes may
        grow from one commit to the next, so what comes back is of the shapes that were saved.
        """
        return None

    def set_state(self, state: Any) -> None:
        """Go on from what `get_state` gave; None is a fresh start.

        Arrays may come back as NumPy's or lie on any devices, and may have been through JAX: no 64 bits are kept. Dictionaries may
        stand where other containers were. The caller keeps the arrays: a callback that gives its buffers away copies first.
        """


class CallbackPartConfig(CallbackConfig):
    """Base of the configs of the callbacks in this folder, and of a user's own."""

    def build(self) -> Callback:
        """A new callback, as at the start of a run; does no I/O and allocates nothing."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build its callback")


def float32(value: Any) -> float:
    """`value` rounded to float32, so that deciding on it is the same before and after a checkpoint; None is NaN."""
    return math.nan if value is None else ctypes.c_float(value).value


__all__ = ["NOTHING", "Answer", "Callback", "CallbackConfig", "CallbackPartConfig", "Moment", "float32"]
