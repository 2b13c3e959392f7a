"""Every second of a run is in one bucket, whatever dies."""

import random

import pytest

from tasks.goodput import BUCKETS, Timekeeper, books_of, goodput
from trainer.progress import PHASES, Place, Progress


class Trainer:
    """A trainer on a clock of the test's."""

    def __init__(self, clock):
        self._clock, self._seconds, self.phase, self.commits = clock, dict.fromkeys(PHASES, 0.0), "idle", 0
        self._since = clock()

    def enter(self, phase):
        self._seconds[self.phase] += self._clock() - self._since
        self.phase, self._since = phase, self._clock()

    def seconds(self):
        return {k: v + (self._clock() - self._since if k == self.phase else 0.0) for k, v in self._seconds.items()}

    def read(self):
        return Place(self.phase, 0, 0, 0, self.commits)


@pytest.mark.parametrize("seed", range(20))
def test_every_second_of_a_run_is_in_one_bucket_however_it_is_cut(tmp_path, seed):
    rng, now = random.Random(seed), [1000.0]
    want = dict.fromkeys(BUCKETS, 0.0)
    at_stake = {"step": 0.0, "data": 0.0}
    names = {"imports": "startup", "start": "startup", "callbacks": "other", "sample": "other", "conclude": "other", "close": "other"}

    def lose():
        want["lost"] += sum(at_stake.values())
        at_stake.update(step=0.0, data=0.0)

    for life in range(4):
        keeper = Timekeeper(tmp_path / "books", clock=lambda: now[0], now=lambda: now[0])
        trainer = None
        for _ in range(40):
            what, seconds = rng.choice(["train", "idle", "own", "commit", "die", "prepare"]), rng.random() * 5
            if what == "die":
                keeper.tick()
                keeper.follow(None)
                keeper.lost()
                trainer = None
                lose()
            elif what == "prepare":
                with keeper.within("prepare"):
                    now[0] += seconds
                want["prepare"] += seconds
            elif trainer is None:
                now[0] += seconds
                want["startup"] += seconds
                trainer = Trainer(lambda: now[0])
                keeper.follow(trainer)
            elif what == "train":
                phase = rng.choice([p for p in PHASES if p != "idle"])
                trainer.enter(phase)
                now[0] += seconds
                if rng.random() < 0.5:
                    keeper.tick()
                trainer.enter("idle")
                bucket = names.get(phase, phase)
                (at_stake if bucket in at_stake else want)[bucket] += seconds
            elif what == "commit":
                trainer.commits += 1
                keeper.tick()
                for name in at_stake:
                    want[name] += at_stake[name]
                    at_stake[name] = 0.0
            else:
                now[0] += seconds
                want["startup"] += seconds
        keeper.tick()  # and killed
        lose()
        if life < 3:
            now[0] += 100
            want["down"] += 100
    found = Timekeeper(tmp_path / "books", clock=lambda: now[0], now=lambda: now[0]).seconds()
    assert found == pytest.approx(want)
    assert sum(found.values()) == pytest.approx(now[0] - 1000)
    assert books_of(tmp_path / "books") == pytest.approx(want)
    assert goodput(found) == pytest.approx(want["step"] / (sum(want.values()) - want["prepare"]))


def test_after_the_report_nothing_counts_until_the_run_goes_on(tmp_path):
    now = [0.0]

    def keeper():
        return Timekeeper(tmp_path / "books", clock=lambda: now[0], now=lambda: now[0])

    first = keeper()
    now[0] += 5
    first.end()
    now[0] += 1000
    assert sum(keeper().seconds().values()) == 5  # somebody looked whether all was done
    again = keeper()
    again.follow(Progress())
    now[0] += 7
    assert sum(again.seconds().values()) == pytest.approx(12)


def test_books_that_are_none_are_begun_anew_and_a_run_without_them_has_none(tmp_path):
    assert books_of(tmp_path / "books") is None
    (tmp_path / "books").write_bytes(b"what is this")
    assert books_of(tmp_path / "books") is None
    assert sum(Timekeeper(tmp_path / "books", clock=lambda: 0.0).seconds().values()) == 0


def test_progress_knows_the_seconds_of_each_phase():
    import time

    progress = Progress()
    began = time.monotonic()
    with progress.within("step"):
        time.sleep(0.05)
        with progress.within("data"):
            time.sleep(0.03)
    found = progress.seconds()
    assert 0.05 <= found["step"] < 0.5 and 0.03 <= found["data"] < 0.5
    assert sum(found.values()) == pytest.approx(time.monotonic() - began, abs=0.01)
