"""The index of objectives: one line each."""

from ..config import part_union
from .base import Objective, ObjectiveConfig
from .lm import LMObjectiveConfig

AnyObjectiveConfig = part_union(ObjectiveConfig, LMObjectiveConfig)

__all__ = ["AnyObjectiveConfig", "LMObjectiveConfig", "Objective", "ObjectiveConfig"]
