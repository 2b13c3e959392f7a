"""Rematerialisation of linen modules: memory for time, block by block."""

from typing import Any

import flax.linen as nn
import jax

from .base import Remat


def rematerialised(module: type[nn.Module], choice: Remat) -> Any:
    """The class `module`, keeping for its backward pass what `choice` says; its parameters keep their names."""
    if choice == "none":
        return module
    # Products with weights have no batch dims, attention scores have: those grow with the square of the sequence and are not kept.
    keep = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if choice == "dots" else None
    return nn.remat(module, policy=keep)
