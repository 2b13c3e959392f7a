"""Next-token prediction over packed documents."""

from typing import Literal

from pydantic import Field

from .base import Objective, ObjectiveConfig


class LMObjectiveConfig(ObjectiveConfig):
    """Cross entropy of the next token, over tokens that are not padding."""

    kind: Literal["lm"] = "lm"
    z_loss: float = Field(0.0, ge=0)  # weight of (log Z)^2; PaLM (arXiv 2204.02311, section 5) uses 1e-4
    log_logit_stats: bool = False  # also norm, standard deviation and maximum of the logits

    def build(self) -> Objective:
        """The objective; its computation is in `cross_entropy.py`."""
        from .cross_entropy import LMObjective

        return LMObjective(self)
