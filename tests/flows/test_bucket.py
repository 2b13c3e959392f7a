"""A run that publishes to a bucket: an outage delays nothing but the copies, and the bucket alone is enough to go on."""

import pickle
import shutil
import time
from pathlib import Path

import pytest

from configs.load import read_config
from flows.shell import run_path
from flows.show import facts
from tasks.adopt import adopt
from tasks.preparation import prepare
from tasks.summary import is_finished
from tasks.writer import writing
from trainer import manifest, rows
from trainer.checkpoint import verify
from trainer.errors import ConfigError, DataError, RunDirError, StoppedError, StorageError
from trainer.rundir import RunDir

pytestmark = pytest.mark.usefixtures("api_url")


def run(config, path):
    from flows.pretrain import pretrain

    return pretrain(config, str(path))


def events(path, name):
    return [e for e in RunDir(path).read_events() if e["event"] == name]


def digests(path):
    return {row["step"]: row["state_sha256"] for row in verify(path) if row["ok"]}


def stable_rows(path):
    return {(r["split"], r["step"]): rows.stable(rows.values_of(r)) for r in rows.read(path / "metrics.jsonl")}


def steps_in_bucket(gcs):
    return sorted(int(n.split("/")[-2]) for n in gcs.buckets["bucket"] if n.endswith("/MANIFEST.json"))


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr("tasks.copies.STORE_DELAYS", [0.05])


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("bucket")


@pytest.fixture
def config(micro, texts, kept):
    """Of a run with text of its own, that publishes to the bucket and keeps little."""
    if not (kept / "texts").exists():
        shutil.copytree(texts, kept / "texts")
    return micro("name=mine", f"data.path={kept / 'texts'}", "publish.kind=gcs", "publish.url=gs://bucket/runs", "checkpoint.keep_latest=1")


@pytest.fixture
def reference(config, kept, gcs, short_pauses):
    """The directory of a run whose bucket was away until all was trained."""
    path = kept / "reference"
    if not path.exists():
        here = []

        def away_until_trained(method, request):
            trained = any(e["step"] == 6 for e in events(path, "committed"))
            here.append(manifest.steps_in(path / "checkpoints"))
            return None if trained else "503"

        gcs.fault = away_until_trained
        result = run(config, path)
        assert result["status"] == "done"
        (kept / "log").write_text(repr(here))
    return path


def test_what_was_committed_during_an_outage_is_kept_and_drains_in_order_when_it_is_over(reference, kept, gcs, config):
    published = events(reference, "published")
    assert [e["step"] for e in published] == [2, 4, 6]
    trained = max(e["time"] for e in events(reference, "committed"))
    assert all(e["time"] >= trained for e in published)
    assert "[0, 2, 4, 6]" in (kept / "log").read_text() or "[2, 4, 6]" in (kept / "log").read_text()
    best = {int(p.name) for p in (reference / "checkpoints").iterdir() if p.name.isdigit()}
    assert 6 in best and len(best) <= 2, "what waited for its copy goes when it has one"
    gcs.fault = lambda method, path: "503"  # a store that is away again: the run's own record counts
    assert is_finished(config, RunDir(reference))


def test_a_checkpoint_that_is_damaged_before_it_is_published_is_set_aside_and_the_run_ends_well(config, gcs, tmp_path, short_pauses):
    config, path, hurt = config.replace(num_steps=4), tmp_path / "run", []

    def fault(method, request):
        if any(e["step"] == 4 for e in events(path, "committed")):
            if not hurt:
                hurt.append(max((path / "checkpoints" / manifest.name_of(2)).rglob("*"), key=lambda p: p.stat().st_size))
                hurt[0].write_bytes(hurt[0].read_bytes()[:-1] + b"?")
            return None
        return "503"

    gcs.fault = fault
    assert run(config, path)["status"] == "done"
    assert steps_in_bucket(gcs) == [4] and [p.name for p in (path / "damaged").iterdir()] == ["2-1"]


def test_a_store_that_stays_away_fails_the_end_with_what_is_missing_and_the_next_command_makes_it_up(config, gcs, tmp_path, short_pauses):
    config = config.replace(publish=config.publish.replace(wait_seconds=0.3), num_steps=2)
    gcs.fault = lambda method, path: "503"
    with pytest.raises(StorageError, match=r"steps 2 are not published after 0\.3 s.*503.*everstep resume"):
        run(config, tmp_path / "run")
    assert (tmp_path / "run" / "report.md").exists() and steps_in_bucket(gcs) == []
    gcs.fault = lambda method, path: None
    run(config, tmp_path / "run")
    assert steps_in_bucket(gcs) == [2]


@pytest.fixture
def interrupted(config, reference, kept, gcs, short_pauses):
    """What lies in the bucket of a run that was stopped in its last chunk on a machine that is lost; its address."""
    if not (kept / "objects").exists():
        path = kept / "lost"

        def stop_in_last_chunk(kind, value):
            if kind == "beat" and value["step"] == 5:
                deadline = time.monotonic() + 20
                while [e["step"] for e in events(path, "published")] != [2, 4]:
                    assert time.monotonic() < deadline
                    time.sleep(0.02)
                gcs.fault = lambda method, path: "hang"
                writer.stops.asked = True

        with pytest.raises(StoppedError), writing(config, path) as writer:
            writer.listeners.append(stop_in_last_chunk)
            run(config, path)
        (stopped,) = events(path, "stopped")
        assert stopped["time"] - events(path, "committed")[-1]["time"] < 5, "a store that hangs does not hold a stop up"
        gcs.fault = lambda method, path: None
        shutil.rmtree(path)
        (kept / "objects").write_bytes(pickle.dumps(gcs.buckets["bucket"]))
    gcs.buckets["bucket"] = pickle.loads((kept / "objects").read_bytes())
    (name,) = {n.split("/")[1] for n in gcs.buckets["bucket"]}
    return f"gs://bucket/runs/{name}"


def test_the_address_alone_is_enough_to_end_on_the_same_bits_and_rows(interrupted, reference, gcs, tmp_path, monkeypatch):
    monkeypatch.setenv("EVERSTEP_CACHE", str(tmp_path / "cache"))  # data is prepared again
    path = adopt(interrupted, tmp_path / "run")
    assert manifest.newest_whole(path / "checkpoints").step == 4
    before = len(gcs.log)
    assert adopt(interrupted, tmp_path / "run") == path
    assert not [p for _, p in gcs.log[before:] if "params" in p], "what is here is not fetched again"
    run(read_config(path), path)
    assert digests(path)[6] == digests(reference)[6]
    assert stable_rows(path) == stable_rows(reference)
    assert 6 in steps_in_bucket(gcs)


def test_on_a_machine_whose_data_is_other_the_run_is_refused(interrupted, kept, tmp_path, monkeypatch):
    path = adopt(interrupted, tmp_path / "run")
    monkeypatch.setenv("EVERSTEP_CACHE", str(tmp_path / "cache"))
    file = next((kept / "texts").iterdir())
    text = file.read_text()
    file.write_text("other words altogether")
    try:
        config = read_config(path)
        with pytest.raises(DataError, match="was trained on data"), writing(config, path) as writer:
            writer.session.data = Path(prepare(config.data).path)
            writer.session.open()
    finally:
        file.write_text(text)


def test_a_directory_of_another_run_is_refused_and_one_that_was_cut_off_is_filled(interrupted, micro, tmp_path, gcs):
    with writing(micro("name=other"), tmp_path / "other"):
        pass
    with pytest.raises(RunDirError, match=r"choose another --run-dir"):
        adopt(interrupted, tmp_path / "other")
    gcs.fault = lambda method, path: "403" if "params" in path and "download" in path else None
    with pytest.raises(StorageError, match="may not do that"):
        adopt(interrupted, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
    gcs.fault = lambda method, path: None
    assert manifest.newest_whole(adopt(interrupted, tmp_path / "run") / "checkpoints").step == 4


def test_a_run_that_was_moved_in_the_bucket_is_published_to_where_it_lies_now(interrupted, tmp_path, gcs):
    objects, name = gcs.buckets["bucket"], interrupted.rpartition("/")[2]
    gcs.buckets["bucket"] = {key.replace("runs/", "moved/", 1): data for key, data in objects.items()}
    path = adopt(f"gs://bucket/moved/{name}", tmp_path / "run")
    assert read_config(path).publish.url == "gs://bucket/moved"


def test_a_config_that_names_code_is_opened_only_by_who_trusts_it(interrupted, tmp_path, gcs):
    name = next(n for n in gcs.buckets["bucket"] if n.endswith("/config.json"))
    text = gcs.buckets["bucket"][name].decode()
    gcs.buckets["bucket"][name] = text.replace('"kind": "lm"', '"kind": "evil:Config"').encode()
    assert gcs.buckets["bucket"][name] != text.encode()
    with pytest.raises(ConfigError, match=r"evil:Config(.|\n)*--trust-code"):
        adopt(interrupted, tmp_path / "run")


def test_status_and_verify_read_an_address(interrupted, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EVERSTEP_CACHE", str(tmp_path / "cache"))
    found = facts(run_path(interrupted, weights="none"))
    assert (found["last_commit"], found["total"], found["published"]) == (4, 6, found["published"]) and 4 in found["published"]
    assert not list((tmp_path / "cache").rglob("MANIFEST.json"))
    checked = verify(run_path(interrupted, weights="all"))
    assert [c["step"] for c in checked] == found["published"][-len(checked) :] and all(c["ok"] for c in checked)
