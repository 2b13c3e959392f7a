"""Every error a user can meet, and whether trying again can help.

`retryable` is read by the tasks' `retry_condition_fn`; `exit_code` by the command line. A message names the value that
was wrong and the way out.
"""

import errno
from typing import Any

MEMORY_DIALS = (
    "raise trainer.gradient_accumulate_steps, lower data.batch_size, recompute more by model.remat, or cut the state over more devices "
    "by mesh.fsdp (`everstep plan --memory` says what is needed)"
)


class EverstepError(Exception):
    """The root of all errors raised on purpose."""

    retryable = False
    exit_code = 1


class ConfigError(EverstepError):
    """What was asked for cannot be: a wrong key, a value out of range, lengths or a mesh that do not fit."""

    exit_code = 2


class DataError(EverstepError):
    """The data is missing, empty or not the data the run was started on."""

    exit_code = 2


class RunDirError(EverstepError):
    """The run directory cannot be used: not writable, another run's, or written by another process."""

    exit_code = 2


class DiskError(EverstepError):
    """The disk is full, or files lost their rights, in the middle of the work; the last commit stands."""


class OutOfMemoryError(EverstepError):
    """A device or the host has not the memory that is needed; the same would be so again."""


class CheckpointError(EverstepError):
    """No checkpoint can be used, or one does not hold what was asked of it."""


class DamagedError(CheckpointError):
    """A checkpoint does not give back what was saved; another may."""


class StorageError(EverstepError):
    """A file or object store refused or lost something; trying again may help."""

    retryable = True


class TrainerDiedError(EverstepError):
    """The trainer process ended without an answer; a new one goes on from the last commit. `cause` is the same for deaths of a kind."""

    retryable = True

    def __init__(self, message: str, *, cause: str = ""):
        super().__init__(message)
        self.cause = cause


class TrainerHungError(TrainerDiedError):
    """The trainer process gave no sign of life or of progress and was killed."""


class TrainerFailedError(TrainerDiedError):
    """The system failed the trainer: a device, a disk, a network. It may not the next time."""


class CrashLoopError(EverstepError):
    """The trainer dies again and again without a new commit; what there is of evidence is named."""


class DivergedError(EverstepError):
    """Loss or gradients were not finite; the same step would be so again. `state` is that of the step before."""

    def __init__(self, message: str, *, step: int, state: Any = None):
        super().__init__(message)
        self.step, self.state = step, state


class RolledBackError(EverstepError):
    """The run went back to the commit of `step`, and goes on from there without some batches; this life is over."""

    retryable = True

    def __init__(self, message: str, *, step: int):
        super().__init__(message)
        self.step = step


class StoppedError(EverstepError):
    """A stop was asked for and obeyed: the run is committed at `step` and can be resumed."""

    exit_code = 75

    def __init__(self, message: str, *, step: int):
        super().__init__(message)
        self.step = step


_RIGHTS = (errno.EROFS, errno.EACCES, errno.EPERM)
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OF_THE_DEVICE = ("XlaRuntimeError", "JaxRuntimeError")


def of_the_system(error: BaseException, place: object) -> BaseException:
    """What the system did, rather than the program, as an error that says what to do; any other as it is."""
    made = _of_the_system(error, place)
    if made is not error:
        made.__cause__ = error
    return made


def _of_the_system(error: BaseException, place: object) -> BaseException:
    if isinstance(error, EverstepError):
        return error
    number, text = getattr(error, "errno", None) if isinstance(error, OSError) else None, str(error)
    if number in _FULL or "ENOSPC" in text or "No space left" in text:
        return DiskError(f"there is no room for {place}; make some (`everstep prune`), then go on with `everstep resume`")
    if number in _RIGHTS:
        return DiskError(f"{place} cannot be written any more: {text}; mend its rights, then go on with `everstep resume`")
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text:
        return OutOfMemoryError(f"out of memory: {text.splitlines()[0] if text else 'on the host'}; {MEMORY_DIALS}")
    if isinstance(error, OSError) or type(error).__name__ in _OF_THE_DEVICE:
        return TrainerFailedError(f"{type(error).__name__}: {text}", cause=type(error).__name__)
    return error


def final_status(error: BaseException) -> str:
    """What callbacks and loggers are told at the end of a life that ended so."""
    return "nan" if isinstance(error, DivergedError) else "stopped" if isinstance(error, StoppedError | RolledBackError) else "error"


def describe(error: BaseException) -> dict:
    """`error` in JSON terms, to cross a process border: class name, message, whether to retry, step and cause if it has them."""
    return {
        "type": type(error).__name__,
        "message": str(error),
        "retryable": bool(getattr(error, "retryable", False)),
        **{name: getattr(error, name) for name in ("step", "cause") if hasattr(error, name)},
    }


def revive(record: dict) -> EverstepError:
    """The typed error that `describe` wrote down; an unknown type becomes an EverstepError with the type in its message."""
    cls = globals().get(record["type"])
    if not (isinstance(cls, type) and issubclass(cls, EverstepError)):
        error = EverstepError(f"{record['type']}: {record['message']}")
        error.retryable = record["retryable"]
        return error
    if cls in (DivergedError, RolledBackError, StoppedError):
        return cls(record["message"], step=record["step"])
    if issubclass(cls, TrainerDiedError):
        return cls(record["message"], cause=record["cause"])
    return cls(record["message"])
