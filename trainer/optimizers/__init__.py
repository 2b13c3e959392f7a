"""The index of optimizers: one line each."""

from typing import Annotated, Any

from pydantic import BeforeValidator

from ..config import part_union
from .adafactor import AdafactorConfig
from .adam import AdaMaxConfig, AdamConfig, AdamWConfig, NAdamConfig, RAdamConfig
from .base import ChainConfig, Optimizer, OptimizerConfig
from .lamb import LambConfig
from .lion import LionConfig
from .muon import MuonConfig
from .schedule import ScheduleConfig
from .schedule_free import ScheduleFreeAdamWConfig
from .sgd import SGDConfig

BUILT_IN = (
    AdamWConfig,
    AdamConfig,
    SGDConfig,
    NAdamConfig,
    RAdamConfig,
    AdaMaxConfig,
    LionConfig,
    AdafactorConfig,
    LambConfig,
    MuonConfig,
    ScheduleFreeAdamWConfig,
)


def _adamw_by_default(data: Any) -> Any:
    return {"kind": "adamw", **data} if isinstance(data, dict) else data


def _any() -> Any:
    return Annotated[part_union(OptimizerConfig, *BUILT_IN), BeforeValidator(_adamw_by_default)]


AnyOptimizerConfig = _any()

__all__ = [
    "BUILT_IN",
    "AdaMaxConfig",
    "AdafactorConfig",
    "AdamConfig",
    "AdamWConfig",
    "AnyOptimizerConfig",
    "ChainConfig",
    "LambConfig",
    "LionConfig",
    "MuonConfig",
    "NAdamConfig",
    "Optimizer",
    "OptimizerConfig",
    "RAdamConfig",
    "SGDConfig",
    "ScheduleConfig",
    "ScheduleFreeAdamWConfig",
]
