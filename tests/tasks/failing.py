"""Trainers that fail at a step of their own accord, for runs whose config names them."""

import os
import signal
import time
from pathlib import Path

import numpy as np

from trainer import TrainerModule


class Failing(TrainerModule):
    """Calls `fail` instead of dispatching step 3."""

    def create_jitted_functions(self):
        super().create_jitted_functions()
        dispatch = self.train_step

        def step(*args):
            if self.global_step == 2:
                self.fail(args[2])
            return dispatch(*args)

        self.train_step = step

    def fail(self, batch):
        raise NotImplementedError


class Stuck(Failing):
    """Never comes back, the first time."""

    def fail(self, batch):
        marker = Path(self.log_dir) / "stuck"
        if not marker.exists():
            marker.touch()
            time.sleep(1000)


class Crashing(Failing):
    """Dies of the first batch that it gets at that step, as of a fault in a kernel, each time."""

    def fail(self, batch):
        tokens, poison = np.asarray(batch["targets"]).tobytes(), Path(self.log_dir) / "poison"
        if not poison.exists():
            poison.write_bytes(tokens)
        if poison.read_bytes() == tokens:
            os.kill(os.getpid(), signal.SIGSEGV)
