"""Commits: whole or not there at all, bit for bit, and any damage to any file is seen."""

import json
import random
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer import checkpoint, manifest, metrics
from trainer.checkpoint import Checkpoints, verify
from trainer.errors import CheckpointError, ConfigError, DamagedError
from trainer.manifest import name_of
from trainer.params import flatten
from trainer.state import TrainState


def state_at(step):
    """A state whose values depend on the step, with two dtypes, a scalar and an optimizer with nested containers."""
    rng = np.random.default_rng(step)
    params = {"a": {"w": jnp.asarray(rng.normal(size=(8, 6)), jnp.float32)}, "b": jnp.asarray(rng.normal(size=5), jnp.bfloat16)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return TrainState(jnp.asarray(step, jnp.int32), params, tx.init(params), {"stats": {"mean": jnp.full(3, step + 0.5)}})


def window_at(step):
    return metrics.window_of(metrics.parse({"loss": {"value": jnp.float32(step / 3), "count": step + 1}}, ("mean", "std")))


def commit(run_dir, *steps):
    store = Checkpoints(run_dir)
    for step in steps:
        store.save(state_at(step), window_at(step), {"loader": {"next_index": step}})
        store.finish()
    store.close()


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("good")
    commit(run_dir, 10, 20)
    return run_dir


def equal(a, b):
    leaves = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in leaves)


def test_what_is_restored_is_what_was_saved_bit_for_bit(good):
    store = Checkpoints(good)
    found = store.restore(10, state_at(0), window_at(0))
    assert equal(found.state, state_at(10)) and equal(found.window, window_at(10))
    assert found.meta.items() >= {"step": 10, "extra": [], "loader": {"next_index": 10}}.items() and found.extra == {}
    assert store.newest_whole() == 20


def test_who_opens_and_restores_the_newest_checkpoint_reads_its_files_once_and_every_later_restore_again(good, tmp_path, monkeypatch):
    place, read, problems = tmp_path / "run", [], manifest.problems
    shutil.copytree(good, place)
    monkeypatch.setattr(manifest, "problems", lambda folder, step: (read.append(step), problems(folder, step))[1])
    store = Checkpoints(place)
    assert store.newest_whole() == 20
    store.restore(20, state_at(0), window_at(0))
    assert read == [10, 20]
    for step in (10, 20):
        victim = place / "checkpoints" / name_of(step) / "meta" / "metadata"
        victim.write_bytes(victim.read_bytes() + b" ")
        with pytest.raises(DamagedError):
            store.restore(step, state_at(0), window_at(0))
    store.close()


def test_verify_names_both_steps_and_equal_states_have_equal_digests(good, tmp_path):
    commit(tmp_path, 20)
    (again,) = verify(tmp_path)
    first, second = verify(good)
    assert [first["step"], second["step"]] == [10, 20] and first["ok"] and second["ok"]
    assert again == second and first["params_sha256"] != second["params_sha256"]


def test_the_loader_and_the_open_window_are_part_of_the_state_digest(tmp_path):
    digests = set()
    for i, (window, loader) in enumerate([(1, 5), (2, 5), (1, 6)]):
        store = Checkpoints(tmp_path / str(i))
        store.save(state_at(5), window_at(window), {"loader": {"next_index": loader}})
        store.finish()
        store.close()
        (row,) = verify(tmp_path / str(i))
        digests.add(row["state_sha256"])
    assert len(digests) == 3


@pytest.mark.parametrize("seed", range(12))
def test_any_damage_to_any_file_is_seen_and_the_older_checkpoint_is_used(good, tmp_path, seed):
    rng, run_dir = random.Random(seed), tmp_path / "run"
    shutil.copytree(good, run_dir)
    folder = run_dir / "checkpoints" / name_of(20)
    path = rng.choice([p for p in sorted(folder.rglob("*")) if p.is_file() and p.stat().st_size])
    data = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "flip", "truncate", "delete", "extra byte", "extra file"])
    if kind == "flip":
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        del data[rng.randrange(len(data)) :]
    elif kind == "extra byte":
        data += b"\0"
    elif kind == "extra file":
        (folder / "params" / "stray").write_bytes(b"x")
    path.unlink() if kind == "delete" else path.write_bytes(bytes(data))
    before = sorted(p for p in run_dir.rglob("*"))
    assert [(row["step"], row["ok"]) for row in verify(run_dir)] == [(10, True), (20, False)], (kind, path.name)
    assert sorted(p for p in run_dir.rglob("*")) == before  # verify only reads
    store = Checkpoints(run_dir)
    assert store.newest_whole() == 10 and (run_dir / "damaged" / "20-1").is_dir()
    assert equal(store.restore(10, state_at(0), window_at(0)).state, state_at(10))
    store.save(state_at(20), window_at(20), {"loader": {"next_index": 20}})  # trained again: the same logical digests
    store.finish()
    store.close()
    assert [r["state_sha256"] for r in verify(run_dir)] == [r["state_sha256"] for r in verify(good)]


def test_what_callbacks_keep_comes_back_as_it_was_and_counts_in_the_state_digest(tmp_path):
    digests = set()
    for value in (1.5, 2.5):
        extra = {"0": {"average": {"w": jnp.full((2, 3), value)}}, "2": {"steps": np.arange(4)}}
        store = Checkpoints(tmp_path / str(value))
        store.save(state_at(5), window_at(5), {}, extra)
        store.finish()
        assert equal(store.restore(5, state_at(0), window_at(0)).extra, jax.device_get(extra))
        store.close()
        digests.add(verify(tmp_path / str(value))[0]["state_sha256"])
    assert len(digests) == 2


def test_names_with_dots_come_back_as_they_were_and_two_arrays_of_one_name_are_refused(tmp_path):
    dotted = TrainState(
        jnp.asarray(5, jnp.int32), {"a.b": {"c.": jnp.ones(3)}, "d": jnp.zeros(2)}, {"count.": jnp.arange(2)}, {"x.y": jnp.arange(3.0)}
    )
    extra = {"Mine-0": {"block.0": {"w": np.arange(4)}, "block": {"0": {"v": np.arange(5)}}, "n": np.ones(1)}}
    store = Checkpoints(tmp_path)
    store.save(dotted, window_at(5), {}, extra)
    store.finish()
    found = store.restore(5, jax.tree.map(jnp.zeros_like, dotted), window_at(0))
    assert jax.tree.structure(found.extra) == jax.tree.structure(extra) and equal(found.extra, extra)
    assert jax.tree.structure(found.state) == jax.tree.structure(dotted) and equal(found.state, dotted)
    assert equal(checkpoint.read_state(tmp_path, 5, dotted), dotted)
    store.close()
    with pytest.raises(ConfigError, match=r"two arrays are both called 'params.a.b'"):
        flatten({"a.b": 1, "a": {"b": 2}}, "params")


def test_other_shapes_and_dtypes_are_refused_not_cast(good):
    store = Checkpoints(good)
    other = state_at(0)
    half = other.replace(params={**other.params, "a": {"w": other.params["a"]["w"].astype(jnp.bfloat16)}})
    with pytest.raises(CheckpointError, match=r"float32\[8, 6\] at params.a.w, but the config needs bfloat16"):
        store.restore(10, half, window_at(0))


@pytest.mark.fault(28)
def test_what_was_lost_between_device_and_file_is_seen_though_every_file_is_as_its_manifest_says(good, tmp_path):
    """A bit flips in host memory before Orbax writes it: checksums of files are then of the wrong bytes."""
    place = tmp_path / "run"
    shutil.copytree(good, place)
    digests = json.loads((place / "checkpoints" / name_of(20) / "meta" / "metadata").read_text())["device_digest"]
    wrong = state_at(20)
    bits = np.asarray(wrong.params["a"]["w"]).view(np.uint32).copy()
    bits[3, 2] ^= 1
    wrong.params["a"]["w"] = jnp.asarray(bits.view(np.float32))
    other = tmp_path / "other"
    store = Checkpoints(other)
    store.save(wrong, window_at(20), {"loader": {"next_index": 20}})
    store.finish()
    store.close()
    folder = place / "checkpoints" / name_of(20)
    shutil.rmtree(folder / "params")
    shutil.copytree(other / "checkpoints" / name_of(20) / "params", folder / "params")
    manifest.write(folder, 20)
    assert not manifest.problems(folder, 20)
    store = Checkpoints(place)
    with pytest.raises(DamagedError, match=r"params\.a\.w"):
        store.restore(20, state_at(0), window_at(0))
    store.set_aside(20, ["as said"])
    assert store.newest_whole() == 10
    assert digests.keys() >= {"params.a.w", "params.b", "step"}


def test_a_save_below_the_newest_step_is_an_error_not_silence(tmp_path):
    commit(tmp_path, 10, 20)
    store = Checkpoints(tmp_path)
    with pytest.raises(CheckpointError, match="newest checkpoint is 20"):
        store.save(state_at(15), window_at(15), {})


KILLED = """
import os, sys
sys.path.insert(0, sys.argv[1])
from test_checkpoint import commit, manifest
write = manifest.write
def cut_off(folder, step):
    if step == 20:
        os.kill(os.getpid(), 9)
    return write(folder, step)
manifest.write = cut_off
commit(sys.argv[2], 10, 20)
"""


def test_a_kill_between_orbax_and_the_manifest_leaves_no_checkpoint_and_the_repeat_commits(tmp_path):
    here = __file__.rsplit("/", 1)[0]
    run = subprocess.run([sys.executable, "-c", KILLED, here, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.returncode == -9, run.stderr[-2000:]
    assert (tmp_path / "checkpoints" / name_of(20)).is_dir(), "Orbax had not renamed yet: the test shows nothing"
    assert [(r["step"], r["ok"]) for r in verify(tmp_path)] == [(10, True), (20, False)]
    commit(tmp_path, 20)
    assert [(r["step"], r["ok"]) for r in verify(tmp_path)] == [(10, True), (20, True)]


def test_a_manifest_is_canonical_and_ends_with_its_own_checksum(good):
    path = good / "checkpoints" / name_of(10) / manifest.NAME
    data = path.read_bytes()
    assert data.endswith(b',"crc32c":"%s"}' % manifest.own_crc(path.parent).encode())
    files = json.loads(data)["files"]
    assert files.keys() == {p.relative_to(path.parent).as_posix() for p in path.parent.rglob("*") if p.is_file() and p != path}
    assert checkpoint.steps_in(good / "nowhere") == []
