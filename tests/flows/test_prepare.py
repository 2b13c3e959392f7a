"""The preparation as a command and as a flow: tasks in the UI, the same bytes through kills and stops, nothing left behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.load import load
from tasks.preparation import Preparation, prepare
from trainer.data import load_manifest, load_tokenizer

EVERSTEP = str(Path(sys.executable).with_name("everstep"))
KILLS = int(os.environ.get("EVERSTEP_KILLS", "3"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Some megabytes in files of very unequal size: several units of work."""
    rng = random.Random(0)
    words = [f"{rng.randrange(10**9)}" for _ in range(300)]  # few: the tokenizer remembers those it has seen
    folder = tmp_path_factory.mktemp("texts")
    for i, size in enumerate([3_200_000, 10, 300, 500_000, *[2000] * 40]):
        with open(folder / f"{i:02}.jsonl", "w") as f:
            while f.tell() < size:
                f.write(json.dumps({"text": " ".join(rng.choices(words, k=rng.randrange(5, 400)))}) + "\n")
    return folder


def overrides(folder, *more):
    return ["name=prep-test", f"data.path={folder}", "data.tokenizer.vocab_size=2000", "data.tokenizer.sample_bytes=200000", *more]


@pytest.fixture(scope="module")
def expected(folder, tmp_path_factory):
    """The data as one thread prepares it that nothing happens to."""
    return prepare(load("tiny", overrides(folder)).data, cache=tmp_path_factory.mktemp("expected"))


def files_of(path):
    return {p.name: p.read_bytes() for p in Path(path).iterdir()}


@pytest.fixture
def command(folder, tmp_path, api_url):
    """`command(*words)` starts `everstep prepare` of the folder with a cache of its own, in a group of its own."""

    def start(*words):
        env = {**os.environ, "EVERSTEP_CACHE": str(tmp_path / "cache"), "PREFECT_API_URL": api_url}
        return subprocess.Popen(
            [EVERSTEP, "prepare", "tiny", *overrides(folder), *words],
            cwd=tmp_path,
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    return start


def members(group):
    """The living processes that a command left: those of its session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(session) == group and state != "Z":
            found.append(int(path.parent.name))
    return found


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_flow_prepares_by_tasks_the_bytes_that_one_thread_does(folder, expected, tmp_path, api_url, monkeypatch):
    from prefect import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterId, FlowRunFilterName

    from flows.prepare import listeners
    from flows.prepare import prepare as flow

    monkeypatch.setenv("EVERSTEP_CACHE", str(tmp_path))
    told = []
    monkeypatch.setattr("flows.prepare.listeners", [*listeners, lambda progress: told.append(str(progress))])
    ref = flow(load("tiny", overrides(folder, "name=prep-flow", "execution.prepare_workers=2")))
    assert ref.digest == expected.digest and files_of(ref.path) == files_of(expected.path)
    assert any("tokens" in line and "MB/s" in line and "ETA" in line for line in told)
    wanted = {"read[00.jsonl 1/2]", "tokenize[00.jsonl 2/2]", "baseline", "pack[train-00000.arrow]"}
    with get_client(sync_client=True) as client:
        (run,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=["prepare prep-flow"])))

        def named():
            return {t.name for t in client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run.id])))}

        assert wait_for(lambda: wanted <= named(), 30), named()
        assert len(named()) < 60, "the forty small files are not forty tasks"
        found = client.read_artifacts(artifact_filter=ArtifactFilter(key=ArtifactFilterKey(any_=["data", "preparation"])))
        texts = [a.data for a in found if a.key == "data" and str(a.flow_run_id) == str(run.id)]
        assert texts and expected.digest in texts[0]
        assert [a for a in found if a.key == "preparation" and str(a.flow_run_id) == str(run.id)]


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_preparation_that_is_killed_again_and_again_comes_to_the_same_bytes_and_leaves_no_process(command, expected, tmp_path, kind):
    rng = random.Random(kind)
    kills = 0
    longest = 4.0  # seconds; grows until the lives are long enough to end
    work = tmp_path / "cache" / "data" / "work"
    while kills < KILLS:
        process = command(f"execution.prepare={kind}")
        if kills == 0:
            assert wait_for(lambda: list(work.rglob("*.bin"))), "the first is hit in the middle of its work"
        else:
            time.sleep(rng.uniform(0.5, longest))
        if process.poll() is not None:
            break  # done before it could be killed
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
        kills += 1
        assert wait_for(lambda group=process.pid: not members(group), 10), members(process.pid)
    process = command(f"execution.prepare={kind}", "--json")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    answer = json.loads(out)
    assert answer["digest"] == expected.digest and files_of(answer["path"]) == files_of(expected.path)
    assert kills >= 1


def test_a_preparation_that_is_asked_to_stop_exits_75_and_goes_on_where_it_was(command, expected, tmp_path):
    process = command("--json")
    work = tmp_path / "cache" / "data" / "work"
    assert wait_for(lambda: list(work.rglob("tokens/*.bin")) or process.poll() is not None)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    if process.returncode != 0:  # 0: it was done before it could be asked
        assert process.returncode == 75, err
        assert json.loads(out)["status"] == "stopped" and "everstep prepare" in err
    assert wait_for(lambda: not members(process.pid), 10)
    kept = {p.name: p.stat().st_ino for p in work.rglob("*.bin")}
    process = command("--json")
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert files_of(json.loads(out)["path"]) == files_of(expected.path)
    assert kept.items() <= {p.name: p.stat().st_ino for p in work.rglob("*.bin")}.items()


def everstep(*words, cache):
    env = {**os.environ, "EVERSTEP_CACHE": str(cache)}
    done = subprocess.run([EVERSTEP, *map(str, words)], env=env, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout, done.stderr


def test_a_dry_run_reads_listings_only_and_says_what_is_done(folder, expected, tmp_path, monkeypatch):
    from flows import data as commands

    code, out, err = everstep("prepare", "tiny", *overrides(folder), "--dry-run", "--json", cache=tmp_path)
    assert code == 0, err
    size = sum(p.stat().st_size for p in folder.iterdir())
    found = json.loads(out)
    assert (found["files"], found["bytes"], found["shards_read"], found["prepared"]) == (44, size, 0, None) and 3 <= found["shards"] < 12
    assert not list(tmp_path.rglob("*.bin"))
    cache = Path(expected.path).parents[1]
    code, out, err = everstep("prepare", "tiny", *overrides(folder), "--dry-run", "--json", cache=cache)
    assert json.loads(out)["prepared"] == expected.path and json.loads(out)["shards_read"] == found["shards"]

    def opened(part):
        raise AssertionError(f"{part} was opened")

    monkeypatch.setattr("tasks.preparation.sources.read.open_file", opened)
    commands._look(Preparation(load("tiny", overrides(folder)).data, cache=tmp_path), (), as_json=False)
    assert prepare(load("tiny", overrides(folder)).data, cache=cache) == expected


def test_inspect_shows_what_is_there_and_rows_by_seed(expected):
    def inspect(*more):
        code, out, err = everstep("data", "inspect", expected.path, "--json", *more, cache="/nowhere")
        assert code == 0, err
        return json.loads(out)

    found, manifest = inspect("--seed", "1"), load_manifest(expected.path)
    assert found["splits"]["train"]["utilisation"] > 0.99 and found["digest"] == manifest.digest
    assert sum(found["histogram"]["train"]) == manifest.splits["train"].documents
    assert found["samples"] == inspect("--seed", "1")["samples"] != inspect("--seed", "2")["samples"]
    import pyarrow as pa

    table = pa.ipc.open_file(f"{expected.path}/train-00000.arrow").read_all()
    for sample in found["samples"]:
        targets = table["targets"][sample["row"]].as_py()
        assert "".join(sample["documents"]) == load_tokenizer(expected.path).decode(targets[: len(targets) - sample["padding"]])
    code, out, err = everstep("data", "inspect", expected.path, "--split", "nope", cache="/nowhere")
    assert code == 2 and "no split 'nope'" in err
    code, out, err = everstep("data", "inspect", "/nowhere", "--json", cache="/nowhere")
    assert code == 2 and json.loads(out)["status"] == "failed"
    code, out, err = everstep("data", "inspect", expected.path, cache="/nowhere")
    assert code == 0 and "% full" in err and "next: " in err and not out
