"""Callbacks and loggers in a run of the pipeline: however it is cut into lives they see, decide and have the same."""

import csv
from typing import Literal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.lives import digests, stable_rows
from trainer import rows
from trainer.callbacks import Answer, Callback, CallbackPartConfig
from trainer.errors import ConfigError
from trainer.follow import Follower
from trainer.rundir import read_lines

EMA = "trainer.callbacks=[{kind: ema, decay: 0.5}]"
STOPS_AT_ONCE = "trainer.callbacks=[{kind: early_stopping, monitor: loss, patience: 1, min_delta: 100.0}]"


def test_averaged_parameters_are_committed_and_evaluated_the_same_in_one_life_and_in_many(life, tmp_path):
    one, many = tmp_path / "one", tmp_path / "many"
    run = life(one, EMA)
    run.open()
    for step in (2, 4, 6):
        run.train_until(step)
        run.evaluate(step, "val")
    run.close()
    for step in (2, 4, 6):
        run = life(many, EMA)
        run.open()
        run.train_until(step)
        run.close()
        run = life(many, EMA)  # and once more between the commit and its validation
        run.open()
        run.evaluate(step, "val")
        run.close()
    assert digests(many) == digests(one)
    assert stable_rows(many) == stable_rows(one)
    ema, val = (stable_rows(one)[split, 6]["loss"] for split in ("val_ema", "val"))
    assert ema != val, "the average is other parameters than the state's"


def test_without_the_average_in_its_checkpoint_a_resumed_run_would_differ(life, tmp_path):
    place = tmp_path / "forgetful"
    for step in (2, 4, 6):
        run = life(place, EMA)
        run.open()
        run.onlookers.set_state({}, stop_reason=None)
        run.train_until(step)
        run.close()
    one = tmp_path / "one"
    run = life(one, EMA)
    run.open()
    for step in (2, 4, 6):
        run.train_until(step)
    run.close()
    assert digests(place)[6] != digests(one)[6]


def test_early_stopping_decided_after_a_commit_is_decided_again_by_a_life_that_did_not_see_it(life, tmp_path):
    run = life(tmp_path / "run", STOPS_AT_ONCE)
    assert run.open().stop is None
    run.evaluate(0, "val")
    run.train_until(2)
    run.evaluate(2, "val")
    seen = run.train_until(4)
    run.close()
    assert seen.step == 2 and "was not better" in seen.stop
    run = life(tmp_path / "run", STOPS_AT_ONCE)
    assert run.open() == seen
    assert run.train_until(4) == seen, "a life that never validated knows it too"
    run.close()
    told = [e for e in run.run_dir.read_events() if e["event"] == "early_stop"]
    assert [(e["step"], e["reason"]) for e in told] == [(2, seen.stop)], "and the log has it once"


def test_an_early_end_that_no_life_lived_to_tell_is_told_by_the_next_one_as_it_opens(life, tmp_path):
    run = life(tmp_path / "run", STOPS_AT_ONCE)
    run.open()
    run.evaluate(0, "val")
    run.train_until(2)
    run.evaluate(2, "val")
    run.close()  # between the validation that decides and the chunk that would have obeyed
    run = life(tmp_path / "run", STOPS_AT_ONCE)
    assert run.open().stop, "so the flow asks for no further chunk"
    run.close()
    assert [e["step"] for e in run.run_dir.read_events() if e["event"] == "early_stop"] == [2]


def test_a_run_that_is_through_did_not_end_early_whatever_its_last_validation_says(life, tmp_path):
    for last in (2, 4, 6):
        run = life(tmp_path / "run", STOPS_AT_ONCE if last == 6 else "num_steps=6")
        run.open()
        run.train_until(last)
        if last != 2:
            run.evaluate(last, "val")
        run.close()
    run = life(tmp_path / "run", STOPS_AT_ONCE)
    run.open()
    run.close()
    assert not [e for e in run.run_dir.read_events() if e["event"] == "early_stop"]


class WitnessConfig(CallbackPartConfig):
    kind: Literal["tests.trainer.test_onlookers:WitnessConfig"] = "tests.trainer.test_onlookers:WitnessConfig"

    def build(self):
        return Witness()


class Witness(Callback):
    """Writes down which state it is shown at the end and around the test."""

    def __init__(self):
        self.seen = {}

    def _see(self, hook, moment):
        self.seen[hook] = int(moment.state.step), np.array(moment.state.params["embed"])
        return Answer()

    def on_training_end(self, moment):
        return self._see("end", moment)

    def on_test_epoch_start(self, moment):
        return self._see("test start", moment)

    def on_test_epoch_end(self, moment):
        return self._see("test end", moment)


def test_around_a_test_callbacks_see_the_state_that_is_tested_and_at_the_end_of_training_the_last_one(life, tmp_path):
    run = life(tmp_path / "run", "trainer.callbacks=[{kind: 'tests.trainer.test_onlookers:WitnessConfig'}]")
    run.open()
    run.train_until(2)
    best = np.array(run.trainer.state.params["embed"])
    run.train_until(4)
    last = run.trainer.state
    run.evaluate(2, "test", row=4)
    assert run.trainer.state is last and run.step == 4
    run.close()
    seen = run.trainer.callbacks[0].seen
    assert {hook: step for hook, (step, _) in seen.items()} == {"end": 4, "test start": 2, "test end": 2}
    np.testing.assert_array_equal(seen["test end"][1], best)
    np.testing.assert_array_equal(seen["end"][1], last.params["embed"])


class RowJudgeConfig(CallbackPartConfig):
    kind: Literal["tests.trainer.test_onlookers:RowJudgeConfig"] = "tests.trainer.test_onlookers:RowJudgeConfig"
    announced: bool = True

    def build(self):
        judge = RowJudge()
        judge.decides_on_rows = self.announced
        return judge


class RowJudge(Callback):
    """Has enough of the first row."""

    def on_row(self, moment):
        return Answer(stop="enough", values={"judged": 1})


@pytest.mark.parametrize("often", [(), ("checkpoint.every=1",)])
def test_what_a_row_decides_takes_effect_at_its_step_however_often_the_run_commits(life, tmp_path, often):
    config = "trainer.callbacks=[{kind: 'tests.trainer.test_onlookers:RowJudgeConfig'}]"
    run = life(tmp_path / "run", config, *often)
    run.open()
    found = run.train_until(4) if run.step < 4 else None
    run.close()
    assert found.step == 3 and found.stop == "enough"
    assert stable_rows(tmp_path / "run")["train", 3]["judged"] == 1
    run = life(tmp_path / "run", config, *often)
    assert run.open() == found, "the decision is part of the commit: this life sees no row"
    run.close()


def test_a_decision_at_a_step_that_may_be_in_flight_is_refused(life, tmp_path):
    run = life(tmp_path / "run", "trainer.callbacks=[{kind: 'tests.trainer.test_onlookers:RowJudgeConfig', announced: false}]")
    run.open()
    with pytest.raises(ConfigError, match="decides_on_rows"):
        run.train_until(6)
    run.close()


def test_hooks_of_a_trainer_of_ones_own_are_called_in_a_run(life, tmp_path):
    run = life(tmp_path / "run", "trainer.kind=tests.trainer.test_onlookers:Listening")
    run.open()
    run.evaluate(0, "val")
    run.train_until(6)
    run.evaluate(6, "val")
    run.evaluate(6, "test", row=6)
    run.conclude()
    run.close()
    assert run.trainer.heard == ["start", "to val 0", "val 0", "to val 6", "val 6", "end", "test"]
    assert stable_rows(tmp_path / "run")["val", 6]["heard"] == 5, "and what they add is in the row"


def test_a_life_that_hears_of_a_validation_before_it_hears_of_its_start_too(life, tmp_path):
    for _ in range(2):
        run = life(tmp_path / "run", "trainer.kind=tests.trainer.test_onlookers:Listening")
        run.open()
        run.evaluate(0, "val")
        run.close()
    assert run.trainer.heard == ["start", "to val 0", "val 0"]


def test_loggers_have_every_committed_row_once_however_the_run_is_cut(life, tmp_path):
    place, parts = tmp_path / "run", "trainer.logger.parts=[{kind: csv}, {kind: tensorboard}]"
    for step in (2, 4, 6):
        run = life(place, parts)
        run.open()
        run.train_until(step)
        run.evaluate(step, "val")
        run.trainer.loggers = []  # killed: nobody is told of an end
        run.close()
    run = life(place, parts)
    run.open()
    run.evaluate(6, "test", row=6)
    run.conclude()
    run.close()
    for split in ("train", "val", "test"):
        with open(place / f"metrics-{split}.csv", newline="") as f:
            table = {int(row["step"]): row for row in csv.DictReader(f)}
        wanted = {r["step"]: rows.values_of(r) for r in rows.read(place / "metrics.jsonl") if r["split"] == split}
        assert table.keys() == wanted.keys()
        for step, values in wanted.items():
            assert {k: float(v) for k, v in table[step].items() if k != "step" and v != ""} == {
                k: v for k, v in values.items() if v is not None
            }
    assert list(place.glob("tensorboard/events.out.tfevents.*"))


def test_no_logger_is_given_a_row_that_may_be_taken_back(life, tmp_path):
    run = life(tmp_path / "run", "trainer.logger.parts=[{kind: csv}]", "num_steps=12", "trainer.logger.log_every_n_steps=1")
    run.open()
    given = []
    run.trainer.loggers[0].logger.row = lambda split, step, values: given.append((step, run.store.steps()[-1]))
    run.train_until(2)
    run.train_until(12)
    run.close()
    assert [step for step, _ in given] == list(range(1, 13))
    assert all(step <= committed for step, committed in given)


def test_two_averages_which_would_share_a_row_are_refused_and_so_are_values_that_would_be_a_row_s_step(life, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="ema more than once"):
        life(tmp_path / "two", "trainer.callbacks=[{kind: ema}, {kind: ema}]")
    run = life(tmp_path / "run", "trainer.callbacks=[{kind: lr}]")
    run.open()
    monkeypatch.setattr(run.trainer.callbacks[0], "on_row", lambda moment: Answer(values={"step": 7}))
    with pytest.raises(ConfigError, match="'step'"):
        run.train_until(6)
    run.close()


class Table:
    """A logger of the kind that can take rows back, and that may fail in the middle."""

    def __init__(self):
        self.rows = []
        self.fails_after = None

    def start(self, step, info):
        self.rows = [r for r in self.rows if r[1] <= step]

    def row(self, split, step, values):
        if self.fails_after is not None:
            if self.fails_after == 0:
                raise OSError("the network is away")
            self.fails_after -= 1
        self.rows.append((split, step))

    def finalize(self, status):
        pass


EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("train"), st.integers(1, 3)),
        st.just(("commit", 0)),
        st.tuples(st.just("commit and fail"), st.integers(0, 3)),
        st.just(("killed", 0)),
    ),
    max_size=25,
)


@given(EVENTS)
def test_after_any_failures_and_deaths_a_logger_has_the_rows_of_the_run_in_their_order(tmp_path_factory, events):
    folder = tmp_path_factory.mktemp("follow")
    path, table, written = folder / "metrics.jsonl", Table(), rows.Rows(folder / "metrics.jsonl")
    step = committed = 0

    def begin():
        written.cut(committed)
        follower = Follower(table, path, folder / "logs" / "table.json")
        follower.start(committed, {})
        return follower

    follower = begin()
    for what, number in [*events, ("killed", 0)]:
        table.fails_after = number if what == "commit and fail" else None
        if what == "train":
            for _ in range(number):
                step += 1
                written.append("train", step, {"loss": 1.0})
        elif what == "killed":
            step = committed
            follower = begin()
        else:
            committed = step
            follower.give(committed)
            if rows.find(path, "val", step) is None:
                written.append("val", step, {"loss": 2.0})
            follower.give(committed)
    assert table.rows == [(r["split"], r["step"]) for r in rows.read(path)]


@pytest.mark.parametrize("damaged", [1, 2, 4])
def test_a_row_that_is_damaged_is_no_reason_to_miss_another_or_to_be_given_one_twice(tmp_path, damaged):
    path, table, written = tmp_path / "metrics.jsonl", Table(), rows.Rows(tmp_path / "metrics.jsonl")

    def begin(step):
        follower = Follower(table, path, tmp_path / "logs" / "table.json")
        follower.start(step, {})
        return follower

    def train(*steps):
        for step in steps:
            written.append("train", step, {"loss": 1.0})

    train(1, 2, 3, 4)
    begin(4)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[damaged - 1] = b"\xff" + lines[damaged - 1]
    path.write_bytes(b"".join(lines))
    train(5)
    begin(5)  # the damage is in the middle now: lines that cannot be read are passed over
    written.cut(5)
    train(6)
    begin(6)
    kept = [step for step in range(1, 7) if step != damaged]
    assert [step for _, step in table.rows if step != damaged] == kept
    assert table.rows.count(("train", damaged)) <= 1


def test_a_logger_that_is_added_to_a_run_is_given_its_history(life, tmp_path):
    run = life(tmp_path / "run")
    run.open()
    run.train_until(4)
    run.close()
    run = life(tmp_path / "run", "trainer.logger.parts=[{kind: csv}]")
    run.open()
    run.close()
    with open(tmp_path / "run" / "metrics-train.csv") as f:
        assert [row["step"] for row in csv.DictReader(f)] == ["3"]
    assert next(iter(read_lines(tmp_path / "run" / "logs" / "rows-CsvLogger-0.json")))["step"] == 3


def make_listening():
    from trainer.module import TrainerModule

    class Listening(TrainerModule):
        """Writes down what it hears."""

        def on_training_start(self):
            self.heard = ["start"]

        def on_training_end(self):
            self.heard.append("end")

        def on_validation_epoch_start(self, epoch_idx, step_idx):
            self.heard.append(f"to val {step_idx}")

        def on_validation_epoch_end(self, eval_metrics, epoch_idx, step_idx):
            self.heard.append(f"val {step_idx}")
            eval_metrics["heard"] = len(self.heard)

        def on_test_epoch_end(self, test_metrics, epoch_idx):
            self.heard.append("test")

    return Listening


Listening = make_listening()


def test_a_row_takes_scalars_of_numpy_as_numbers_of_pythons():
    assert rows.as_recorded({"a": np.float32(0.5), "b": np.int64(3), "c": np.float32("nan")}) == {"a": 0.5, "b": 3, "c": None}


class EagerConfig(CallbackPartConfig):
    kind: Literal["tests.trainer.test_onlookers:EagerConfig"] = "tests.trainer.test_onlookers:EagerConfig"

    def build(self):
        return Eager()


class Eager(Callback):
    """Asks for commits whenever it may, adds a number of NumPy's, and keeps a diary."""

    def __init__(self):
        self.diary = []

    def wants(self, step):
        return step == 5

    def on_training_step(self, moment):
        self.diary.append(("step", moment.step))
        return Answer()

    def on_row(self, moment):
        self.diary.append(("row", moment.step))
        return Answer(values={"third": np.float32(1 / 3)})

    def on_validation_epoch_end(self, moment):
        return Answer(save=True)

    def finalize(self, status):
        self.diary.append((status, -1))


EAGER = "trainer.callbacks=[{kind: 'tests.trainer.test_onlookers:EagerConfig'}]"


def test_a_commit_that_a_validation_asks_for_stands_already_and_none_is_made_later(life, tmp_path):
    run = life(tmp_path / "run", EAGER)
    run.open()
    run.train_until(4)
    run.evaluate(4, "val")
    run.train_until(6)
    run.close()
    assert run.store.steps()[-2:] == [4, 6], "step 5 is waited for, and nobody asked for a commit there"


@pytest.mark.parametrize("often", [(), ("checkpoint.every=1",)])
def test_rows_and_steps_are_told_in_one_order_however_often_the_run_commits(life, tmp_path, often):
    run = life(tmp_path / "run", EAGER, "trainer.logger.log_every_n_steps=1", *often)
    run.open()
    run.train_until(6)
    run.close()
    assert run.trainer.callbacks[0].diary == [(what, step) for step in range(1, 7) for what in ("step", "row")] + [("stopped", -1)]
    assert stable_rows(tmp_path / "run")["train", 3]["third"] == pytest.approx(1 / 3)


def test_a_life_that_fails_as_it_opens_tells_those_that_had_begun_of_its_end(life, tmp_path):
    run = life(
        tmp_path / "run", "trainer.callbacks=[{kind: 'tests.trainer.test_onlookers:EagerConfig'}, {kind: early_stopping, monitor: lose}]"
    )
    with pytest.raises(ConfigError, match="lose"):
        run.open()
    run.close("error")
    assert run.trainer.callbacks[0].diary == [("error", -1)]
