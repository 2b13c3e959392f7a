"""The base of all configs, open unions of parts, and the trainer's own config.

A config is frozen, refuses unknown keys and imports no jax. A *part* is chosen by its `kind`: a name from the index of
its folder, or an import path (`my_pkg.mamba:MambaConfig`), so that parts may live in the user's own package.
"""

import importlib
import json
from typing import Annotated, Any, Literal, Self, Union

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    SerializeAsAny,
    Tag,
    TypeAdapter,
    field_validator,
    model_validator,
)

from .errors import ConfigError


class Config(BaseModel):
    """Base of every config: immutable, no unknown keys, equal by value, JSON in and out without loss."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, ser_json_inf_nan="strings")

    def get(self, key: str, default: Any = None) -> Any:
        """The value of field `key`, or `default` where there is no such field."""
        return getattr(self, key, default)

    def to_dict(self) -> dict[str, Any]:
        """All fields in JSON terms; `from_dict` is the exact inverse."""
        return json.loads(self.model_dump_json())  # model_dump(mode="json") leaves infinities, which are no JSON

    @staticmethod
    def from_dict(
        config_class: type,
        data: Any,
        strict_classname_parsing: bool = False,
        ignore_extensive_attributes: bool = False,
        none_to_zero_for_ints: bool = False,
    ) -> Any:
        """An object of `config_class` from what `to_dict` gave.

        Unknown keys are refused unless `ignore_extensive_attributes`. `strict_classname_parsing` refuses a `kind` that
        is an import path; `none_to_zero_for_ints` reads null as 0 in integer fields. Raises pydantic.ValidationError.
        """
        from . import fromdict  # a rare way in; kept out of the base

        return fromdict.parse(
            config_class,
            data,
            allow_import_paths=not strict_classname_parsing,
            drop_unknown=ignore_extensive_attributes,
            none_is_zero=none_to_zero_for_ints,
        )

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`, validated like any other config."""
        return type(self).model_validate({**self.model_dump(), **changes})


class PartConfig(Config):
    """Base of the config of a part. A built-in part narrows `kind` to its one name."""

    kind: str


def load_object(path: str) -> Any:
    """The object behind an import path `module.sub:Name`. Raises ConfigError if there is none."""
    module_name, _, name = path.partition(":")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError) as e:
        raise ConfigError(f"kind {path!r} cannot be imported: {e}; it must read package.module:ClassName") from e


def _load_custom(data: Any) -> Any:
    if not isinstance(data, dict):
        return data
    cls = load_object(data["kind"])
    if not (isinstance(cls, type) and issubclass(cls, PartConfig)):
        raise ConfigError(f"kind {data['kind']!r} is {cls!r}, not a subclass of PartConfig")
    return cls.model_validate(data)


def part_union(base: type[PartConfig], *members: type[PartConfig], default: str | None = None) -> Any:
    """The type of a config field that takes any of `members` by `kind`, or a subclass of `base` by import path.

    What names no kind is of kind `default`, or of the only one there is.
    """

    def tag(value: Any) -> str | None:
        kind = value.get("kind") if isinstance(value, dict) else getattr(value, "kind", None)
        if kind is None and isinstance(value, dict):
            return default or (names[0] if len(members) == 1 else None)
        return "import path" if isinstance(kind, str) and ":" in kind else kind

    names = [m.model_fields["kind"].default for m in members]
    tagged = [Annotated[m, Tag(n)] for m, n in zip(members, names, strict=True)]
    custom = Annotated[SerializeAsAny[base], BeforeValidator(_load_custom), Tag("import path")]  # type: ignore[valid-type]
    # Union is subscripted with a tuple made here, which no static `X | Y` can say
    return Annotated[Union[(*tagged, custom)], Discriminator(tag)]


LogMode = Literal["mean", "mean_nopostfix", "single", "max", "min", "std", "sum"]


def _part(index: str, union: str) -> Any:
    """A validator of parts whose index may only be imported once this module is whole."""

    def parse(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return TypeAdapter(getattr(importlib.import_module(index, __package__), union)).validate_python(value)

    return BeforeValidator(parse)


class LoggerConfig(Config):
    """Where metric rows go, and how often. The pipeline writes metrics.jsonl by itself; `parts` come on top."""

    log_every_n_steps: int = Field(50, ge=1)  # steps in a logging window; windows end at its multiples
    path: str | None = None  # train_model: the directory of logs and checkpoints; the pipeline has its run directory
    parts: tuple[Annotated[SerializeAsAny[PartConfig], _part(".loggers", "AnyLoggerConfig")], ...] = ()


class CallbackConfig(PartConfig):
    """Base of the configs of callbacks."""


class SpikeConfig(Config):
    """Which loss is a spike, and how far a rollback goes; see trainer.spikes and trainer.ledger."""

    num_losses: int = Field(64, ge=2)  # so many steps' losses say what is usual
    least_losses: int = Field(32, ge=2)  # before so many are known only a loss that is not finite is a spike
    deviations: float = Field(10.0, gt=0)  # above the median, in standard deviations, is a spike
    steps_before: int = Field(0, ge=0)  # rollback: the batches of so many steps before the spike are left out with its own
    max_rollbacks: int = Field(10, ge=0)  # rollback: of a run; what comes then is an error

    @model_validator(mode="after")
    def _enough(self) -> Self:
        if self.least_losses > self.num_losses:
            raise ValueError(
                f"least_losses {self.least_losses} is above num_losses {self.num_losses}; set num_losses={self.least_losses} or lower it"
            )
        return self


class TrainerConfig(Config):
    """How to train, whatever is trained. The fields of the reference API, with its defaults, then ours."""

    seed: int = Field(0, ge=0, lt=2**32)  # parameters and everything random in training
    debug: bool = False  # no jit: slow, but prints and breakpoints work
    donate_train_state: bool = True  # the step may reuse the buffers of the state it is given
    enable_progress_bar: bool = True  # on process 0 only
    gradient_accumulate_steps: int = Field(1, ge=1)  # microbatches per step
    gradient_accumulate_scan: bool = False  # one compiled microbatch in a scan, instead of an unrolled loop
    check_val_every_n_epoch: int = 1  # -1: off
    check_val_every_n_steps: int = -1  # -1: off
    check_for_nan: bool = True  # look at loss and gradients on the device at every step
    log_grad_norm: bool = True  # global norm of the whole batch's gradient, before clipping
    log_grad_norm_per_param: bool = False  # at the multiples of log_every_n_steps; other rows (a shorter last one) have null
    log_param_norm: bool = True  # global norm of the new parameters
    log_param_norm_per_param: bool = False
    log_intermediates: bool = False  # scalars that the model sows into "intermediates"
    default_train_log_modes: tuple[LogMode, ...] = ("mean",)
    intermediates_log_modes: tuple[LogMode, ...] = ("mean",)
    logger: LoggerConfig | None = None
    callbacks: tuple[Annotated[SerializeAsAny[CallbackConfig], _part(".callbacks", "AnyCallbackConfig")], ...] = ()
    seed_eval: int = Field(0, ge=0, lt=2**32)  # everything random in evaluation

    steps_per_dispatch: int = Field(1, ge=1)  # steps in one program call; all borders must be its multiples. Helps where steps are short
    on_nonfinite: Literal["stop", "skip"] = "stop"  # skip: leave the update out, count it, go on
    # Of a loss that is not finite or far above those before it. rollback, in a run of the pipeline: go back to a commit from before it,
    # and train without its batch. None: only on_nonfinite holds
    on_spike: Literal["stop", "skip", "rollback"] | None = None
    spike: SpikeConfig = SpikeConfig()
    kind: str = "default"  # or the import path of a TrainerModule subclass

    @field_validator("callbacks")
    @classmethod
    def _one_average(cls, value: tuple[CallbackConfig, ...]) -> tuple[CallbackConfig, ...]:
        if sum(callback.kind == "ema" for callback in value) > 1:
            raise ValueError("callbacks has ema more than once, and a validation has one row val_ema; keep one of them")
        return value

    @model_validator(mode="after")
    def _one_answer(self) -> Self:
        if self.on_spike in ("stop", "rollback") and self.on_nonfinite == "skip":
            raise ValueError(
                f"on_nonfinite=skip and on_spike={self.on_spike} differ, and what is not finite is a spike; leave on_nonfinite out"
            )
        if self.on_spike and not self.check_for_nan:
            raise ValueError(f"on_spike={self.on_spike} looks at every loss, but check_for_nan is off; leave it on, or on_spike out")
        return self

    @property
    def skips(self) -> bool:
        """Whether the update of a step that is refused is left out, and training goes on."""
        return "skip" in (self.on_spike, self.on_nonfinite)
