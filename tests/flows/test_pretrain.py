"""The flow on a real Prefect server: what is done, in which order, what the UI shows, and what a second call does again."""

import base64
import json
import shutil

import pytest

from configs.load import read_config
from flows.use import evaluate
from tasks.summary import best_of, is_finished
from tasks.writer import settle_config, writing
from trainer import manifest, rows
from trainer.checkpoint import verify
from trainer.errors import DivergedError
from trainer.module import TrainerModule

pytestmark = pytest.mark.usefixtures("api_url")


def run(config, path):
    from flows.pretrain import pretrain

    return pretrain(config, str(path))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    return tmp_path_factory.mktemp("done")


@pytest.fixture
def finished(micro, done):
    """(config, directory, result) of a run that is trained once for this module."""
    config, path = micro("name=flow-test"), done / "run"
    if not path.exists():
        run(config, path)
    return config, path


def test_a_run_is_trained_validated_published_tested_and_reported(finished):
    config, path = finished
    found = rows.read(path / "metrics.jsonl")
    keys = [(r["split"], r["step"]) for r in found]
    assert sorted(keys) == sorted(set(keys)), "a row stands twice"
    assert {k for k in keys if k[0] == "val"} == {("val", 0), ("val", 4), ("val", 6)}  # every second chunk, and the last
    assert ("test", 6) in keys and {k for k in keys if k[0] == "train"} == {("train", 3), ("train", 6)}
    assert [c["step"] for c in verify(path) if c["ok"]] == [2, 4, 6]
    assert [c["step"] for c in verify(path / "published") if c["ok"]] == [2, 4, 6]
    assert is_finished(config, read_dir(path)) and read_config(path) == config
    events = [json.loads(line)["event"] for line in (path / "events.jsonl").read_text().splitlines()]
    assert events[0] == "started" and events[-1] == "finished" and events.count("published") == 3


def read_dir(path):
    from trainer.rundir import RunDir

    return RunDir(path)


@pytest.mark.fault(24)
def test_the_test_row_is_of_the_best_weights_and_carries_the_last_step(micro, tmp_path):
    config = micro("checkpoint.monitor_mode=max")  # the worst is the best: the last step is not
    result = run(config, tmp_path / "run")
    vals = {r["step"]: r["loss"] for r in rows.read(tmp_path / "run" / "metrics.jsonl") if r["split"] == "val"}
    best = max(vals, key=lambda step: (vals[step], -step))
    assert best == 0
    assert result["best_step"] == best == result["test"]["best_step"]
    of_the_best, of_the_last = (evaluate(tmp_path / "run", step=step, split="test")["values"]["loss"] for step in (best, 6))
    assert result["test"]["loss"] == pytest.approx(of_the_best, rel=1e-6) != pytest.approx(of_the_last, rel=1e-6)
    assert [r["step"] for r in rows.read(tmp_path / "run" / "metrics.jsonl") if r["split"] == "test"] == [6]
    assert best in [c["step"] for c in verify(tmp_path / "run") if c["ok"]]


def test_the_report_holds_the_figures_the_picture_and_a_sample(finished):
    _, path = finished
    text = (path / "report.md").read_text()
    for row in rows.read(path / "metrics.jsonl"):
        if row["split"] in ("val", "test"):
            assert f"{row['bits_per_byte']:.3f}" in text or f"{row['bits_per_byte']:.4f}" in text
    assert (path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((path / "sample.json").read_text())["text"] in text
    assert "interpolated byte 5-gram" in text and "![loss](loss.png)" in text


def test_the_server_knows_the_tasks_by_what_they_did_and_shows_report_and_tables(finished, api_url):
    import time

    from prefect import get_client
    from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey, FlowRunFilter, FlowRunFilterId, FlowRunFilterName

    wanted = {"prepare[flow-test]", "init[flow-test]", "train[0-2]", "train[2-4]", "train[4-6]", "validate[4]", "publish[6]"}
    with get_client(sync_client=True) as client:
        deadline = time.monotonic() + 30
        while True:  # states of task runs reach the database by way of a queue
            (flow_run,) = client.read_flow_runs(flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=["flow-test"])))
            names = {t.name for t in client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id])))}
            if wanted <= names or time.monotonic() > deadline:
                break
            time.sleep(0.3)
        assert wanted <= names
        assert flow_run.state.is_completed()
        keys = ArtifactFilterKey(any_=["flow-test-report", "flow-test-validations", "flow-test-checkpoints", "progress"])
        versions = client.read_artifacts(artifact_filter=ArtifactFilter(key=keys))
        found = {a.key: a.data for a in sorted(versions, key=lambda a: a.created)}
    assert found.keys() == {"flow-test-report", "flow-test-validations", "flow-test-checkpoints", "progress"}
    picture = found["flow-test-report"].split("data:image/png;base64,")[1].split(")")[0]
    assert base64.b64decode(picture).startswith(b"\x89PNG")
    assert [r["step"] for r in json.loads(found["flow-test-validations"])] == [0, 4, 6]


def test_a_finished_run_called_again_trains_nothing_and_writes_no_row(finished, tmp_path):
    config, path = finished
    shutil.copytree(path, tmp_path / "moved")  # a run directory may be moved
    before = (tmp_path / "moved" / "metrics.jsonl").read_bytes()
    with writing(config, tmp_path / "moved") as writer:
        writer.session.train_until = writer.session.evaluate = writer.session.start = None  # whoever calls them fails
        run(config, tmp_path / "moved")
    assert (tmp_path / "moved" / "metrics.jsonl").read_bytes() == before


def test_what_is_missing_at_the_end_is_made_again_and_is_the_same(finished, tmp_path):
    config, path = finished
    place = tmp_path / "run"
    shutil.copytree(path, place)
    table = {(r["split"], r["step"]): rows.stable(rows.values_of(r)) for r in rows.read(place / "metrics.jsonl")}
    digests = {c["step"]: c["state_sha256"] for c in verify(place)}
    shutil.rmtree(place / "checkpoints" / manifest.name_of(6))
    shutil.rmtree(place / "published" / "checkpoints" / manifest.name_of(4))
    (place / "report.md").unlink()
    run(config, place)
    assert {(r["split"], r["step"]): rows.stable(rows.values_of(r)) for r in rows.read(place / "metrics.jsonl")} == table
    assert {c["step"]: c["state_sha256"] for c in verify(place)} == digests
    assert [c["step"] for c in verify(place / "published") if c["ok"]] == [2, 4, 6]
    assert (place / "report.md").exists()


class Doubled(TrainerModule):
    """A trainer whose loss is not that of the objective."""

    def loss_function(self, params, apply_fn, batch, rng, train=True):
        """The objective's loss, with an extra pull of every parameter to zero."""
        import jax
        import jax.numpy as jnp

        (total, weight), aux = super().loss_function(params, apply_fn, batch, rng, train)
        pull = sum(jnp.sum(jnp.abs(p)) for p in jax.tree.leaves(params))
        return (total + weight * pull, weight), aux


def test_a_run_whose_end_is_moved_forgets_what_was_evaluated_only_because_it_ended(finished, micro, tmp_path):
    place = read_dir(shutil.copytree(finished[1], tmp_path / "run"))
    before = rows.read(place.metrics)
    config = micro("name=flow-test", "num_steps=10", "optimizer.schedule.decay_steps=6")
    settle_config(place, config, dry=True)
    assert rows.read(place.metrics) == before
    settle_config(place, config)
    gone = [(row["split"], row["step"]) for row in before if row not in rows.read(place.metrics)]
    assert sorted(gone) == [("test", 6), ("val", 6)], "in a run of 10 steps chunks are validated at 4, 8 and 10"
    assert best_of(config, place) in (0, 4)


def test_a_subclass_of_the_trainer_changes_what_the_flow_trains(finished, micro, tmp_path):
    _, path = finished
    run(micro("name=subclass", f"trainer.kind={__name__}:Doubled"), tmp_path / "run")
    plain, pulled = ({c["step"]: c["params_sha256"] for c in verify(p)} for p in (path, tmp_path / "run"))
    assert plain.keys() == pulled.keys() and not set(plain.values()) & set(pulled.values())


class Diverging(TrainerModule):
    """A trainer whose loss is not a number from the first step on."""

    def loss_function(self, params, apply_fn, batch, rng, train=True):
        """Not a number in training."""
        (total, weight), aux = super().loss_function(params, apply_fn, batch, rng, train)
        return (total * (float("nan") if train else 1.0), weight), aux


def test_a_diverged_loss_fails_the_flow_once_with_its_type_and_the_step(micro, tmp_path):
    with pytest.raises(DivergedError, match="step 1 are not finite") as diverged:
        run(micro("name=diverging", f"trainer.kind={__name__}:Diverging"), tmp_path / "run")
    assert diverged.value.step == 1
    (failed,) = [e for e in read_dir(tmp_path / "run").read_events() if e["event"] == "failed"]
    assert failed["type"] == "DivergedError" and failed["step"] == 1


def test_a_run_that_a_callback_ends_early_is_done_there_and_called_again_stays_so(micro, tmp_path):
    from flows.show import facts

    early = "trainer.callbacks=[{kind: early_stopping, monitor: loss, patience: 1, min_delta: 100.0}, {kind: ema}]"
    config, path = micro("name=early", early, "trainer.logger.parts=[{kind: csv}]"), tmp_path / "run"
    result = run(config, path)
    splits = [(r["split"], r["step"]) for r in rows.read(path / "metrics.jsonl")]
    assert splits == [("val", 0), ("train", 3), ("val_ema", 4), ("val", 4), ("test", 4)]
    assert (result["status"], result["step"]) == ("done", 4) and "loss" in result["test"]
    found = facts(path)
    assert found["status"] == "done" and "was not better" in found["early_stop"] and found["total"] == 4
    assert "Training ended at step 4 of 6" in (path / "report.md").read_text()
    assert (path / "metrics-test.csv").exists(), "the logger has the last row too"
    assert is_finished(config, read_dir(path))
    with writing(config, path) as writer:
        writer.session.evaluate = None  # whoever calls it fails
        assert run(config, path) == result
    assert [(r["split"], r["step"]) for r in rows.read(path / "metrics.jsonl")] == splits


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("trainer.callbacks=[{kind: checkpoint}]", "checkpoint.every"),
        ("trainer.logger.parts=[{kind: jsonl}]", "by itself"),
        ("trainer.logger.path=logs", "run directory"),
        ("trainer.callbacks=[{kind: early_stopping, monitor: loss, patience: 0}]", "patience"),
    ],
)
def test_onlookers_that_a_run_has_no_use_for_are_refused_when_its_config_is_read(micro, override, word):
    from trainer.errors import ConfigError

    with pytest.raises(ConfigError, match=word):
        micro(override)
