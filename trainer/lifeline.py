"""Ties a child process to its parent's life: when the parent is gone, however it went, the child is killed by the kernel.

The kernel watches the *thread* that spawned the child, so whoever spawns must be a thread that lives as long as the
process. Called as a child's first statement, hence nothing but the interpreter's own modules is imported here.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Have this process killed at once when the thread that spawned it ends; exit now if `parent_pid` is not the parent any more.

    Where the system has no prctl (macOS) or refuses it, only the second half holds.
    """
    try:
        failed = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0
        reason = os.strerror(ctypes.get_errno())
    except (OSError, AttributeError, TypeError) as e:
        failed, reason = True, str(e)
    if failed:
        import logging

        logging.getLogger(__name__).debug("no parent-death signal on %s: %s", sys.platform, reason)
    if os.getppid() != parent_pid:  # it died before the kernel was asked to watch it
        os._exit(1)
