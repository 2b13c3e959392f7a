"""RunConfig: everything that decides what a run is, and what of it may change when the run goes on.

Whatever follows from other keys (the trainer's seed, the end of the decay) is filled in at validation, so a validated
config is complete: read back from its own JSON it is the same config, whatever the defaults are by then.
"""

import hashlib
import json
import sys
from collections.abc import Iterable
from typing import Any

from pydantic import Field, field_validator, model_validator

from trainer.config import Config, LoggerConfig, TrainerConfig
from trainer.dispatch import misfit
from trainer.mesh import MeshConfig
from trainer.models import AnyModelConfig, LlamaConfig
from trainer.objectives import AnyObjectiveConfig, LMObjectiveConfig
from trainer.optimizers import AdamWConfig, AnyOptimizerConfig, ScheduleConfig
from trainer.retention import CheckpointConfig

from .execution import ExecutionConfig
from .mixture import AnyDataConfig
from .prepare import TextDataConfig
from .publish import PublishConfig

# What changes neither weights nor rows: left out of the digest, free to change when a run goes on.
FREE = ("name", "mesh", "execution", "publish", "trainer.logger", "checkpoint.quota_gb")


class RunConfig(Config):
    """One training from data to report."""

    name: str = Field("run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)  # of the run directory
    seed: int = Field(0, ge=0, lt=2**32)  # fills trainer.seed, and takes it where only that is set
    num_steps: int = Field(1000, ge=1)
    chunk_steps: int = Field(250, ge=1)  # steps of a chunk, the unit of retrying; may exceed num_steps
    validate_every: int = Field(1, ge=1)  # chunks
    model: AnyModelConfig = LlamaConfig()
    objective: AnyObjectiveConfig = LMObjectiveConfig()
    data: AnyDataConfig = TextDataConfig()
    optimizer: AnyOptimizerConfig = AdamWConfig()
    trainer: TrainerConfig = TrainerConfig()
    mesh: MeshConfig = MeshConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    publish: PublishConfig = PublishConfig()
    execution: ExecutionConfig = ExecutionConfig()
    init: None = None  # reserved for starting from a run, a step or an import

    @field_validator("init", mode="before")
    @classmethod
    def _no_init_yet(cls, value: Any) -> None:
        if value is not None:
            raise ValueError("starting from other weights is not available yet; leave init null")

    @model_validator(mode="after")
    def _resolve(self) -> "RunConfig":
        self._check_trainer()
        self._resolve_trainer()
        self._resolve_schedule()
        self._check_vocabulary()
        self._check_shapes()
        self._check_dispatches()
        return self

    def _fill(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # frozen is meant for readers; this is still the making
        self.__pydantic_fields_set__.add(name)

    def _check_trainer(self) -> None:
        logger = self.trainer.logger
        if logger and logger.path:
            raise ValueError(
                f"trainer.logger.path {logger.path!r} is for TrainerModule.train_model; a run has its run directory: leave it out"
            )
        if logger and any(part.kind == "jsonl" for part in logger.parts):
            raise ValueError("trainer.logger.parts has jsonl, but a run writes metrics.jsonl by itself: leave it out")
        if any(callback.kind == "checkpoint" for callback in self.trainer.callbacks):
            raise ValueError(
                "trainer.callbacks has checkpoint, which is for TrainerModule.train_model; a run has checkpoint.every and chunk_steps"
            )

    def _resolve_trainer(self) -> None:
        given = self.trainer.model_fields_set
        changes: dict[str, Any] = {} if "logger" in given else {"logger": LoggerConfig()}  # rows are written unless null says no
        if self.seed != self.trainer.seed:
            if "seed" in given and "seed" in self.model_fields_set:
                raise ValueError(f"seed {self.seed} and trainer.seed {self.trainer.seed} differ; set one of them, the other follows")
            if "seed" in given:
                self._fill("seed", self.trainer.seed)
            else:
                changes["seed"] = self.seed
        if changes:
            self._fill("trainer", self.trainer.replace(**changes))

    def _resolve_schedule(self) -> None:
        schedule = self.optimizer.get("schedule")
        if not isinstance(schedule, ScheduleConfig):
            return  # an optimizer of the user's own may have another
        warmup, cooldown = schedule.warmup_steps, schedule.cooldown_steps
        if schedule.decay_steps is None and warmup + cooldown >= self.num_steps:
            after = f"optimizer.schedule.warmup_steps {warmup}" + (f" and cooldown_steps {cooldown}" if cooldown else "")
            shorter = "shorten them" if cooldown else f"set optimizer.schedule.warmup_steps={self.num_steps // 10}"
            raise ValueError(f"num_steps {self.num_steps} leaves nothing after {after}; {shorter} or raise num_steps")
        if schedule.depends_on_num_steps:
            self._fill("optimizer", self.optimizer.replace(schedule=schedule.replace(decay_steps=self.num_steps)))

    def _check_vocabulary(self) -> None:
        rows, tokenizer = self.model.get("vocab_size"), self.data.get("tokenizer")
        tokens = tokenizer.get("vocab_size") if isinstance(tokenizer, Config) else None
        if rows is not None and tokens is not None and tokens > rows:
            raise ValueError(
                f"data.tokenizer.vocab_size {tokens} is above model.vocab_size {rows}, and a token without a row cannot be "
                f"embedded; set model.vocab_size={tokens} or data.tokenizer.vocab_size={rows}"
            )

    def _check_shapes(self) -> None:
        longest, micro = self.model.get("max_positions"), self.trainer.gradient_accumulate_steps
        seq_len, batch_size = self.data.seq_len, self.data.batch_size
        if longest is not None and seq_len > longest:
            raise ValueError(
                f"data.seq_len {seq_len} is above model.max_positions {longest}; set model.max_positions={seq_len} or shorten the rows"
            )
        if batch_size % micro:
            fits = max(micro, batch_size // micro * micro)
            raise ValueError(
                f"data.batch_size {batch_size} cannot be cut into trainer.gradient_accumulate_steps {micro} equal microbatches; "
                f"set data.batch_size={fits}"
            )

    def _check_dispatches(self) -> None:
        logger = self.trainer.logger
        borders = {
            "num_steps": self.num_steps,
            "chunk_steps": self.chunk_steps if self.chunk_steps < self.num_steps else None,
            "checkpoint.every": self.checkpoint.every if isinstance(self.checkpoint.every, int) else None,  # a clock's finds a border
            "trainer.logger.log_every_n_steps": logger.log_every_n_steps if logger else None,
        }
        if problem := misfit(self.trainer.steps_per_dispatch, borders):
            raise ValueError(problem)


def has_onlookers(config: RunConfig) -> bool:
    """Whether the trainer has callbacks or loggers that want to be told of the run's end."""
    logger = config.trainer.logger
    return bool(config.trainer.callbacks or (logger and logger.parts))


def chunk_ends(config: RunConfig) -> list[int]:
    """The steps at which chunks end: the multiples of `chunk_steps` below `num_steps`, and `num_steps`."""
    return [*range(config.chunk_steps, config.num_steps, config.chunk_steps), config.num_steps]


def validates(config: RunConfig, end: int) -> bool:
    """Whether the chunk that ends with this step is validated."""
    return end == config.num_steps or end % (config.chunk_steps * config.validate_every) == 0


def config_digest(config: RunConfig) -> str:
    """SHA-256, in hex, of all that may shape what is trained: the canonical JSON without what is FREE."""
    data = config.to_dict()
    for path in FREE:
        *parents, key = path.split(".")
        place = data
        for parent in parents:
            place = place[parent]
        del place[key]
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Config, new: Config) -> list[tuple[str, Any, Any]]:
    """(dotted path, old value, new value) of the leaves that differ, in the order of the fields; None for a key that one lacks."""
    return _differences(old.to_dict(), new.to_dict(), "")


def _differences(old: Any, new: Any, path: str) -> list[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [d for k in keys for d in _differences(old.get(k), new.get(k), f"{path}.{k}" if path else k)]
    return [] if old == new else [(path, old, new)]


def resume_conflicts(old: RunConfig, new: RunConfig, *, place: int = sys.maxsize) -> list[str]:
    """Why a run of config `old` cannot go on under `new`, as lines "path: old -> new"; empty where it can.

    The mesh, execution, publish, trainer.logger and the name may change, num_steps as long as the learning rates of the steps
    stay what they were, and what is left out of the data after its first `place` batches.
    """
    found = {path: (a, b) for path, a, b in differences(old, new) if not _is_free(path)}
    if _before(old.data.leave_out, place) == _before(new.data.leave_out, place):
        found.pop("data.leave_out", None)
    lines = {path: f"{path}: {_show(a)} -> {_show(b)}" for path, (a, b) in found.items()}
    if "num_steps" in lines:
        decay = "optimizer.schedule.decay_steps"
        if not (_knows_its_schedule(old) and _knows_its_schedule(new)):
            lines["num_steps"] += " (whether the learning rate depends on it is not known); fork the run instead"
        elif decay in lines:
            lines[decay] += f" (it follows num_steps); set {decay}={found[decay][0]} to keep the schedule, or fork the run"
        else:
            del lines["num_steps"]
    return list(lines.values())


def _before(ranges: Iterable[tuple[int, int]], place: int) -> list[tuple[int, int]]:
    return [(a, min(b, place)) for a, b in ranges if a < place]


def _is_free(path: str) -> bool:
    return any(path == free or path.startswith(free + ".") for free in FREE)


def _knows_its_schedule(config: RunConfig) -> bool:
    return isinstance(config.optimizer.get("schedule"), ScheduleConfig)


def _show(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
