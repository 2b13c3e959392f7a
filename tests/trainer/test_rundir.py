"""The run directory: one writer, events that a crash cannot merge, rows that stand once."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer import rows
from trainer.errors import RunDirError
from trainer.rundir import RunDir, WriterLock

HOLDER = """
import sys, time
from trainer.rundir import RunDir, WriterLock
lock = WriterLock(RunDir(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_writer_is_refused_while_the_first_lives_and_let_in_when_it_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "held\n"
        lock = WriterLock(RunDir(tmp_path))
        with pytest.raises(RunDirError, match=f"process {holder.pid}"):
            lock.acquire(wait=0.3)
        holder.kill()
        lock.acquire(wait=0.3, wait_for_dying=5)
        lock.release()


def test_the_lock_is_held_until_every_process_that_shares_its_descriptor_is_dead(tmp_path):
    lock = WriterLock(RunDir(tmp_path))
    lock.acquire()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], pass_fds=[lock.fd])
    lock.release()
    other = WriterLock(RunDir(tmp_path))
    with pytest.raises(RunDirError):
        other.acquire(wait=0.2, wait_for_dying=0.2)
    child.send_signal(signal.SIGKILL)
    child.wait()
    other.acquire(wait=0.2)
    other.release()


def test_a_directory_that_cannot_be_made_is_refused_with_a_way_out(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirError, match="--run-dir"):
        WriterLock(RunDir(tmp_path / "file" / "run")).acquire()


def test_an_event_after_a_torn_line_is_whole(tmp_path):
    place = RunDir(tmp_path)
    place.event("started", pid=1)
    with open(place.events, "a") as f:
        f.write('{"time": 1.0, "eve')
    place.event("restored", step=3)
    assert [e["event"] for e in place.read_events()] == ["started", "restored"]
    assert place.read_events()[1]["step"] == 3


SPLITS = ["train", "val", "test"]


WRITTEN = st.lists(st.tuples(st.sampled_from(SPLITS), st.integers(0, 50), st.floats(allow_nan=False, allow_infinity=False)), max_size=30)


@given(WRITTEN, st.integers(0, 50), st.data())
def test_cutting_keeps_exactly_the_whole_rows_up_to_the_step_however_the_file_was_torn(tmp_path_factory, written, step, data):
    path = tmp_path_factory.mktemp("rows") / "metrics.jsonl"
    writer = rows.Rows(path)
    path.touch()
    lengths = []
    for split, at, value in written:
        before = path.stat().st_size
        writer.append(split, at, {"loss": value})
        lengths.append(path.stat().st_size - before)
    size = data.draw(st.integers(0, sum(lengths)))
    path.write_bytes(path.read_bytes()[:size])
    # A row is whole where all of it is there; its line's end may be missing.
    survived = [row for i, row in enumerate(written) if sum(lengths[: i + 1]) - 1 <= size]
    writer.cut(step)
    assert [(r["split"], r["step"], r["loss"]) for r in rows.read(path)] == [row for row in survived if row[1] <= step]
    assert path.read_bytes()[-1:] in (b"", b"\n")


def test_values_that_are_not_finite_become_null_and_stay_json(tmp_path):
    writer = rows.Rows(tmp_path / "metrics.jsonl")
    writer.append("val", 1, {"loss": float("nan"), "perplexity": float("inf"), "tokens_sum": 5})
    assert rows.find(writer.path, "val", 1) == {"loss": None, "perplexity": None, "tokens_sum": 5}


def test_values_of_clock_and_machine_are_told_by_their_first_word():
    values = {"time_step_s": 1, "throughput_tokens_per_s": 2, "mfu": 3, "memory_bytes": 4, "loss_mean": 5, "timeliness": 6}
    assert rows.stable(values) == {"loss_mean": 5, "timeliness": 6}


CHILD = """
import os, sys, time
from trainer.lifeline import die_with_parent
die_with_parent(int(sys.argv[1]))
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = """
import os, subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1], str(os.getpid())])
"""


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_process_dies_with_its_parent():
    with subprocess.Popen([sys.executable, "-c", PARENT, CHILD], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert _alive(pid)
        parent.kill()
    deadline = time.monotonic() + 5
    while _alive(pid):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.05)
