"""What goes on no more is found and replaced, what is only slow is left alone, and what will never work is given up with evidence."""

import os
import random
import signal
from pathlib import Path

import pytest

from tasks import watchdog
from tasks.child import Child
from tasks.lives import ELSEWHERE, SAME, verdict
from tasks.preparation import prepare
from tasks.watchdog import Activity, Watchdog, activity_of
from tasks.writer import writing
from trainer.errors import (
    CrashLoopError,
    DiskError,
    OutOfMemoryError,
    TrainerDiedError,
    TrainerFailedError,
    TrainerHungError,
    describe,
    of_the_system,
    revive,
)
from trainer.progress import PHASES, Place, Progress, shared_memory


class World:
    """A process and a clock to be watched: `go` lets time pass in looks of a tenth of a second, and says when it was given up."""

    def __init__(self, *, seen=None, patience=1.0):
        self.now, self.place, self.activity = 0.0, Place("step", 0, 0, 0, 0), Activity(False, 0, False)
        self.beats, self.works = True, False
        self.dog = Watchdog(lambda: self.place, self._activity, {} if seen is None else seen, patience=patience, clock=lambda: self.now)

    def _activity(self):
        return self.activity._replace(work=int(self.now * 100) if self.works else 0)

    def go(self, seconds, *, unit=None, phase=None):
        began = last = self.now
        while self.now < began + seconds:
            self.now += 0.1
            if self.beats and int(self.now * 2) != self.place.beats:
                self.place = self.place._replace(beats=int(self.now * 2))
            if phase and phase != self.place.phase:
                self.place = self.place._replace(phase=phase, units=self.place.units + 1)
            if unit and self.now - last >= unit:
                last = self.now
                self.place = self.place._replace(units=self.place.units + 1)
            if why := self.dog.look():
                return self.now - began, why
        return None


@pytest.mark.parametrize(("unit", "limit"), [(0.2, 10), (0.5, 10), (3.0, 30)])
def test_a_thread_that_gets_nothing_done_is_stuck_after_ten_of_its_usual_steps_or_ten_seconds(unit, limit):
    world = World()
    assert world.go(60, unit=unit) is None
    seconds, why = world.go(1000)
    assert limit - unit <= seconds <= limit * 1.1 + 0.5 and "nothing got done" in why


def test_before_a_step_was_seen_and_in_a_users_code_a_generous_limit_holds():
    world = World()
    assert world.go(590) is None and world.go(20) is not None
    world = World()
    assert world.go(30, unit=0.1, phase="callbacks") is None
    assert world.go(500) is None  # a callback that took a millisecond before writes a trace now
    assert world.go(1700, phase="compile") is None
    assert World(seen={"imports": 1.0}).go(170, phase="imports") is None


def test_what_a_phase_took_in_an_earlier_life_counts_in_the_next():
    seen = {}
    World(seen=seen).go(60, unit=2.0)
    assert 19 <= World(seen=seen).go(1000)[0] <= 23
    assert 38 <= World(seen=seen, patience=2.0).go(1000)[0] <= 46  # another life was given up for that reason before


@pytest.mark.parametrize("phase", ["compile", "save", "restore", "data"])
def test_a_process_at_work_on_what_may_take_long_is_left_alone_and_an_idle_one_is_not(phase):
    world = World(seen={phase: 0.5})
    world.works = True
    assert world.go(400, phase=phase) is None
    world.works = False
    assert 0 <= world.go(20, phase=phase)[0] <= 3
    world = World(seen={phase: 0.5})
    world.activity = Activity(stopped=False, work=0, waits_for_disk=True)
    assert world.go(400, phase=phase) is None


def test_a_process_without_a_beat_is_given_up_in_any_phase_unless_it_works():
    for phase in set(PHASES) - {"imports"}:
        world = World()
        world.go(1, phase=phase)
        world.beats = False
        seconds, why = world.go(1000)
        assert 10 <= seconds <= 12.5 and "no sign of life" in why, phase
    world = World()
    world.beats, world.works = False, True
    assert world.go(59) is None and world.go(5) is not None
    world = World()
    world.beats, world.activity = False, Activity(stopped=True, work=0, waits_for_disk=True)
    seconds, why = world.go(1000)
    assert 10 <= seconds <= 11.5 and "a signal stopped it" in why


def test_nobody_is_late_after_a_sleep_of_the_whole_machine():
    world = World()
    world.go(5, unit=0.1)
    world.now += 3600  # nor after a jump of the clock
    assert world.dog.look() is None and world.go(60, unit=0.1) is None


def test_the_kernel_tells_of_a_process_whether_it_works(tmp_path):
    before = activity_of(os.getpid())
    (tmp_path / "file").write_bytes(bytes(10_000_000))
    after = activity_of(os.getpid())
    assert after.work - before.work > 9_000 and not after.stopped


def test_progress_can_be_read_by_whoever_shares_the_memory():
    fd = shared_memory()
    mine, theirs = Progress(fd), Progress(fd)
    mine.start()
    assert theirs.read() == Place("imports", -1, 0, 0, 0)
    with mine.within("step"):
        mine.completed(7)
        with mine.within("save"):
            assert theirs.read().phase == "save"
        mine.beat()
        assert theirs.read()[:2] == ("step", 7) and theirs.read().beats == 1
    assert theirs.read().phase == "imports" and theirs.read().units == 5


def test_three_deaths_in_a_row_at_one_step_of_one_cause_are_final_and_any_others_only_after_ten():
    death = {"event": "killed", "phase": "step", "step": 6, "cause": "exit -11"}
    started, committed = {"event": "started", "attempt": 1}, {"event": "committed", "step": 5}
    assert verdict([started, death, death]) is None
    assert "step 7 (exit -11)" in verdict([started, committed, *[death] * SAME])
    for reset in (committed, started):
        assert verdict([death, death, reset, death]) is None
    compiling = {**death, "phase": "compile"}  # with the first step of a life
    assert verdict([death, compiling, compiling]) is not None and verdict([compiling] * SAME) is None
    assert verdict([death, {"event": "started", "attempt": 2}, death, death]) is not None  # the flow run's next try is the same run
    for other in ({"step": 7}, {"cause": "hung"}):
        assert verdict([death, {**death, **other}, death]) is None
    elsewhere = [{**death, "phase": p} for p in ("save", "compile", "restore")]
    rng = random.Random(3)
    deaths = [rng.choice(elsewhere) for _ in range(ELSEWHERE - 1)]
    assert verdict(deaths) is None
    assert "10 times" in verdict([*deaths, elsewhere[0]])
    spread = [{**death, "step": i} for i in range(50)]
    assert verdict(spread) is None  # it moves about: the machine's fault


def test_what_the_system_did_is_a_typed_error_that_says_what_to_do_and_what_the_program_did_is_left_as_it_is():
    class JaxRuntimeError(RuntimeError):
        pass

    full = of_the_system(OSError(28, "No space left on device"), "runs/a")
    assert isinstance(full, DiskError) and "runs/a" in str(full) and not full.retryable and full.exit_code == 1
    assert isinstance(of_the_system(ValueError("write failed [OS error 28: ENOSPC No space left on device]"), "x"), DiskError)
    assert isinstance(of_the_system(PermissionError(13, "Permission denied"), "x"), DiskError)
    for error in (MemoryError(), JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")):
        found = of_the_system(error, "x")
        assert isinstance(found, OutOfMemoryError) and "gradient_accumulate_steps" in str(found) and not found.retryable
    for error in (OSError(5, "Input/output error"), JaxRuntimeError("INTERNAL: the device is lost")):
        found = revive(describe(of_the_system(error, "x")))
        assert isinstance(found, TrainerFailedError) and found.retryable and found.cause == type(error).__name__
    bug = KeyError("loss")
    assert of_the_system(bug, "x") is bug


@pytest.fixture
def quick(monkeypatch):
    """Ten seconds are three."""
    monkeypatch.setattr(watchdog, "LEAST", 3.0)


def opened(writer):
    writer.session.data = Path(prepare(writer.config.data).path)
    writer.session.open()
    return writer.session


def test_a_training_thread_that_is_stuck_while_its_process_lives_is_found_its_stacks_are_logged_and_it_is_replaced(
    micro, tmp_path, quick, caplog
):
    with writing(micro("execution.mode=process", "trainer.kind=tests.tasks.failing:Stuck", "chunk_steps=1"), tmp_path / "run") as writer:
        session = opened(writer)
        session.train_until(1)
        session._seen["step"] = 0.1  # so quick a step may be seen by nobody
        with pytest.raises(TrainerHungError, match=r"in phase step after step 2: nothing got done for [34] s"):
            session.train_until(3)
        assert session.train_until(3).step == 3
    stacks = next(r.getMessage() for r in caplog.records if "stacks of the trainer process" in r.getMessage())
    assert "failing.py" in stacks and "in fail" in stacks
    (killed,) = [e for e in writer.run_dir.read_events() if e["event"] == "killed"]
    assert (killed["phase"], killed["step"], killed["cause"]) == ("step", 2, "hung")


def test_a_step_that_kills_every_trainer_is_given_up_with_the_documents_of_its_batch(micro, tmp_path):
    config = ("execution.mode=process", "trainer.kind=tests.tasks.failing:Crashing")
    with writing(micro(*config), tmp_path / "run") as writer:
        session = opened(writer)
        session.train_until(2)
        for _ in range(SAME - 1):
            with pytest.raises(TrainerDiedError, match=r"SIGSEGV.* in phase (step|compile) after step 2"):
                session.train_until(4)
        with pytest.raises(CrashLoopError, match=r"3 times in a row at step 3 .*data.leave_out=\[\[2,3\]\]") as final:
            session.train_until(4)
    assert not final.value.retryable
    text = (tmp_path / "run" / "logs" / "batch-00000003.txt").read_text()
    assert text.count("--- row") == 4
    leaving_out = micro(*config, "data.leave_out=[[2,3]]")  # which is the same run: nothing of it was trained yet
    with writing(leaving_out, tmp_path / "run") as writer:
        opened(writer).train_until(4)


def test_a_spare_that_is_stopped_is_found_when_it_is_needed_and_replaced(micro, tmp_path, quick):
    with writing(micro("execution.mode=process"), tmp_path / "run") as writer:
        session = opened(writer)
        session.train_until(2)
        assert isinstance(session._spare, Child)
        session._spare.process.send_signal(signal.SIGSTOP)
        session._child.process.kill()
        session._child.process.wait()
        with pytest.raises(TrainerHungError, match="a signal stopped it"):
            session.train_until(4)
        assert session.train_until(4).step == 4
