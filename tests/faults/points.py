"""Stops a run at every change that it makes to its directory, and lets another life bring it to its end.

`python -m tests.faults.points [--points 30] [--seed 0]`, or `--points all`; what fails on the way is written to stderr

A run is what a flow does, without its server: trained in chunks, committed, validated, published, tidied, tested. A library that is
preloaded (freeze.c) fails the n-th system call that changes the directory and all that follow; a write may also be cut in half.
What is then on the disk is what a kill there leaves. Its end must be that of a run that nothing happened to: the same state in
every checkpoint, the same rows once each, whole copies, and nothing else lying about.
"""

import argparse
import contextlib
import ctypes
import faulthandler
import json
import logging
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).with_name("freeze.c")
NEVER = 1 << 40


def preload(folder: Path) -> dict[str, str]:
    """The environment of a process that has the library; compiles it. Raises OSError where there is no C compiler."""
    library = folder / "freeze.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return {**os.environ, "LD_PRELOAD": str(library)}


class Freezer:
    """The library in this process."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self._library.freeze_count.restype = ctypes.c_long
        self._library.freeze_call.restype = ctypes.c_char_p

    def arm(self, root: Path, at: int, *, torn: bool = False) -> None:
        """Fail the `at`-th change of `root` from now on, and all later ones."""
        self._library.freeze_arm(str(root).encode(), ctypes.c_long(at), int(torn))

    def thaw(self) -> int:
        """Let everything through; the number of changes since `arm`."""
        self._library.freeze_thaw()
        return self._library.freeze_count()

    def settle(self) -> int:
        """Thaw when threads that a kill would have ended try nothing any more; the number of changes since `arm`."""
        before, tried = -1, self._library.freeze_count()
        while before != tried:
            time.sleep(0.2)
            before, tried = tried, self._library.freeze_count()
        return self.thaw()

    def call(self, number: int) -> str:
        """The name of the system call of a change."""
        return self._library.freeze_call(ctypes.c_long(number)).decode()


@dataclass
class Harness:
    """One config, its data and its compiled trainer, for many runs."""

    config: Any
    data: Any = None
    trainer: Any = None
    freezer: Any = None

    def live(self, path: Path) -> None:
        """One life of a run in `path`, to its end."""
        from configs.run import chunk_ends
        from tasks.publish import bring_back, publish_checkpoint, tidy, withdraw_copies
        from tasks.summary import best_commit
        from tasks.train import _ref
        from tasks.writer import writing

        with writing(self.config, path) as writer:
            session: Any = writer.session
            copies: Any = writer.copies
            copies.insist = lambda work: work()  # a frozen disk stays so
            session._trainer, session.data = self.trainer, Path(self.data.path)
            bring_back(self.config, writer.run_dir)
            ref = _ref(session.open())
            self.trainer = session._trainer
            for end in (0, *chunk_ends(self.config)):
                if end > ref.step:
                    ref = _ref(session.train_until(end))
                if end == ref.step:
                    session.evaluate(end, "val", row=end)
                    publish_checkpoint.fn(self.config, ref, self.data, str(path))
                    known = copies.known
                    gone = {step: known[step] for step in tidy(self.config, writer.run_dir, known) if step in known}
                    for step in gone:
                        copies.remove(step)
                    withdraw_copies.fn(self.config, gone, str(path))
            best = best_commit(self.config, writer.run_dir, ref)
            session.evaluate(best.step, "test", row=ref.step)

    def left(self, path: Path) -> dict[str, Any]:
        """What a run came to, of all that may not depend on its lives."""
        from trainer import manifest, rows
        from trainer.checkpoint import verify

        found = rows.read(path / "metrics.jsonl")
        return {
            "state": {row["step"]: row["state_sha256"] for row in verify(path)},
            "rows": sorted(json.dumps({"step": r["step"], "split": r["split"], **rows.stable(rows.values_of(r))}) for r in found),
            "published": {s: manifest.problems(path / "published/checkpoints" / manifest.name_of(s), s) for s in published(path)},
            "litter": sorted(
                p.name for folder in ("checkpoints", "published/checkpoints") for p in (path / folder).iterdir() if not p.name.isdigit()
            ),
        }

    def through(self, path: Path, points: list[tuple[int, bool]]) -> list[str]:
        """Lives that are stopped at `points`, one after the other, and one that is not; the calls at which they were."""
        calls = []
        faulthandler.dump_traceback_later(60, exit=True)  # no life takes so long: it hangs
        for at, torn in points:
            self.freezer.arm(path, at, torn=torn)
            with contextlib.suppress(Exception), quiet():
                self.live(path)
            reached = self.freezer.settle()
            calls.append(self.freezer.call(at) if reached >= at else "the end")
        with quiet():
            self.live(path)
        faulthandler.cancel_dump_traceback_later()
        return calls


def published(path: Path) -> list[int]:
    """Steps with a published copy."""
    from trainer import manifest

    return manifest.steps_in(path / "published" / "checkpoints")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What fails on the way is meant to."""
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def harness(folder: Path, *overrides: str) -> Harness:
    """A run of six steps with a callback that has a state, on a few texts, unless `overrides` say otherwise."""
    from configs.load import load
    from tasks.preparation import prepare

    texts = folder / "texts"
    texts.mkdir()
    for i in range(120):
        (texts / f"{i:03}.txt").write_text(" ".join(str((i * 7 + k) % 50) for k in range(40 + i)))
    words = "num_steps=6 chunk_steps=3 model.vocab_size=257 model.width=16 model.num_layers=1 model.num_heads=2 model.num_kv_heads=1"
    more = "data.seq_len=32 data.batch_size=4 data.val_fraction=0.1 data.test_fraction=0.1 optimizer.schedule.warmup_steps=2"
    rest = "trainer.logger.log_every_n_steps=3 execution.mode=inline checkpoint.keep_latest=2 checkpoint.every=1 data.tokenizer.kind=byte"
    last = ["data.tokenizer.vocab_size=null", "trainer.callbacks=[{kind: ema}]", f"data.path={texts}"]
    config = load("tiny", [*words.split(), *more.split(), *rest.split(), *last, *overrides])
    made = Harness(config)
    made.data = prepare(config.data)
    return made


def main() -> int:
    """Run, print a line per stop and a score; 1 where an end was another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", default="30", help="so many, drawn at random; or all, in order")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--deaths", type=int, default=2, help="of each run, at most")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="everstep-points-") as name:
        folder = Path(name)
        if "freeze.so" not in os.environ.get("LD_PRELOAD", ""):
            return subprocess.run([sys.executable, "-m", "tests.faults.points", *sys.argv[1:]], env=preload(folder), check=False).returncode
        return campaign(folder, points=args.points, seed=args.seed, deaths=args.deaths)


def campaign(folder: Path, *, points: str, seed: int, deaths: int) -> int:
    """See the module; returns the exit code."""
    made = harness(folder)
    made.freezer = Freezer()
    made.freezer.arm(folder / "whole", NEVER)
    made.live(folder / "whole")
    total, want = made.freezer.thaw(), made.left(folder / "whole")
    rng, began = random.Random(seed), time.monotonic()
    every = [[(n, False)] for n in range(1, total + 1)] + [
        [(n, True)] for n in range(1, total + 1) if made.freezer.call(n) in ("write", "pwrite64")
    ]
    drawn = [
        [(rng.randint(1, total), rng.random() < 0.3) for _ in range(rng.randint(1, deaths))]
        for _ in range(0 if points == "all" else int(points))
    ]
    chosen = every if points == "all" else drawn
    print(f"{total} changes in a run that nothing happens to; {len(chosen)} runs are stopped", flush=True)
    wrong = 0
    for i, stops in enumerate(chosen):
        path = folder / f"run-{i}"
        try:
            calls = made.through(path, stops)
            found = made.left(path)
            other = [f"{key} {found[key]} for {want[key]}" for key in want if found[key] != want[key]]
        except Exception as e:
            calls, other = [], [f"{type(e).__name__}: {e}"]
        wrong += bool(other)
        if other or i % 50 == 0:
            print(f"{i:>5} {stops} {calls} {'OTHER: ' + '; '.join(other) if other else 'the same'}", flush=True)
        subprocess.run(["rm", "-rf", path], check=True)
    print(f"{len(chosen) - wrong} of {len(chosen)} runs came to the same end, {time.monotonic() - began:.0f} s")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
