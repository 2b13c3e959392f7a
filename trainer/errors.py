"""Every error a user can meet, and whether trying again can help.

`retryable` is read by the tasks' `retry_condition_fn`; `exit_code` by the command line. A message names the value that
was wrong and the way out.
"""

from typing import Any


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


class CheckpointError(EverstepError):
    """No checkpoint can be used, or one does not hold what was asked of it."""


class DamagedError(CheckpointError):
    """A checkpoint does not give back what was saved; another may."""


class StorageError(EverstepError):
    """A file or object store refused or lost something; trying again may help."""

    retryable = True


class TrainerDiedError(EverstepError):
    """The trainer process ended without an answer; a new one goes on from the last commit."""

    retryable = True


class TrainerHungError(TrainerDiedError):
    """The trainer process gave no sign of life or of progress and was killed."""


class DivergedError(EverstepError):
    """Loss or gradients were not finite; the same step would be so again. `state` is that of the step before."""

    def __init__(self, message: str, *, step: int, state: Any = None):
        super().__init__(message)
        self.step, self.state = step, state


class StoppedError(EverstepError):
    """A stop was asked for and obeyed: the run is committed at `step` and can be resumed."""

    exit_code = 75

    def __init__(self, message: str, *, step: int):
        super().__init__(message)
        self.step = step


def of_the_system(error: BaseException, place: object) -> BaseException:
    """An error of the disk as a RunDirError that says what to do; any other as it is."""
    import errno

    if not isinstance(error, OSError) or error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM):
        return error
    made = RunDirError(f"{place} cannot be written: {error.strerror}; make room or mend its rights, then go on with `everstep resume`")
    made.__cause__ = error
    return made


def final_status(error: BaseException) -> str:
    """What callbacks and loggers are told at the end of a life that ended so."""
    return "nan" if isinstance(error, DivergedError) else "stopped" if isinstance(error, StoppedError) else "error"


def describe(error: BaseException) -> dict:
    """`error` in JSON terms, to cross a process border: class name, message, whether to retry, and its step if it has one."""
    return {
        "type": type(error).__name__,
        "message": str(error),
        "retryable": bool(getattr(error, "retryable", False)),
        "step": getattr(error, "step", None),
    }


def revive(record: dict) -> EverstepError:
    """The typed error that `describe` wrote down; an unknown type becomes an EverstepError with the type in its message."""
    cls = globals().get(record["type"])
    if not (isinstance(cls, type) and issubclass(cls, EverstepError)):
        error = EverstepError(f"{record['type']}: {record['message']}")
        error.retryable = record["retryable"]
        return error
    if cls in (DivergedError, StoppedError):
        return cls(record["message"], step=record["step"])
    return cls(record["message"])
