"""An exponential moving average of the parameters, to validate with.

Both ways to begin are one recursion, average += weight x (params - average), with a weight that depends on the number of
updates alone. Written so, parameters at rest stay where they are: decay x average + (1 - decay) x params would drift, as two
rounded factors do not add up to 1.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ..errors import CheckpointError
from ..params import flatten, unflatten
from .base import NOTHING, Answer, Callback, CallbackPartConfig, Moment

if TYPE_CHECKING:
    from ..state import TrainState


class EMAConfig(CallbackPartConfig):
    """Which steps go into the average, and how long they are remembered."""

    kind: Literal["ema"] = "ema"
    decay: float = Field(0.999, ge=0, lt=1)  # per update of the average, not per step
    start_step: int = Field(1, ge=1)  # the first step whose parameters may go in
    every_n_steps: int = Field(1, ge=1)  # parameters of its multiples go in
    # adam: as if begun at 0 and divided by 1 - decay^n (Kingma and Ba, arXiv 1412.6980, section 3), so the first parameters fade
    # as they should; none: begun at the first parameters, which weigh as much as all before them would have.
    bias_correction: Literal["adam", "none"] = "adam"

    def build(self) -> "EMA":
        """The callback, with nothing averaged."""
        return EMA(self)


def update_weight(num_updates: int, *, decay: float, bias_correction: Literal["adam", "none"]) -> float:
    """The weight of the parameters in update number `num_updates`, from 1; the first weighs 1.

    With m_n = decay m_(n-1) + (1 - decay) x_n and a_n = m_n / (1 - decay^n): a_n = a_(n-1) + w_n (x_n - a_(n-1)) exactly where
    w_n = (1 - decay) / (1 - decay^n).
    """
    if bias_correction == "none":
        return 1.0 if num_updates == 1 else 1 - decay
    return (1 - decay) / (1 - decay**num_updates)


class EMA(Callback):
    """The average lies on the devices as the parameters do, in float32 where they are narrower: bfloat16 would not move.

    Its state is {num_updates (int32), average}; before the first update there is none, and nothing to validate with.
    """

    def __init__(self, config: EMAConfig):
        self.config = config
        self._num_updates = 0
        self._average: Any = None
        self._restored: Any = None  # what set_state was given, until parameters say how it is to lie
        self._update: Callable | None = None

    def grid(self) -> int:
        """All steps that go in."""
        return self.config.every_n_steps

    def on_training_step(self, moment: Moment) -> Answer:
        """Put the new parameters into the average; dispatched, not waited for."""
        assert moment.state is not None, "a training step without its state"
        if moment.step < self.config.start_step or moment.step % self.config.every_n_steps:
            return NOTHING
        import numpy as np

        params = moment.state.params
        average = self._take(params) if self._num_updates else _zeros(params)
        self._num_updates += 1
        weight = update_weight(self._num_updates, decay=self.config.decay, bias_correction=self.config.bias_correction)
        if self._update is None:
            self._update = _make_update(params)
        self._average = self._update(average, params, np.float32(weight))
        return NOTHING

    def evaluation_params(self, state: "TrainState") -> Any | None:
        """The average in the parameters' dtypes; None before the first update."""
        import jax

        if not self._num_updates:
            return None
        average = self._take(state.params)
        return jax.tree.map(lambda a, p: a if a.dtype == p.dtype else a.astype(p.dtype), average, state.params)

    def get_state(self) -> Any:
        """The average and the number of its updates."""
        import numpy as np

        if not self._num_updates:
            return None
        average = self._restored if self._average is None else self._average
        return {"num_updates": np.asarray(self._num_updates, np.int32), "average": average}

    def set_state(self, state: Any) -> None:
        """Go on from an average; it is laid out like the parameters when they are first seen."""
        self._average, self._update = None, None
        self._num_updates, self._restored = (int(state["num_updates"]), state["average"]) if state else (0, None)

    def _take(self, params: Any) -> Any:
        if self._average is None:
            self._average, self._restored = _lay_out(self._restored, params), None
        return self._average


def _average_dtype(param: Any) -> Any:
    import jax.numpy as jnp

    return jnp.promote_types(param.dtype, jnp.float32) if jnp.issubdtype(param.dtype, jnp.floating) else param.dtype


def _zeros(params: Any) -> Any:
    import jax
    import jax.numpy as jnp

    return jax.tree.map(lambda p: jnp.zeros(p.shape, _average_dtype(p), device=p.sharding), params)


def _make_update(params: Any) -> Callable:
    """`(average, params, weight) -> average`, donating the old average; one program for all updates."""
    import jax
    import jax.numpy as jnp

    def one(a: Any, p: Any, weight: Any) -> Any:
        if not jnp.issubdtype(p.dtype, jnp.inexact):
            return p  # a mean of integers is none: the newest stands
        return a + weight.astype(a.dtype) * (p.astype(a.dtype) - a)

    def update(average: Any, params: Any, weight: Any) -> Any:
        return jax.tree.map(lambda a, p: one(a, p, weight), average, params)

    return jax.jit(update, donate_argnums=0, out_shardings=jax.tree.map(lambda p: p.sharding, params))


def _lay_out(restored: Any, params: Any) -> Any:
    """A copy of `restored`, in any containers and on any devices, as the parameters lie. Raises CheckpointError where it is not theirs."""
    import jax
    import jax.numpy as jnp

    found, want = flatten(restored), flatten(params)
    for path in sorted(found.keys() | want.keys()):
        a, p = found.get(path), want.get(path)
        have = None if a is None else (tuple(a.shape), str(a.dtype))
        need = None if p is None else (tuple(p.shape), str(_average_dtype(p)))
        if have != need:
            raise CheckpointError(
                f"the saved average holds {_words(have)} at {path}, but the model needs {_words(need)}; use the run's own config"
            )
    shardings = jax.tree.map(lambda p: p.sharding, params)
    placed = jax.device_put(unflatten(params, found), shardings)
    # A copy: the caller keeps what it gave, and buffers that came from outside may silently not be donated.
    return jax.jit(lambda tree: jax.tree.map(jnp.copy, tree), out_shardings=shardings)(placed)


def _words(array: tuple[tuple[int, ...], str] | None) -> str:
    return f"{array[1]}{list(array[0])}" if array else "nothing"
