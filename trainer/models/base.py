"""What the trainer needs of a model: parameters from a key, outputs from parameters, names for the dims of both.

Only this folder knows how models are written (Flax linen). The trainer sees three functions, and shards by the *logical*
names of dims (`embed`, `heads`, `mlp`, `vocab`, ...), which the mesh's rules turn into mesh axes.
"""

from typing import Any, Literal, Protocol

from ..config import PartConfig

Variables = dict[str, Any]  # {"params": tree, "<collection>": tree, ...}

# What a block keeps for its backward pass: none recomputes nothing and keeps all; dots keeps the products with weights and
# recomputes the rest (also attention scores); full keeps the block's inputs only.
Remat = Literal["none", "dots", "full"]


class Model(Protocol):
    """A model, as the trainer sees it. Stateless.

    It may have a method `cast(params)`: the parameters as its products take them, for one cast per step, outside of the
    microbatches; `apply` must do with either. Without one a step hands it the master weights.
    """

    def init(self, rngs: dict[str, Any], inputs: Any) -> Variables:
        """New variables (arrays without boxes) for `inputs` of the shapes to come."""

    def apply(self, variables: Variables, inputs: Any, **kwargs: Any) -> Any:
        """The outputs; with `mutable=[...]` a pair (outputs, updated collections)."""

    def logical_axes(self, inputs: Any) -> Variables:
        """For each variable a tuple with one logical name or None per dim, as a tree of the variables' structure."""


class ModelConfig(PartConfig):
    """Base of model configs. `build` returns a Model and allocates nothing."""

    def build(self) -> Model:
        """The model this config describes."""
        raise NotImplementedError(f"{type(self).__name__} does not say how to build its model")

    def flops_per_token(self, seq_len: int) -> float | None:
        """Floating point operations, forward and backward, that training needs for a token of a row of `seq_len`; None: not said."""
        return None
