"""Kills trainers at random moments until so many are dead, and compares the ends of their runs with one that nothing happened to.

`python -m tests.faults.chaos [--kills 1000] [--seed 0]`

The runs are short and one process drives them: it is the trainers, their spares and their files that are under fire here, at every
moment of a life from its imports on. Most blows are SIGKILL, a few stop the process instead, and a few hit the spare. What is
printed at the end is a score card.
"""

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.faults.points import harness, quiet

STEPS, CHUNK = 60, 15


class Sniper:
    """A thread that strikes at random moments, and times how long it takes from a kill to the next completed step."""

    def __init__(self, rng: random.Random, *, kills: int, mean: float):
        self.left, self.blows, self.recoveries = kills, Counter[str](), list[float]()
        self._rng, self._mean = rng, mean
        self.session: Any = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._hunt, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more blows."""
        self._over.set()
        self._thread.join()

    def _hunt(self) -> None:
        while not self._over.wait(self._rng.expovariate(1 / self._mean)):
            session = self.session
            if session is None or not self.left:
                continue
            kind = self._rng.choices(["kill", "stop", "spare"], [94, 2, 4])[0]
            victim = session._spare if kind == "spare" else session._child
            if victim is None or not victim.alive:
                continue
            self.left -= 1
            self.blows[kind] += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.process.pid, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)
            if kind == "kill":
                self._time(session, victim)

    def _time(self, session: Any, victim: Any) -> None:
        began = time.monotonic()
        while not self._over.is_set() and time.monotonic() - began < 60:
            child = session._child
            if child is not None and child is not victim and child.place.phase in ("step", "data") and child.place.units > 8:
                self.recoveries.append(time.monotonic() - began)
                return
            time.sleep(0.01)


def through(config: Any, data: Any, path: Path, sniper: Sniper | None) -> float | None:
    """One run to its end, trained again after every blow; its goodput."""
    from configs.run import chunk_ends
    from tasks.goodput import goodput
    from tasks.writer import writing
    from trainer.errors import TrainerDiedError

    def insist(work: Any) -> Any:
        while True:
            try:
                return work()
            except TrainerDiedError:
                continue

    with writing(config, path) as writer:
        session: Any = writer.session
        session.data = Path(data.path)
        if sniper is not None:
            sniper.session = session
        insist(session.open)
        for end in chunk_ends(config):
            insist(lambda end=end: session.train_until(end))
            insist(lambda end=end: session.evaluate(end, "val", row=end))
        if sniper is not None:
            sniper.session = None
        return goodput(writer.keeper.seconds())


def end_of(path: Path) -> tuple[str, str]:
    """The digest of the last state, and of all rows without what depends on the clock."""
    from trainer import rows
    from trainer.checkpoint import verify

    found = rows.read(path / "metrics.jsonl")
    plain = sorted(json.dumps({"step": r["step"], "split": r["split"], **rows.stable(rows.values_of(r))}) for r in found)
    return verify(path)[-1]["state_sha256"], json.dumps(plain)


def main() -> int:
    """Run, and print the score card; 1 where an end was another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mean", type=float, default=3.0, help="seconds between blows, on average")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="everstep-chaos-") as name, quiet():
        return campaign(Path(name), kills=args.kills, seed=args.seed, mean=args.mean)


def campaign(folder: Path, *, kills: int, seed: int, mean: float) -> int:
    """See the module; returns the exit code."""
    made = harness(folder, f"num_steps={STEPS}", f"chunk_steps={CHUNK}", "execution.mode=process", "checkpoint.every=4")
    through(made.config, made.data, folder / "whole", None)
    want, sniper, began = end_of(folder / "whole"), Sniper(random.Random(seed), kills=kills, mean=mean), time.monotonic()
    ends, shares = Counter[tuple[str, str]](), []
    while sniper.left or not ends:
        path = folder / f"run-{ends.total()}"
        shares.append(through(made.config, made.data, path, sniper) or 0.0)
        ends[end_of(path)] += 1
        print(
            f"run {ends.total()}: {kills - sniper.left} of {kills} blows, {'the same end' if end_of(path) == want else 'ANOTHER END'}",
            flush=True,
        )
    sniper.stop()
    same = set(ends) == {want}
    print(f"\nblows        {sum(sniper.blows.values())}: " + ", ".join(f"{n} x {kind}" for kind, n in sniper.blows.items()))
    print(f"runs         {ends.total()}, all of which came to an end")
    print(f"ends         {len(ends)}, {'the same bits and rows as undisturbed' if same else 'NOT those of an undisturbed run'}")
    if sniper.recoveries:
        found = sorted(sniper.recoveries)
        most = found[len(found) * 9 // 10]
        print(f"recovery     {statistics.median(found):.2f} s from a kill to the next step, median; 9 of 10 within {most:.2f} s")
    every = (time.monotonic() - began) / max(1, kills)
    print(f"goodput      {statistics.median(shares):.1%} at a blow every {every:.1f} s, median of runs")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
