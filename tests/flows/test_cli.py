"""The command as a person or a program runs it: real processes, exit codes, one JSON object, kills."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.load import dump_yaml
from trainer import rows
from trainer.checkpoint import verify

EVERSTEP = [str(Path(sys.executable).with_name("everstep"))]


@pytest.fixture
def environment(tmp_path_factory):
    """As a user's, with the session's database for all servers of these tests: making one takes seconds."""
    return {**os.environ, "COLUMNS": "100"}


@pytest.fixture
def everstep(environment, tmp_path):
    def run(*args, timeout=240):
        done = subprocess.run(
            [*EVERSTEP, *map(str, args)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=timeout, check=False
        )
        return done.returncode, done.stdout, done.stderr

    return run


@pytest.fixture
def preset(micro, tmp_path):
    """A user's own preset file: the micro run in a process of its own, long enough to be hit."""

    def write(*overrides):
        file = tmp_path / "mine.yaml"
        file.write_text(dump_yaml(micro("execution.mode=process", "name=mine", *overrides)))
        return file

    return write


def digests(path):
    return {row["step"]: row["state_sha256"] for row in verify(path) if row["ok"]}


def stable_rows(path):
    found = rows.read(path / "metrics.jsonl")
    keys = [(r["split"], r["step"]) for r in found]
    assert len(keys) == len(set(keys)), "a row stands twice"
    return {(r["split"], r["step"]): rows.stable(rows.values_of(r)) for r in found}


LONG = ["num_steps=300", "chunk_steps=30", "trainer.logger.log_every_n_steps=10"]

BAD = {
    "an unknown key": (["train", "tiny", "optimizer.schedul.lr=1"], "did you mean"),
    "an unknown preset": (["train", "tyni"], "tiny"),
    "a value out of range": (["train", "tiny", "num_steps=0"], "num_steps"),
    "a batch that does not divide": (["train", "tiny", "trainer.gradient_accumulate_steps=3"], "data.batch_size=15"),
    "a chunk of nothing": (["train", "tiny", "chunk_steps=0"], "chunk_steps"),
    "rows longer than the model's positions": (["train", "tiny", "data.seq_len=8192"], "max_positions"),
    "missing data": (["prepare", "tiny", "data.path=nowhere/at/all"], "nowhere"),
    "no run": (["status", "no-such-run"], "no-such-run"),
    "an unknown command": (["trian"], "--help"),
    "an unknown option": (["status", "--fast"], "--help"),
    "a run directory that cannot be written": (["train", "tiny", "--run-dir", "/proc/nothing"], "--run-dir"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_refused_with_code_2_and_a_way_out_before_anything_is_written(everstep, tmp_path, what):
    args, hint = BAD[what]
    code, out, err = everstep(*args, "--json")
    assert code == 2, err
    assert hint in err
    answer = json.loads(out)
    assert answer["status"] == "failed" and answer["error"]["message"]
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit_the_devices_is_refused_with_code_2_before_data_is_prepared(everstep, preset, tmp_path):
    code, out, err = everstep("train", preset("mesh.fsdp=3"), "--run-dir", "run", "--json")
    assert code == 2, err
    assert "fsdp=3 needs" in json.loads(out)["error"]["message"]
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("cli")


@pytest.fixture
def undisturbed(everstep, preset, kept):
    """(directory, answer) of a run of 300 steps that nothing happened to."""
    path = kept / "run"
    if not path.exists():
        code, out, err = everstep("train", preset(*LONG), "--run-dir", path, "--json")
        assert code == 0, err
        (kept / "answer.json").write_text(out)
    return path, json.loads((kept / "answer.json").read_text())


def test_train_answers_with_one_object_that_says_what_came_of_it(undisturbed):
    path, answer = undisturbed
    assert answer["status"] == "done" and answer["step"] == 300 and Path(answer["report"]).exists()
    assert answer["val"]["loss"] < 3.0 and answer["test"]["best_step"] == answer["best_step"]
    assert answer["run_dir"] == str(path)


def test_resuming_a_finished_run_says_that_all_is_done_without_a_server(undisturbed, everstep):
    path, answer = undisturbed
    began = time.monotonic()
    code, out, err = everstep("resume", path, "--json")
    assert code == 0 and json.loads(out) == answer and "all is done already" in err
    assert "Prefect UI" not in err and time.monotonic() - began < 10


def events(path):
    try:
        return [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


def wait_for(condition, what, timeout=120):
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        time.sleep(0.02)


def committed(path, step):
    return lambda: any(e["event"] == "committed" and e["step"] >= step for e in events(path))


def children(pid):
    return [int(c) for t in Path(f"/proc/{pid}/task").iterdir() for c in (t / "children").read_text().split()]


def command_of(pid):
    return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")


def start(args, environment, cwd, log):
    return subprocess.Popen(
        [*EVERSTEP, *map(str, args)], cwd=cwd, env=environment, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True
    )


def test_killed_in_mid_run_and_resumed_it_ends_on_the_same_bits_with_every_row_once(undisturbed, environment, preset, tmp_path, everstep):
    reference, _ = undisturbed
    file = preset(*LONG)
    victim, log = tmp_path / "victim", tmp_path / "log"
    p = start(["train", file, "--run-dir", victim], environment, tmp_path, log)
    wait_for(committed(victim, 60), "step 60")
    family = children(p.pid)
    assert len(family) >= 2
    p.kill()
    p.wait()
    wait_for(lambda: not any(Path(f"/proc/{c}").exists() for c in family), "the children to die", timeout=10)
    p = start(["resume", victim], environment, tmp_path, log)
    wait_for(committed(victim, 120), "step 120")
    (trainer,) = [c for c in children(p.pid) if "trainer.worker" in command_of(c)][:1]
    os.kill(trainer, signal.SIGKILL)  # the command goes on by itself
    wait_for(committed(victim, 180), "step 180")
    p.send_signal(signal.SIGTERM)
    assert p.wait(60) == 75, log.read_text()
    stopped = [e["step"] for e in events(victim) if e["event"] == "stopped"]
    assert stopped == [max(digests(victim))]
    code, _, err = everstep("train", file, "--run-dir", victim, "--json")  # the same declaration goes on as well
    assert code == 0, err
    assert digests(victim)[300] == digests(reference)[300]
    assert stable_rows(victim) == stable_rows(reference)


@pytest.mark.parametrize("blow", [signal.SIGKILL, signal.SIGSTOP])
def test_a_server_that_dies_or_hangs_in_mid_run_delays_no_commit_and_the_run_ends_well(undisturbed, environment, preset, tmp_path, blow):
    reference, _ = undisturbed
    file = preset(*LONG)
    victim, log = tmp_path / "victim", tmp_path / "log"
    p = start(["train", file, "--run-dir", victim, "--json"], environment, tmp_path, log)
    wait_for(committed(victim, 30), "step 30")
    (server,) = [c for c in children(p.pid) if "server_main" in command_of(c)]
    os.kill(server, blow)
    assert p.wait(120) == 0, log.read_text()
    times = {e["step"]: e["time"] for e in events(victim) if e["event"] == "committed"}
    gaps = [times[s + 30] - times[s] for s in range(30, 300, 30)]
    assert max(gaps) < 8, f"a commit waited: {gaps}"
    assert digests(victim)[300] == digests(reference)[300] and stable_rows(victim) == stable_rows(reference)


def test_status_logs_verify_eval_and_generate_read_a_run(undisturbed, everstep):
    path, answer = undisturbed
    code, out, _ = everstep("status", path, "--json")
    found = json.loads(out)
    assert code == 0 and found["status"] == "done" and found["last_commit"] == found["total"] == 300 and found["why_stopped"] is None
    code, out, _ = everstep("verify", path, "--json")
    assert code == 0 and [c["ok"] for c in json.loads(out)["checkpoints"]] == [True] * len(digests(path))
    code, out, _ = everstep("logs", path, "--json")
    assert code == 0 and json.loads(out)["events"][0]["event"] == "started"
    code, out, err = everstep("eval", path, "--step", 300, "--json")
    assert code == 0, err
    assert json.loads(out)["values"]["loss"] == pytest.approx(answer["val"]["loss"], rel=1e-6)
    code, out, err = everstep("generate", path, "--prompt", "7 8 9", "--temperature", 0, "--max-tokens", 12, "--json")
    assert code == 0, err
    assert json.loads(out)["text"].startswith("7 8 9") and len(json.loads(out)["text"]) > 5


def test_a_damaged_checkpoint_is_told_with_code_1_and_nothing_is_changed(undisturbed, everstep, tmp_path):
    import shutil

    path, _ = undisturbed
    shutil.copytree(path, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "00000300" / "MANIFEST.json"
    file.write_bytes(file.read_bytes().replace(b'"size":', b'"size": ', 1))
    before = sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*"))
    code, out, _ = everstep("verify", tmp_path / "run", "--json")
    assert code == 1
    assert {c["step"]: c["ok"] for c in json.loads(out)["checkpoints"]}[300] is False
    assert sorted((p, p.stat().st_mtime_ns) for p in (tmp_path / "run").rglob("*")) == before


def test_a_preset_of_ones_own_is_written_planned_and_shown(everstep, tmp_path):
    code, _, err = everstep("init", "novel")
    assert code == 0 and "texts" in err and "everstep train" in err
    (tmp_path / "novel" / "texts" / "a.txt").write_text("once upon a time")
    code, out, err = everstep("plan", "novel/run.yaml", "--json")
    assert code == 0, err
    assert json.loads(out)["parameters"] == 893_568 and json.loads(out)["does"] == "starts anew"
    code, out, _ = everstep("config", "diff", "tiny", "seed=3", "--json")
    assert code == 0 and any("seed: 0 -> 3" in line for line in json.loads(out)["differences"])
    assert everstep("init", "novel")[0] == 2  # what stands there is not written over
