"""One optimizer update, and one batch of evaluation, as pure functions to be jitted.

Loss and gradients are looked at on the device in every step: where they are not finite nothing of the state changes,
and `ok` says so. Logged and unlogged steps are the same program; the logging window is carried through it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import metrics as m
from . import spikes
from .config import TrainerConfig
from .contract import read_loss
from .intermediates import as_metrics
from .optimizers.base import Optimizer
from .params import flatten
from .state import TrainState, step_key

LossFunction = Callable[..., tuple[Any, tuple[dict, dict]]]  # see objectives.base.Objective.loss


def bind(apply: Callable, mutable: dict[str, Any]) -> Callable:
    """`apply` with the model's other collections at hand, and updated wherever a training loss asks for any update.

    As with linen's own, a loss that asks for none with `mutable=[...]` gets the outputs alone.
    """

    def apply_fn(variables: dict[str, Any], inputs: Any, *, train: bool = False, **kwargs: Any) -> Any:
        if asked := kwargs.pop("mutable", None):
            kwargs["mutable"] = [*asked, *mutable] if train else asked
        return apply({**mutable, **variables}, inputs, train=train, **kwargs)

    return apply_fn


def microbatch(batch: Any, index: Any, *, num: int) -> Any:
    """Rows index, index + num, ... of every array: strided, so that a batch cut over devices stays where it is."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // num, num, *x.shape[1:])[:, index], batch)


def make_train_step(
    loss: LossFunction,
    apply: Callable,
    optimizer: Optimizer,
    config: TrainerConfig,
    *,
    cast: Callable[[Any], Any] = lambda params: params,
    exchange: Callable[[Callable], Callable] = lambda gradients: gradients,
) -> Callable:
    """`(state, window, batch, alive) -> (state, window, alive)`: one update from one batch, its metrics merged into the window.

    With `gradient_accumulate_steps` = k the gradient is that of the whole batch: sums over microbatches, divided once by the
    total weight. `alive` is a bool scalar: a step that is not finite makes it false, and then neither it nor any later step
    changes the state, so what is in flight when the host looks does no harm. With `on_spike` a spike is treated likewise, and the
    state has the losses that say what is one. Where such a step is skipped it counts and uses up its batch, but its update is
    left out, and `skipped_sum` says how often. The loss gets `cast(params)`, made once;
    `exchange` may compute the gradients of a (micro)batch in another way, see fsdp.
    """
    num = config.gradient_accumulate_steps

    def gradients(params: Any, mutable: Any, batch: Any, key: jax.Array) -> tuple:
        def total(p: Any) -> tuple:
            value, weight, found, updated = read_loss(loss(p, bind(apply, mutable), batch, key, True), of=loss)
            sown = updated.get("intermediates", {})
            parsed = m.parse(found, config.default_train_log_modes)
            if config.log_intermediates:
                parsed |= m.parse(as_metrics(sown), config.intermediates_log_modes)
            kept = {**mutable, **{k: v for k, v in updated.items() if k in mutable}}
            return value, (jnp.asarray(weight, jnp.float32), parsed, kept)

        (value, (weight, parsed, kept)), grads = jax.value_and_grad(total, has_aux=True)(params)
        return (value.astype(jnp.float32), weight, grads, parsed), kept

    exchanged = exchange(gradients)

    def join(a: tuple, b: tuple) -> tuple:
        grads = jax.tree.map(jnp.add, a[2], b[2])
        return a[0] + b[0], a[1] + b[1], grads, m.merge_batch(a[3], b[3])

    def accumulate(state: TrainState, batch: Any, key: jax.Array) -> tuple:
        params = cast(state.params)

        def part(mutable: Any, batch: Any, key: jax.Array) -> tuple:
            (value, weight, grads, parsed), mutable = exchanged(params, mutable, batch, key)
            grads = jax.tree.map(lambda g, master: g.astype(master.dtype), grads, state.params)  # sums in the master's dtype
            return (value, weight, grads, parsed), mutable

        if num == 1:
            return part(state.mutable, batch, key)
        first, mutable = part(state.mutable, microbatch(batch, 0, num=num), jax.random.fold_in(key, 0))

        def body(carry: tuple, i: Any) -> tuple:
            total, mutable = carry
            found, mutable = part(mutable, microbatch(batch, i, num=num), jax.random.fold_in(key, i))
            return (join(total, found), mutable), None

        if config.gradient_accumulate_scan:
            return jax.lax.scan(body, (first, mutable), jnp.arange(1, num))[0]
        carry = (first, mutable)
        for i in range(1, num):
            carry, _ = body(carry, i)
        return carry

    def train_step(state: TrainState, window: Any, batch: Any, alive: Any = True) -> tuple[TrainState, Any, jax.Array]:
        (total, weight, grads, found), mutable = accumulate(state, batch, step_key(config.seed, state.step))
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        norm = optax.tree.norm(grads)
        updates, opt_state = optimizer.tx.update(grads, state.opt_state, state.params)
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state, mutable, state.losses)
        good = jnp.isfinite(total / weight) & jnp.isfinite(norm) if config.check_for_nan else jnp.array(True)
        if state.losses is not None:
            good &= spikes.is_usual(state.losses, total / weight, config.spike)
            # Also that of a step that is refused, for whoever is to say why; but none of a step behind it.
            losses = jnp.where(jnp.asarray(alive), spikes.remember(state.losses, total / weight), state.losses)
            new, state = new.replace(losses=losses), state.replace(losses=losses)
        found |= m.parse(_norms(config, norm, grads, new), config.default_train_log_modes)
        found |= m.parse({"lr": optimizer.schedule(state.step)}, ("single",))  # the rate of this very update
        if config.skips:
            found |= m.parse({"skipped": {"value": ~good, "log_modes": ("sum",)}}, ())
            keep, counted = good, state.replace(step=state.step + 1, opt_state=_rate_moves_on(state.opt_state, opt_state))
        else:
            alive = jnp.asarray(alive) & good
            keep, counted = alive, state
        merged = m.merge(window, m.window_of(found))
        if config.skips and window is not None:  # what was found in a bad batch would spoil the whole window
            both, old = merged.tree(), window.tree()
            kept = {
                k: both[k] if k in ("skipped", "lr") else jax.tree.map(functools.partial(jnp.where, good), both[k], old[k]) for k in both
            }
            merged = m.Window.of(kept)
        new = jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, counted)
        return new, merged, jnp.asarray(alive)

    return train_step


def _rate_moves_on(old: Any, new: Any) -> Any:
    """The statistics before a skipped update, with the schedules' counts after it: a rate is a function of the step."""

    def one(path: tuple, before: Any, after: Any) -> Any:
        where = [getattr(k, "key", getattr(k, "name", None)) for k in path[-2:]]
        return after if where in (["rate", "count"], ["schedule_free", "step_count"]) else before

    return jax.tree_util.tree_map_with_path(one, old, new)


def _norms(config: TrainerConfig, norm: jax.Array, grads: Any, new: TrainState) -> dict[str, Any]:
    out: dict[str, Any] = {"grad_norm": norm} if config.log_grad_norm else {}
    if config.log_param_norm:
        out["param_norm"] = optax.tree.norm(new.params)
    every = config.logger.log_every_n_steps if config.logger else 1
    if config.log_grad_norm_per_param:
        out |= _norm_of_each("grad_norm", grads, due=new.step % every == 0)
    if config.log_param_norm_per_param:
        out |= _norm_of_each("param_norm", new.params, due=new.step % every == 0)
    return out


def _norm_of_each(name: str, tree: Any, *, due: jax.Array) -> dict[str, Any]:
    """A metric per parameter, computed at the steps at which a row is due, whose value it then is: dozens of small sums add up."""
    flat = flatten(tree)
    norms = jax.lax.cond(
        due, lambda: [jnp.linalg.norm(x.ravel()).astype(jnp.float32) for x in flat.values()], lambda: [jnp.float32(0)] * len(flat)
    )
    count = due.astype(jnp.int32)
    return {f"{name}.{path}": {"value": x, "count": count, "log_modes": ("mean",)} for path, x in zip(flat, norms, strict=True)}


def several(step: Callable, num: int, *, rolled: bool = True) -> Callable:
    """`num` training steps in one, with batches stacked along a new first dim (num, rows, ...); else like `step`.

    A step that is not finite is still found where it is: neither it nor those after it count in `state.step`. `rolled` makes
    a loop of one compiled step, without it there are `num` of them.
    """
    if num == 1:
        return step

    def steps(state: TrainState, window: Any, batches: Any, alive: Any = True) -> tuple[TrainState, Any, jax.Array]:
        def batch_at(i: Any) -> Any:
            return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), batches)

        def body(i: Any, carry: tuple) -> tuple:
            # The next batch is cut out one step ahead, so that it reaches the step as an array of its own, as it does when there is
            # one step per dispatch. XLA would fuse a cut within the step with the step's sums, and so change their last bits.
            state, window, alive, batch = carry
            return *step(state, window, batch, alive), batch_at((i + 1) % num)

        carry = (state, window, jnp.asarray(alive), batch_at(0))
        if rolled:
            return jax.lax.fori_loop(0, num, body, carry)[:3]
        for i in range(num):
            carry = body(i, carry)
        return carry[:3]

    return steps


def make_eval_step(loss: LossFunction, apply: Callable, config: TrainerConfig) -> Callable:
    """`(params, mutable, window, batch) -> window`; metrics as means without postfix, the model not in training."""

    def eval_step(params: Any, mutable: Any, window: Any, batch: Any) -> Any:
        returned = loss(params, bind(apply, mutable), batch, jax.random.key(config.seed_eval), False)
        _, _, found, _ = read_loss(returned, of=loss)
        return m.merge(window, m.window_of(m.parse(_plain(found), ())))

    return eval_step


def _plain(found: Mapping[str, Any]) -> dict[str, Any]:
    """Every metric as its mean, save for sums, which stay sums."""

    def modes(entry: Any) -> Sequence[str]:
        return ("sum",) if isinstance(entry, Mapping) and "sum" in entry.get("log_modes", ()) else ("mean_nopostfix",)

    return {k: {**(e if isinstance(e, Mapping) else {"value": e}), "log_modes": modes(e)} for k, e in found.items()}


def empty_window(step: Callable, *before: Any, batch: Any) -> m.Window:
    """The identity of `merge` for the metrics of `step(*before, window, batch)`; arguments may be shapes, nothing is computed."""
    out = jax.eval_shape(lambda *a: step(*a[:-1], None, a[-1]), *before, batch)
    return m.identity(out[1] if isinstance(out, tuple) else out)
