"""The index of optimizers: one line each."""

from ..config import part_union
from .adamw import AdamWConfig
from .base import Optimizer, OptimizerConfig
from .schedule import ScheduleConfig

AnyOptimizerConfig = part_union(OptimizerConfig, AdamWConfig)

__all__ = ["AdamWConfig", "AnyOptimizerConfig", "Optimizer", "OptimizerConfig", "ScheduleConfig"]
