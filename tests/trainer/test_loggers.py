"""Loggers: each row once, however a life ended; nothing of the host program's logging is touched."""

import csv
import logging
import math
import signal
import struct
import subprocess
import sys
from collections import Counter

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from trainer import loggers, rows
from trainer.errors import ConfigError, StorageError
from trainer.loggers import wandb as our_wandb

KINDS = ["console", "csv", "jsonl", "tensorboard", "wandb"]
any_logger = TypeAdapter(loggers.AnyLoggerConfig).validate_python


class FakeRun:
    """A W&B run that refuses what the real one refuses."""

    def __init__(self, kwargs):
        self.kwargs, self.logged, self.summary, self.metrics, self.exit_code = kwargs, [], {}, {}, None
        self.config, self.url = self, "https://wandb.test/run"

    def update(self, values, *, allow_val_change=False):
        assert allow_val_change
        self.kwargs.setdefault("config", {}).update(values)

    def define_metric(self, name, step_metric=None):
        self.metrics[name] = step_metric

    def log(self, values):
        assert self.exit_code is None
        self.logged.append(values)

    def finish(self, exit_code):
        self.exit_code = exit_code


class FakeWandb:
    """Records the runs that were opened; opens none while `failure` is set."""

    class Error(Exception):
        pass

    class UsageError(Error):
        pass

    def __init__(self):
        self.runs, self.failure = [], None

    def Settings(self, **kwargs):
        return kwargs

    def init(self, **kwargs):
        self.runs.append(FakeRun(kwargs))
        if self.failure:
            raise self.failure
        return self.runs[-1]

    def sent(self, run_id):
        """(step, name) of every value that all lives sent to a run."""
        return [(v["step"], name) for r in self.runs if r.kwargs["id"] == run_id for v in r.logged for name in v if name != "step"]


@pytest.fixture
def fake(monkeypatch):
    made = FakeWandb()
    monkeypatch.setattr(our_wandb, "_import_wandb", lambda: made)
    return made


def begin(kind, folder, step=0, **fields):
    logger = any_logger({"kind": kind, **fields}).build(folder)
    logger.start(step, {"parameters": 10, "mesh": {"data": 1}})
    return logger


def table(folder, split):
    path = folder / f"metrics-{split}.csv"
    if not path.exists():
        return []
    with open(path, newline="") as f:
        return [{k: v for k, v in row.items() if v != ""} for row in csv.DictReader(f)]


def events(path):
    """The events of a file in TFRecord framing, checksums compared; what a crash tore at its end is left out."""
    from tensorboardX.proto.event_pb2 import Event

    def masked(data):
        crc = google_crc32c.value(data)
        return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF

    data = path.read_bytes()
    while len(data) >= 12:
        (size, check) = struct.unpack("<QI", data[:12])
        assert check == masked(data[:8])
        if len(data) < size + 16:
            return
        body = data[12 : 12 + size]
        assert struct.unpack("<I", data[12 + size : 16 + size]) == (masked(body),)
        data = data[16 + size :]
        yield Event.FromString(body)


def scalars(folder):
    """(tag, step, value) as TensorBoard shows them: the start of a session takes back its step and later ones."""
    from tensorboardX.proto.event_pb2 import SessionLog

    shown = []
    for path in sorted((folder / "tensorboard").iterdir()):
        for event in events(path):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                shown = [s for s in shown if s[1] < event.step]
            shown += [(v.tag, event.step, v.simple_value) for v in event.summary.value]
    return shown


# what all have in common


def test_the_index_takes_every_kind_and_refuses_unknown_ones_and_unknown_keys():
    assert [any_logger({"kind": kind}).kind for kind in KINDS] == KINDS
    for wrong in ({"kind": "csvv"}, {"kind": "csv", "every": 2}, {"kind": "console", "every": 0}, {"kind": "wandb", "mode": "on"}):
        with pytest.raises(ValidationError):
            any_logger(wrong)


def test_the_index_and_every_config_import_nothing_heavy():
    code = f"""
import sys
from pydantic import TypeAdapter
from trainer.loggers import AnyLoggerConfig
for kind in {KINDS!r}:
    TypeAdapter(AnyLoggerConfig).validate_python({{"kind": kind}})
print([n for n in ("jax", "numpy", "tensorboardX", "google.protobuf", "rich", "wandb") if n in sys.modules])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_before_the_start_or_after_the_end_is_refused_and_the_end_may_come_twice(kind, fake, tmp_path):
    logger = any_logger({"kind": kind}).build(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError, match=f"{kind}.*'val' at step 3.*not started"):
        logger.row("val", 3, {"loss": 1.0})
    logger.finalize("error")
    logger.start(0, {})
    logger.row("val", 3, {"loss": 1.0})
    logger.finalize("success")
    logger.finalize("error")
    with pytest.raises(RuntimeError, match=f"{kind}.*'val' at step 6.*finalized with status 'success'"):
        logger.row("val", 6, {"loss": 1.0})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300, -(10**400), 0, True, None], ids=lambda v: str(v)[:6])
def test_no_value_makes_a_logger_fail(kind, value, fake, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    logger = begin(kind, tmp_path)
    logger.row("train", 1, {"odd name, %s": value})
    logger.row("train", 2, {})
    logger.finalize("nan")


HOST = """
import io, logging, sys
from pathlib import Path
from unittest.mock import MagicMock
from pydantic import TypeAdapter
from trainer.loggers import AnyLoggerConfig, wandb

def state():
    names = ["trainer", "trainer.loggers", "trainer.loggers.console", "trainer.loggers.wandb"]
    ours = [(x.handlers[:], x.level, x.propagate, x.disabled) for x in map(logging.getLogger, names)]
    return logging.root.handlers[:], logging.root.level, logging.root.manager.disable, logging.raiseExceptions, ours

def use_all(folder):
    for kind in sys.argv[2:]:
        logger = TypeAdapter(AnyLoggerConfig).validate_python({"kind": kind}).build(folder)
        logger.start(0, {})
        logger.row("train", 1, {"loss": 0.123456789})
        logger.finalize("success")

wandb._import_wandb = lambda: MagicMock(Error=Exception, UsageError=Exception)
before = state()
assert before[0] == []
use_all(Path(sys.argv[1]))  # a host that set up nothing
assert state() == before
heard = io.StringIO()
logging.root.addHandler(logging.StreamHandler(heard))
logging.root.setLevel(logging.INFO)
before = state()
use_all(Path(sys.argv[1]))  # a host that did
assert state() == before
assert "step 1 train: loss=0.12346" in heard.getvalue().splitlines(), heard.getvalue()
"""


@pytest.mark.fault(38)
def test_the_hosts_logging_is_as_it_was_after_every_logger(tmp_path):
    run = subprocess.run([sys.executable, "-c", HOST, str(tmp_path), *KINDS], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


KILLED = """
import os, signal, sys
from pathlib import Path
from pydantic import TypeAdapter
from trainer.loggers import AnyLoggerConfig
made = [TypeAdapter(AnyLoggerConfig).validate_python({"kind": k}).build(Path(sys.argv[1])) for k in ("csv", "jsonl", "tensorboard")]
for logger in made:
    logger.start(0, {})
for step in range(1, 8):
    for logger in made:
        logger.row("train", step, {"loss": 1 / step} | ({"late": step} if step > 4 else {}))
        if step % 2 == 0:
            logger.row("val", step, {"loss": 2 / step})
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.fault(37)
def test_a_crash_loses_no_row_and_the_next_life_writes_none_twice(tmp_path):
    assert subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    assert [float(r["loss"]) for r in table(tmp_path, "train")] == [1 / s for s in range(1, 8)]
    assert [r["step"] for r in table(tmp_path, "val")] == ["2", "4", "6"]
    assert len(rows.read(tmp_path / "metrics.jsonl")) == 10
    assert Counter(tag for tag, _, _ in scalars(tmp_path)) == {"train/loss": 7, "train/late": 3, "val/loss": 3}

    for kind in ("csv", "jsonl", "tensorboard"):  # the last commit was step 4
        logger = begin(kind, tmp_path, step=4)
        for step in range(5, 9):
            logger.row("train", step, {"loss": 10.0})
        logger.finalize("success")
    expected = [1 / s for s in range(1, 5)] + [10.0] * 4
    assert [float(r["loss"]) for r in table(tmp_path, "train")] == expected
    assert [r["step"] for r in table(tmp_path, "val")] == ["2", "4"]
    found = rows.read(tmp_path / "metrics.jsonl")
    assert [r["loss"] for r in found if r["split"] == "train"] == expected
    shown = scalars(tmp_path)
    assert [(s, v) for tag, s, v in shown if tag == "train/loss"] == [(i + 1, pytest.approx(v)) for i, v in enumerate(expected)]
    assert max(Counter((tag, step) for tag, step, _ in shown).values()) == 1
    assert "train/late" not in {tag for tag, _, _ in shown}


# one by one

VALUES = st.dictionaries(
    st.sampled_from(["loss", "lr", "a,b", 'so "called"', "two\nlines", "", " µ"]),
    st.none() | st.integers() | st.floats(),
    max_size=4,
)
HISTORY = st.lists(st.dictionaries(st.sampled_from(["train", "val"]), VALUES), max_size=6)  # of step 1, 2, ...


@settings(max_examples=40, deadline=None)
@given(HISTORY, HISTORY, st.data())
def test_a_table_torn_at_any_byte_and_started_at_any_step_reads_like_the_rows(tmp_path_factory, first, second, data):
    folder = tmp_path_factory.mktemp("csv")

    def log(start, history):
        logger = begin("csv", folder, step=start)
        wrote = []
        for step, splits in enumerate(history, start + 1):
            for split, values in splits.items():
                logger.row(split, step, values)
                wrote.append((split, step, values))
        return wrote

    def check(expected):
        for split in ("train", "val"):
            texts = [{"step": str(i), **{k: str(v) for k, v in row.items() if v is not None}} for s, i, row in expected if s == split]
            assert table(folder, split) == texts

    there = log(0, first)
    check(there)
    for path in sorted(folder.iterdir()):
        split = path.stem.removeprefix("metrics-")
        whole = path.read_bytes()
        size = data.draw(st.integers(0, len(whole)))
        path.write_bytes(whole[:size])
        ours = [row for row in there if row[0] == split]
        lost = whole[size:].count(b"\n")  # a row is there with its line's end; rows are the last lines, each with one end
        there = [row for row in there if row[0] != split] + ours[: max(0, len(ours) - lost)]
    start = data.draw(st.integers(0, len(first)))
    there = [row for row in there if row[1] <= start] + log(start, second)
    check(there)


def test_a_new_name_adds_a_column_and_older_rows_have_an_empty_cell_there(tmp_path):
    logger = begin("csv", tmp_path)
    logger.row("train", 1, {"loss": 1.5})
    logger.row("train", 2, {"accuracy": 0.25, "loss": None})
    logger.row("train", 3, {"loss": math.nan, "count": 3})
    logger.row("a/b", 3, {"loss": 1})
    assert (tmp_path / "metrics-train.csv").read_text() == "step,loss,accuracy,count\n1,1.5,,\n2,,0.25,\n3,nan,,3\n"
    assert (tmp_path / "metrics-a%2Fb.csv").read_text() == "step,loss\n3,1\n"


def test_a_hole_in_a_table_ends_it(tmp_path):
    path = tmp_path / "metrics-train.csv"
    path.write_bytes(b"step,loss\n1,0.5\n" + bytes(200_000) + b"\n3,0.25\n")
    begin("csv", tmp_path, step=5)
    assert path.read_text() == "step,loss\n1,0.5\n"


def test_a_start_leaves_tables_of_others_alone(tmp_path):
    other = tmp_path / "metrics-mine.csv"
    other.write_text("name,value\nx,1")
    begin("csv", tmp_path)
    assert other.read_text() == "name,value\nx,1"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 400), st.integers(0, 6))
def test_json_lines_torn_at_any_byte_and_started_at_any_step_read_like_the_rows(tmp_path_factory, size, start):
    folder = tmp_path_factory.mktemp("jsonl")
    path = folder / "metrics.jsonl"
    logger, ends = begin("jsonl", folder), []
    for step in range(1, 7):
        logger.row("train", step, {"loss": 1 / step, "bad": math.nan})
        ends.append(path.stat().st_size)
    path.write_bytes(path.read_bytes()[:size])
    logger = begin("jsonl", folder, step=start)
    logger.row("train", start + 1, {"loss": 7.0})
    kept = [i for i, end in enumerate(ends, 1) if i <= start and end - 1 <= size]
    whole = [{"step": i, "split": "train", "loss": 1 / i, "bad": None} for i in kept]
    assert rows.read(path) == [*whole, {"step": start + 1, "split": "train", "loss": 7.0}]


def test_the_console_shows_every_nth_row_of_each_split_and_the_first_of_a_life(caplog, tmp_path):
    caplog.set_level(logging.INFO, logger="trainer.loggers.console")
    logger = begin("console", tmp_path, every=3)
    for step in range(1, 6):
        logger.row("train", step, {"loss": 1 / 3, "tokens": 123456789, "lr": None})
    logger.row("val", 5, {"loss": math.inf})
    logger.start(5, {})
    logger.row("train", 6, {"loss": 1.0})
    assert caplog.messages == [
        "step 1 train: loss=0.33333 tokens=123456789 lr=none",
        "step 4 train: loss=0.33333 tokens=123456789 lr=none",
        "step 5 val: loss=inf",
        "step 6 train: loss=1",
    ]
    assert not list(tmp_path.iterdir())


def test_tensorboard_gets_what_single_precision_can_hold(tmp_path):
    logger = begin("tensorboard", tmp_path)
    logger.row("train", 1, {"loss": 0.5, "nan": math.nan, "inf": -math.inf, "none": None, "large": 1e39, "count": 3})
    logger.row("train", 2, {"nan": math.nan})
    assert scalars(tmp_path) == [("train/loss", 1, 0.5), ("train/count", 1, 3.0)]


def test_lives_within_one_second_keep_their_event_files_apart(tmp_path):
    for start in (0, 1, 2, 1):
        begin("tensorboard", tmp_path, step=start).row("train", start + 1, {"loss": float(start)})  # killed: never finalized
    assert scalars(tmp_path) == [("train/loss", 1, 0.0), ("train/loss", 2, 1.0)]
    assert len(list((tmp_path / "tensorboard").iterdir())) == 4


def test_a_torn_event_file_shows_its_whole_rows_and_does_not_hide_the_next_life(tmp_path):
    logger = begin("tensorboard", tmp_path)
    for step in (1, 2):
        logger.row("train", step, {"loss": float(step)})
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.write_bytes(path.read_bytes()[:-3])
    begin("tensorboard", tmp_path, step=1).row("train", 2, {"loss": 5.0})
    assert scalars(tmp_path) == [("train/loss", 1, 1.0), ("train/loss", 2, 5.0)]


# W&B


def test_a_missing_wandb_is_told_when_the_logger_is_built_with_the_way_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"pip install everstep\[wandb\]"):
        any_logger({"kind": "wandb"}).build(tmp_path)


def test_a_life_continues_the_wandb_run_unless_a_row_would_have_to_be_taken_back(fake, tmp_path):
    def life(start, *steps):
        logger = begin("wandb", tmp_path, step=start, project="p", tags=("a",), mode="online")
        for step in steps:
            logger.row("train", step, {"loss": 1.0, "none": None})
            logger.row("val", step, {"loss": 1.0})
        return logger

    life(0, 5, 10)  # killed
    life(10, 15).finalize("success")
    life(15, 20)  # killed, and the last commit was 15
    life(15, 20, 25)
    life(25, 30).finalize("nan")
    ids = [run.kwargs["id"] for run in fake.runs]
    assert ids[0] == ids[1] == ids[2] != ids[3] == ids[4]
    assert all(run.kwargs["resume"] == "allow" and run.kwargs["mode"] == "online" and run.kwargs["tags"] == ["a"] for run in fake.runs)
    assert all(run.metrics["*"] == "step" for run in fake.runs)
    for run_id, steps in ((ids[0], (5, 10, 15, 20)), (ids[3], (20, 25, 30))):
        assert fake.sent(run_id) == [(step, name) for step in steps for name in ("train/loss", "val/loss")]
    assert "parent" not in fake.runs[2].kwargs["config"]
    for run in fake.runs[3:]:
        assert run.kwargs["config"] == {"parameters": 10, "mesh": {"data": 1}, "parent": ids[0], "parent_step": 15}
    assert [(run.exit_code, run.summary) for run in fake.runs[1::3]] == [(0, {"status": "success"}), (1, {"status": "nan"})]


def test_a_row_whose_sending_was_cut_off_is_not_sent_to_the_same_wandb_run_again(fake, monkeypatch, tmp_path):
    logger = begin("wandb", tmp_path)
    logger.row("train", 5, {"loss": 1.0})
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(FakeRun, "log", lambda self, values: (_ for _ in ()).throw(KeyboardInterrupt))
        logger.row("train", 10, {"loss": 1.0})
    begin("wandb", tmp_path, step=5).row("train", 10, {"loss": 1.0})
    first, second = fake.runs
    assert second.kwargs["id"] != first.kwargs["id"] == second.kwargs["config"]["parent"]


def test_a_wandb_that_refuses_is_a_config_error_and_one_that_fails_may_be_tried_again(fake, tmp_path):
    fake.failure = fake.UsageError("no API key")
    with pytest.raises(ConfigError, match="no API key; run `wandb login`"):
        begin("wandb", tmp_path)
    fake.failure = fake.Error("timed out")
    with pytest.raises(StorageError, match="timed out") as failed:
        begin("wandb", tmp_path)
    assert failed.value.retryable
    fake.failure = None
    begin("wandb", tmp_path).row("train", 1, {"loss": 1.0})
    assert len({run.kwargs["id"] for run in fake.runs}) == 1


def test_the_real_wandb_keeps_an_offline_run_per_life_under_one_id(tmp_path, capfd):
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    handlers = logging.root.handlers[:]
    for start in (0, 1, 1):
        logger = begin("wandb", tmp_path, step=start, mode="offline")
        logger.row("train", start + 1, {"loss": 1.0, "nan": math.nan})
        logger.finalize("success")
    ids = Counter(p.name.split("-")[3] for p in (tmp_path / "wandb").glob("offline-run-*"))  # offline-run-<second>-<id>, -1 if need be
    assert sorted(ids.values()) == [1, 2]
    assert capfd.readouterr().out == ""
    assert logging.root.handlers == handlers
