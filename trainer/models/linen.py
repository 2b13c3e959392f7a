"""The face of a flax.linen module to the trainer: plain trees of arrays, dims named on the side."""

from typing import Any

import flax.linen as nn
import jax

from .base import Variables


class LinenModel:
    """A Model made of a linen module that is called as `module(inputs, train=...)`.

    `compute_dtype` is that of its products, to which it casts matrices anyway; None: whatever each layer does.
    """

    def __init__(self, module: nn.Module, *, compute_dtype: str | None = None):
        self.module = module
        self.compute_dtype = compute_dtype

    def cast(self, params: Any) -> Any:
        """`params` with matrices in `compute_dtype`; vectors (scales of norms, biases) stay as they are."""
        if self.compute_dtype is None:
            return params
        return jax.tree.map(lambda x: x.astype(self.compute_dtype) if x.ndim >= 2 else x, params)

    def init(self, rngs: dict[str, Any], inputs: Any) -> Variables:
        """New variables for a batch of `inputs`, without flax's boxes."""
        return nn.unbox(self.module.init(rngs, inputs, train=False))

    def apply(self, variables: Variables, inputs: Any, **kwargs: Any) -> Any:
        """The module's outputs; keywords go to linen's apply and from there to the module."""
        return self.module.apply(variables, inputs, **kwargs)

    def logical_axes(self, inputs: Any) -> Variables:
        """The names given to `nn.with_logical_partitioning`; None for the dims of a variable without names."""
        rngs = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
        boxed = jax.eval_shape(lambda x: self.module.init(rngs, x, train=False), inputs)

        def names(x: Any) -> tuple:
            return tuple(x.names) if isinstance(x, nn.Partitioned) else (None,) * x.ndim

        return jax.tree.map(names, boxed, is_leaf=lambda x: isinstance(x, nn.Partitioned))
