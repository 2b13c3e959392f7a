"""The index of callbacks: one line each."""

from ..config import part_union
from .base import Answer, Callback, CallbackPartConfig, Moment
from .checkpointing import CheckpointCallbackConfig
from .early_stopping import EarlyStoppingConfig
from .ema import EMAConfig
from .gradient_watcher import GradientWatcherConfig
from .lr_monitor import LRMonitorConfig
from .profiler import ProfilerConfig
from .summary import SummaryConfig
from .throughput import ThroughputConfig

AnyCallbackConfig = part_union(
    CallbackPartConfig,
    CheckpointCallbackConfig,
    EarlyStoppingConfig,
    EMAConfig,
    GradientWatcherConfig,
    LRMonitorConfig,
    ProfilerConfig,
    SummaryConfig,
    ThroughputConfig,
)

__all__ = [
    "Answer",
    "AnyCallbackConfig",
    "Callback",
    "CallbackPartConfig",
    "CheckpointCallbackConfig",
    "EMAConfig",
    "EarlyStoppingConfig",
    "GradientWatcherConfig",
    "LRMonitorConfig",
    "Moment",
    "ProfilerConfig",
    "SummaryConfig",
    "ThroughputConfig",
]
