"""The index of loggers: one line each."""

from ..config import part_union
from .base import Logger, LoggerPartConfig
from .console import ConsoleLoggerConfig
from .csv import CsvLoggerConfig
from .jsonl import JsonlLoggerConfig
from .tensorboard import TensorBoardLoggerConfig
from .wandb import WandbLoggerConfig

AnyLoggerConfig = part_union(
    LoggerPartConfig,
    ConsoleLoggerConfig,
    CsvLoggerConfig,
    JsonlLoggerConfig,
    TensorBoardLoggerConfig,
    WandbLoggerConfig,
)

__all__ = [
    "AnyLoggerConfig",
    "ConsoleLoggerConfig",
    "CsvLoggerConfig",
    "JsonlLoggerConfig",
    "Logger",
    "LoggerPartConfig",
    "TensorBoardLoggerConfig",
    "WandbLoggerConfig",
]
