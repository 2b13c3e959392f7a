"""The loss and metrics that `lm.py` configures.

The loss is returned as (sum over tokens, number of tokens), so that microbatches and devices with unequal numbers of
tokens are weighted by what they hold.
"""

import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from ..state import model_rngs
from .softmax import log_z_and_chosen

if TYPE_CHECKING:
    from .lm import LMObjectiveConfig


# `loss`, with the name of a data set before it or a log mode behind. The penalty on log Z is no loss, and neither the spread of
# losses nor their sum is one whose exponential says anything.
LOSS = re.compile(r"(?!(.*_)?z_loss)(?P<set>.*_)?loss(?P<mode>_mean|_single|_max|_min)?")


class LMObjective:
    """Loss in nats per token; `accuracy`, `loss` and token statistics as metrics."""

    def __init__(self, config: "LMObjectiveConfig"):
        self.config = config

    def inputs(self, batch: Any) -> Any:
        """`tokens`, `segment_ids` and `positions` of a batch, each (batch, seq) int32."""
        return {"tokens": batch["inputs"], "segment_ids": batch["segment_ids"], "positions": batch["positions"]}

    def loss(self, params: Any, apply_fn: Any, batch: Any, rng: Any, train: bool) -> tuple[Any, tuple[dict, dict]]:
        """`((sum of losses, tokens), (metrics, mutable))` over the tokens whose segment is not 0."""
        rngs = {"dropout": model_rngs(rng)["dropout"]} if train else None
        logits, mutable = apply_fn({"params": params}, self.inputs(batch), train=train, rngs=rngs, mutable=["intermediates"])
        mutable = dict(mutable)
        logits = logits.astype(jnp.float32)
        mask = batch["segment_ids"] != 0
        log_z, chosen = log_z_and_chosen(logits, batch["targets"])
        nll = jnp.where(mask, log_z - chosen, 0.0)
        tokens = jnp.sum(mask, dtype=jnp.int32)
        total = jnp.sum(nll)
        # Right where the target has the highest logit; an argmax would cost as much as a matrix product on a CPU.
        right = jnp.sum(mask & (chosen == jnp.max(logits, axis=-1)), dtype=jnp.int32)
        metrics = {
            "loss": {"value": total, "count": tokens},
            "accuracy": {"value": right, "count": tokens},
            "tokens": {"value": tokens, "log_modes": ("sum",)},
            "token_utilization": {"value": tokens, "count": mask.size},
        }
        if self.config.log_logit_stats:
            metrics |= self._logit_stats(logits, mask, tokens)
        if self.config.z_loss:
            penalty = self.config.z_loss * jnp.sum(jnp.where(mask, log_z**2, 0.0))
            metrics["z_loss"] = {"value": penalty, "count": tokens}
            if train:
                total = total + penalty
        return (total, tokens), (metrics, mutable)

    @staticmethod
    def postprocess(values: Mapping[str, Any]) -> dict[str, Any]:
        """Host values with `perplexity` = exp(loss) beside each loss, under the same prefix and postfix."""
        found = {m.expand(r"\g<set>perplexity\g<mode>"): _exp(values[key]) for key in values if (m := LOSS.fullmatch(key))}
        return {**values, **found}

    @staticmethod
    def _logit_stats(logits: Any, mask: Any, tokens: Any) -> dict[str, Any]:
        kept = mask[..., None]
        squares = jnp.sum(jnp.where(kept, logits**2, 0.0), axis=-1)
        return {
            "logits_norm": {"value": jnp.sum(jnp.sqrt(squares)), "count": tokens},
            "logits_std": {"value": jnp.sum(jnp.where(mask, jnp.std(logits, axis=-1), 0.0)), "count": tokens},
            "logits_max": {"value": jnp.max(jnp.where(kept, logits, -jnp.inf)), "log_modes": ("max",)},
        }


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
