"""Spikes: steps whose loss is not finite, or far above those of the steps before it.

What a loss is compared with are the losses of the last steps, and they are part of the state: so the answer is a function of
(seed, step, batches) wherever a life began, and is found on the device, within the step, which nobody waits for.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .config import SpikeConfig, TrainerConfig

NORMAL = 1.4826  # a normal distribution's standard deviation over its median deviation (Rousseeuw and Croux 1993, section 1)
LEAST = 0.01  # of the median: losses that are all but equal do not make a spike of the next that differs


def no_losses(config: TrainerConfig) -> Any:
    """The history of a training that has not begun, (num_losses + 1,) float32; None where spikes are not looked for.

    One more than are looked at, so that behind a step that was refused still stands all that it was compared with.
    """
    return None if config.on_spike is None else jnp.full(config.spike.num_losses + 1, jnp.inf, jnp.float32)


def is_usual(losses: Any, loss: Any, config: SpikeConfig) -> jax.Array:
    """Whether the next loss is none to be taken for a spike."""
    return loss <= limit_of(losses[1:], config)


def remember(losses: Any, loss: Any) -> Any:
    """The history with one more loss at its end. One that is not finite holds the place of none."""
    return jnp.concatenate([losses[1:], jnp.asarray(loss, jnp.float32)[None]])


def limit_of(losses: Any, config: SpikeConfig) -> jax.Array:
    """What the loss after these may come to: median + `deviations` * 1.4826 * median |loss - median|, infinity while too few are known.

    Median and median deviation stay where they are though half of the losses be spikes (Hampel 1974; Leys et al. 2013, J. Exp.
    Soc. Psychol. 49, eq. 1), so a spike that is skipped may stand in the history; a lasting change of level is one to get used to.
    """
    known = jnp.isfinite(losses)
    num = jnp.sum(known)
    median = _median(jnp.where(known, losses, jnp.inf), num)
    deviation = _median(jnp.where(known, jnp.abs(losses - median), jnp.inf), num)
    limit = median + config.deviations * jnp.maximum(NORMAL * deviation, LEAST * jnp.abs(median))
    return jnp.where(num >= config.least_losses, limit, jnp.inf)


def _median(values: jax.Array, num: jax.Array) -> jax.Array:
    """Of the `num` finite ones, the others being infinite."""
    ordered = jnp.sort(values)
    return (ordered[jnp.maximum(num - 1, 0) // 2] + ordered[num // 2]) / 2


def in_words(step: int, losses: Any, config: TrainerConfig) -> str:
    """What was wrong with a step that was refused; `losses` is the history that ends with its own."""
    if losses is not None:
        history = np.asarray(losses)
        loss, limit = float(history[-1]), float(limit_of(history[:-1], config.spike))
        if np.isfinite(loss) and loss > limit:
            num = int(np.isfinite(history[:-1]).sum())
            return (
                f"the loss of step {step}, {loss:.4g}, is a spike: above the limit of {limit:.4g} that follows from the {num} losses "
                "before it; lower the learning rate, look at the data, or set trainer.on_spike to skip or rollback"
            )
    return f"loss or gradients of step {step} are not finite; lower the learning rate or look at the data"
