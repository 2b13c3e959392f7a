"""Muon: momentum made orthogonal for matrices, AdamW for all else.

A kernel of three and more dims is a matrix too, written with its dims apart: (width, heads, head_dim) maps width to
heads * head_dim. It is cut between its leading and trailing dims where the matrix comes out squarest. For attention that is
the map that the model applies, into the heads and out of them, where heads are fewer than the width and none is wider.
"""

import math
import re
from typing import Any, Literal

from pydantic import Field, field_validator

from ..params import dotted_paths
from .base import ChainConfig, check_pattern


class MuonConfig(ChainConfig):
    """Jordan et al. 2024 (kellerjordan.github.io/posts/muon) with Nesterov momentum, scaled as by Liu et al. 2025
    (arXiv 2502.16982, eq. 4): update_rms * sqrt(max(rows, columns)) * orthogonalised, so that one lr and one decay suit both groups.

    Parameters below two dims, and those whose dotted path `adamw` is found in, are AdamW's: embeddings and output heads are
    tables of vectors rather than maps. The momentum is corrected for its start at 0 as NAdam's is. Layers stacked in one
    array would be seen as one matrix: name such arrays in `adamw`.
    """

    kind: Literal["muon"] = "muon"
    beta: float = Field(0.95, ge=0, lt=1)
    newton_schulz_steps: int = Field(5, ge=1)
    update_rms: float = Field(0.2, gt=0)  # of a matrix's update per unit of lr; 0.2 is about AdamW's
    adamw: str = r"embed|(^|\.)(lm_)?head(\.|$)"  # regular expression
    adamw_beta1: float = Field(0.9, ge=0, lt=1)
    adamw_beta2: float = Field(0.95, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)  # of both
    weight_decay: float = Field(0.1, ge=0)

    @field_validator("adamw")
    @classmethod
    def _is_pattern(cls, value: str) -> str:
        return check_pattern(value)

    def groups(self, params: Any) -> Any:
        """A tree like `params` (anything with `.ndim`) of "muon" and "adamw"."""
        import jax

        def one(path: str, x: Any) -> str:
            return "muon" if x.ndim >= 2 and not re.search(self.adamw, path) else "adamw"

        return jax.tree.map(one, dotted_paths(params), params)

    def transform(self) -> Any:
        """Two transforms, each for its group."""
        import jax
        import optax

        def dims(params: Any) -> Any:
            def one(x: Any) -> Any:
                rows = matrix_split(x.shape)
                return optax.contrib.MuonDimensionNumbers(tuple(range(rows)), tuple(range(rows, x.ndim)))

            return jax.tree.map(one, params)

        def to_rms(updates: Any, _: Any) -> Any:
            return jax.tree.map(lambda x: x * (self.update_rms * math.sqrt(max(matrix_shape(x.shape)))), updates)

        orthogonal = optax.contrib.scale_by_muon(
            ns_steps=self.newton_schulz_steps, beta=self.beta, eps=self.eps, weight_dimension_numbers=dims
        )
        adam = optax.scale_by_adam(b1=self.adamw_beta1, b2=self.adamw_beta2, eps=self.eps)
        return optax.partition({"muon": optax.chain(orthogonal, optax.stateless(to_rms)), "adamw": adam}, self.groups)


def matrix_split(shape: tuple[int, ...]) -> int:
    """How many leading dims of `shape` make the rows of its squarest matrix; the fewest on a tie."""
    return max(range(1, len(shape)), key=lambda k: min(math.prod(shape[:k]), math.prod(shape[k:])))


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, columns) of that matrix."""
    rows = matrix_split(shape)
    return math.prod(shape[:rows]), math.prod(shape[rows:])
