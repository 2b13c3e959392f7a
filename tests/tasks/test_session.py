"""The trainer's process: the same bits as inline, replaced when it is killed, obedient to a stop, gone with its parent."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tasks.preparation import prepare
from tasks.session import ProcessSession
from tasks.stop import StopRequests
from tasks.writer import writing
from trainer.checkpoint import verify
from trainer.errors import ConfigError, RunDirError, StoppedError, TrainerDiedError, TrainerHungError
from trainer.rundir import RunDir


def digests(path):
    return {row["step"]: row["state_sha256"] for row in verify(path) if row["ok"]}


def train_all(writer, *, until=6, every=2):
    writer.session.data = Path(prepare(writer.config.data).path)
    writer.session.open()
    for step in range(every, until + 1, every):
        writer.session.train_until(step)


@pytest.fixture(scope="module")
def inline(tmp_path_factory):
    return tmp_path_factory.mktemp("inline") / "run"


@pytest.fixture
def reference(inline, micro):
    """The digests of an inline run that nothing happened to."""
    if not inline.exists():
        with writing(micro("name=reference"), inline) as writer:
            train_all(writer)
    return digests(inline)


@pytest.fixture
def started(reference, micro, tmp_path):
    """A writer whose trainer is a process, with step 0 committed."""
    with writing(micro("execution.mode=process"), tmp_path / "run") as writer:
        writer.session.data = Path(prepare(writer.config.data).path)
        writer.session.open()
        yield writer


def test_a_process_trains_the_same_bits_as_inline_through_kills_of_it_and_of_its_spare(started, reference):
    session = started.session
    session.train_until(2)
    first = session._child.process
    first.kill()
    first.wait()
    session.train_until(4)  # it died while nobody waited: replaced without a word to the caller
    second = session._child.process
    assert second.pid != first.pid
    session._spare.process.kill()
    started.listeners.append(lambda kind, value: second.kill() if kind == "row" else None)
    with pytest.raises(TrainerDiedError, match="SIGKILL") as died:
        session.train_until(100_000)  # it dies in the middle of a call
    assert died.value.retryable
    assert session.train_until(6).step == 6
    assert digests(started.run_dir.path) == reference
    killed = [e["pid"] for e in started.run_dir.read_events() if e["event"] == "killed"]
    assert killed == [first.pid, second.pid]


def test_a_stopped_process_is_found_killed_and_replaced(started, reference, monkeypatch):
    monkeypatch.setattr("tasks.watchdog.LEAST", 3.0)
    started.session._child.process.send_signal(signal.SIGSTOP)
    with pytest.raises(TrainerHungError, match="a signal stopped it") as hung:
        started.session.train_until(2)
    assert hung.value.retryable
    started.session.train_until(2)
    assert digests(started.run_dir.path)[2] == reference[2]


def test_a_stop_signal_lets_the_step_end_and_commits_and_is_never_raised_in_the_middle(started, reference):
    before = signal.getsignal(signal.SIGTERM)
    seen = []
    started.listeners.append(lambda kind, value: seen.append(kind) if kind == "row" and value[1] >= 3 else None)
    killer = threading.Thread(target=lambda: (wait_for(lambda: seen), os.kill(os.getpid(), signal.SIGTERM)))
    killer.start()
    with pytest.raises(StoppedError) as stopped, started.stops.held():
        started.session.train_until(100_000)
    killer.join()
    newest = verify(started.run_dir.path)[-1]
    assert newest["ok"] and 3 <= newest["step"] == stopped.value.step < 100_000
    assert signal.getsignal(signal.SIGTERM) is before


def test_signals_are_noted_in_a_body_and_cut_off_only_what_may_be_cut_off():
    stops = StopRequests()
    with stops.held():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)  # a closing terminal sends several
        assert stops.asked
        with pytest.raises(StoppedError), stops.interruptible():
            raise AssertionError("a request that came before is seen at once")
    stops = StopRequests()
    with pytest.raises(StoppedError), stops.held(), stops.interruptible():
        os.kill(os.getpid(), signal.SIGTERM)  # SIGINT is ignored by what a shell started in the background
        time.sleep(5)


def test_a_signal_that_the_process_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        stops = StopRequests()
        with stops.held():
            os.kill(os.getpid(), signal.SIGHUP)
        assert not stops.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def wait_for(condition, timeout=60):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_config_that_does_not_fit_the_devices_is_a_typed_error_from_the_process(micro, tmp_path):
    with writing(micro("execution.mode=process", "mesh.fsdp=3"), tmp_path / "run") as writer:
        with pytest.raises(ConfigError, match="fsdp=3"):
            writer.session.start()


FLOW = """
import sys, time
from pathlib import Path
from configs.load import read_config
from tasks.writer import writing
with writing(read_config(Path(sys.argv[1])), sys.argv[1]) as writer:
    writer.session.start()
    print(writer.session._child.process.pid, flush=True)
    time.sleep(60)
"""


def test_the_trainer_dies_with_a_killed_parent_and_the_run_directory_is_free(micro, tmp_path):
    path = tmp_path / "run"
    with writing(micro("execution.mode=process"), path):
        pass
    with subprocess.Popen([sys.executable, "-c", FLOW, str(path)], stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), timeout=10)
    with writing(micro("execution.mode=process"), path):
        pass


def test_a_directory_of_another_config_is_refused_field_by_field_and_left_alone(micro, tmp_path):
    path = tmp_path / "run"
    with writing(micro(), path) as writer:
        writer.session.data = Path(prepare(writer.config.data).path)
        writer.session.open()
    before = RunDir(path).config.read_bytes()
    with pytest.raises(ConfigError, match=r"optimizer.schedule.lr: 0.004 -> 0.5"):
        with writing(micro("optimizer.schedule.lr=0.5"), path):
            pass
    assert RunDir(path).config.read_bytes() == before


def test_a_config_may_be_corrected_until_something_is_committed(micro, tmp_path):
    with writing(micro("data.path=/nowhere"), tmp_path / "run"):
        pass
    with writing(micro(), tmp_path / "run") as writer:
        assert writer.config == micro()


def test_one_process_writes_one_run_at_a_time(micro, tmp_path):
    with writing(micro(), tmp_path / "a") as writer:
        with writing(micro(), tmp_path / "a") as again:
            assert again is writer
        with pytest.raises(RunDirError, match="already"):
            with writing(micro(), tmp_path / "b"):
                pass


def test_the_spare_has_its_imports_done_and_no_backend(started):
    started.session.train_until(2)
    spare = started.session._spare
    wait_for(lambda: (spare.receive(0.1) or [None])[0] == "ready")
    assert isinstance(started.session, ProcessSession)
    assert "jaxlib" in Path(f"/proc/{spare.process.pid}/maps").read_text()
    assert "tf_XLAEigen" in threads(started.session._child) and "tf_XLAEigen" not in threads(spare)


def threads(child):
    return {(t / "comm").read_text().strip() for t in Path(f"/proc/{child.process.pid}/task").iterdir()}


def test_a_trace_that_is_under_way_when_a_session_ends_is_kept_because_callbacks_are_told(micro, tmp_path):
    config = micro("execution.mode=process", "trainer.callbacks=[{kind: profiler, first_step: 2, num_steps: 100}]")
    with writing(config, tmp_path / "run") as writer:
        writer.session.data = Path(prepare(writer.config.data).path)
        writer.session.open()
        writer.session.train_until(4)
    assert list((tmp_path / "run").glob("profile/plugins/profile/*/*.xplane.pb"))
