"""A run that publishes to a bucket: an outage delays nothing but the copies, and the bucket alone is enough to go on."""

import shutil

import pytest

from tasks.summary import is_finished
from trainer import manifest, rows
from trainer.checkpoint import verify
from trainer.errors import StorageError
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


def test_a_store_that_stays_away_fails_the_end_with_what_is_missing_and_the_next_command_makes_it_up(config, gcs, tmp_path, short_pauses):
    config = config.replace(publish=config.publish.replace(wait_seconds=0.3), num_steps=2)
    gcs.fault = lambda method, path: "503"
    with pytest.raises(StorageError, match=r"steps 2 are not published after 0\.3 s.*503.*everstep resume"):
        run(config, tmp_path / "run")
    assert (tmp_path / "run" / "report.md").exists() and steps_in_bucket(gcs) == []
    gcs.fault = lambda method, path: None
    run(config, tmp_path / "run")
    assert steps_in_bucket(gcs) == [2]
