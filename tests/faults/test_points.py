"""A run that is stopped at any system call that changes its directory comes to the same end."""

import shutil
import subprocess
import sys

import pytest


@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler, and with it no way to stop a process at a system call")
def test_a_run_stopped_at_drawn_system_calls_comes_to_the_end_of_one_that_was_not():
    command = [sys.executable, "-m", "tests.faults.points", "--points", "3", "--seed", "20"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr[-2000:]
    assert "3 of 3 runs came to the same end" in run.stdout
