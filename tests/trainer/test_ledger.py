"""Rollbacks: a run that met spikes and went back ends as one that was told from the start to leave their batches out."""

import itertools

import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.trainer.lives import digests, stable_rows
from trainer import ledger
from trainer.checkpoint import Checkpoints
from trainer.data import batch_of, load_manifest
from trainer.errors import DivergedError, RolledBackError
from trainer.module import TrainerModule
from trainer.rundir import RunDir

POISON = (5, 6, 8)  # places in the order of batches
MARKS: dict = {}
LONG = ("num_steps=8", "chunk_steps=8", f"trainer.kind={__name__}:Poisoned", "trainer.on_spike=rollback", "checkpoint.keep_latest=9")
SOON = ("trainer.spike.least_losses=3", "trainer.spike.num_losses=4")


class Poisoned(TrainerModule):
    """A trainer whose loss is ten times as high for some batches."""

    def loss_function(self, params, apply_fn, batch, rng, train=True):
        """The objective's, higher where the batch has the mark of a poisoned one."""
        (total, weight), aux = super().loss_function(params, apply_fn, batch, rng, train)
        bad = jnp.isin(_mark(batch), jnp.array(MARKS["bad"], jnp.int32)) if train else False
        return (jnp.where(bad, 10.0, 1.0) * total, weight), aux


def _mark(batch):
    """A number that tells batches apart."""
    x = batch["inputs"]
    return (x * jnp.arange(1, x.size + 1, dtype=jnp.int32).reshape(x.shape)).sum(dtype=jnp.int32)


def poison(config, data):
    """Mark the batches at the places of POISON of a run."""
    size, seed = config.data.batch_size, config.trainer.seed
    found = [batch_of(data, load_manifest(data), step=place + 1, batch_size=size, seed=seed)[1] for place in POISON]
    MARKS["bad"] = [int(_mark({k: jnp.asarray(v) for k, v in batch.items()})) for batch in found]


@pytest.fixture
def lives(life):
    """`lives(place, *overrides, ends)`: train to each end in turn, beginning a new life wherever one ended; how often it rolled back."""

    def live(place, *overrides, ends=(8,), anew=False):
        def begin():
            run = life(place, *LONG, *SOON, *overrides)
            poison(run.config, run.data)
            run.open()
            return run

        run, rollbacks, todo = begin(), 0, list(ends)
        while todo:
            try:
                if run.step < todo[0]:
                    run.train_until(todo[0])
                if todo[0] in (4, 8):
                    run.evaluate(todo[0], "val")
                todo.pop(0)
            except RolledBackError as e:
                rollbacks += 1
                run.close()
                run, todo = begin(), [end for end in ends if end >= e.step]
                assert run.step == e.step
            else:
                if anew:
                    run.close()
                    run = begin()
        run.close()
        return rollbacks

    return live


def rolled_back(place):
    return [e for e in RunDir(place).read_events() if e["event"] == "rolled_back"]


@pytest.mark.parametrize(
    ("before", "left_out", "events"),
    [
        (0, "[[5,7],[8,9]]", [(6, [5, 6], []), (6, [6, 7], []), (7, [8, 9], [])]),
        (2, "[[1,7]]", [(6, [3, 6], ["4", "5"]), (4, [1, 7], ["2", "3"])]),
    ],
    ids=["the spikes alone", "and two steps before"],
)
def test_a_run_that_rolled_back_has_the_bits_and_rows_of_one_that_left_the_batches_out(lives, tmp_path, before, left_out, events):
    settings = (f"trainer.spike.steps_before={before}", "checkpoint.every=1")
    rolled, told = tmp_path / "rolled", tmp_path / "told"
    assert lives(rolled, *settings, ends=(4, 8)) == len(events)
    assert [(e["step"], e["places"], list(e["abandoned"])) for e in rolled_back(rolled)] == events
    assert lives(told, *settings, f"data.leave_out={left_out}", ends=(4, 8)) == 0
    assert digests(rolled) == digests(told) and sorted(digests(rolled)) == list(range(9))
    assert stable_rows(rolled) == stable_rows(told)
    abandoned = [step for _, _, steps in events for step in steps]
    assert sorted(p.name[0] for p in rolled.glob("abandoned/*")) == sorted(abandoned)
    meta = ledger.meta_of(rolled / "checkpoints", 8)
    assert meta["rolled_back"] == sorted(places for _, places, _ in events), "and the commit knows what it was trained without"


def test_killed_at_any_moment_of_a_rollback_it_happens_once_and_ends_the_same_in_whatever_chunks(lives, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(cls, name, when):
        work = getattr(cls, name)

        def dying(self, *args, **kwargs):
            if when(*args):
                monkeypatch.setattr(cls, name, work)
                raise Killed
            return work(self, *args, **kwargs)

        monkeypatch.setattr(cls, name, dying)

    settings = ("trainer.spike.steps_before=2",)
    lives(tmp_path / "whole", *settings)
    expected = digests(tmp_path / "whole")[8]
    moments = [
        (RunDir, "event", lambda name, *args: name == "rolled_back"),  # found, and not noted
        (Checkpoints, "abandon", bool),  # noted, and nothing moved yet; `bool` is of the steps to be moved
        (Checkpoints, "_move", lambda step, folder: step == 4),  # the newest moved, and not the one before
    ]
    for number, (cls, name, when) in enumerate(moments):
        place, ends = tmp_path / str(number), [(2, 3, 5, 8), (3, 4, 5, 6, 8), (2, 4, 5, 7, 8)][number]
        kill(cls, name, when)
        with pytest.raises(Killed):
            lives(place, *settings, ends=ends)
        lives(place, *settings, ends=ends, anew=True)
        assert digests(place)[8] == expected, name
        assert [(e["step"], e["places"]) for e in rolled_back(place)] == [(6, [3, 6]), (4, [1, 7])], name


def test_after_so_many_rollbacks_the_next_spike_is_an_error(lives, tmp_path):
    with pytest.raises(DivergedError, match=r"rolled back 1 times .* trainer.spike.max_rollbacks") as bound:
        lives(tmp_path / "run", "trainer.spike.max_rollbacks=1")
    assert bound.value.step == 6 and len(rolled_back(tmp_path / "run")) == 1


RANGES = st.lists(st.tuples(st.integers(0, 30), st.integers(1, 5)).map(lambda x: (x[0], x[0] + x[1])), max_size=6)


@given(RANGES, RANGES)
def test_joined_ranges_are_apart_in_order_and_hold_the_places_that_any_of_them_holds(some, others):
    found = ledger.joined(some, others)
    assert {x for a, b in found for x in range(a, b)} == {x for a, b in [*some, *others] for x in range(a, b)}
    assert all(b < c for (_, b), (c, _) in itertools.pairwise(found))
