"""What `TrainerModule.train_model` costs over a bare jitted loop: steps per second, and instructions.

`python -m tests.benchmarks.loop [--runs 5] [--rows toy,every,dispatch,tiny] [--json FILE]`

The bare loop is written here from jax and optax alone: the same model, the same host arrays, the same donation, at most two
steps in flight, and nothing but updates. The trainer has all its features on: norms, the look for what is not finite, metrics,
rows. Both run in turn in one process, and a pair is compared within itself, for the machine may be another's by the next. The
clocks run from the warm batch to the end of the last step: wall time, and the CPU time of all threads of the process, which a
neighbour on the machine disturbs less. Both loops allocate as a trainer process does (`tasks.child.MALLOC`), for without it
the kernel's clearing of pages is half a step of `tiny` and drowns the rest. Instructions (user space, of all threads) are those
of a longer run less those of a shorter one, so that start-up and compilation cancel; they are steadiest, where the machine
counts them.
"""

import argparse
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from tasks.child import MALLOC
from trainer import LoggerConfig, TrainerConfig, TrainerModule
from trainer.models import ModelConfig
from trainer.models.linen import LinenModel
from trainer.objectives import LMObjectiveConfig
from trainer.optimizers import AdamWConfig, ScheduleConfig

RATE, CLIP, DECAY = 1e-3, 1.0, 0.1
OPTIMIZER = AdamWConfig(schedule=ScheduleConfig(kind="constant", lr=RATE), weight_decay=DECAY, clip_norm=CLIP)


class MLP(nn.Module):
    """A network of 18,817 parameters."""

    @nn.compact
    def __call__(self, x, *, train=False):
        """`x` (batch, 16) -> (batch, 1)."""
        for width in (128, 128):
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(1)(x)


class MLPConfig(ModelConfig):
    """Nothing to choose."""

    kind: Literal["tests.benchmarks.loop:MLPConfig"] = "tests.benchmarks.loop:MLPConfig"

    def build(self):
        """The model."""
        return LinenModel(MLP())


class Regression(TrainerModule):
    """Mean squared error."""

    def loss_function(self, params, apply_fn, batch, rng, train=True):
        """The mean over the batch."""
        y = apply_fn({"params": params}, batch["inputs"], train=train)
        squares = (y[:, 0] - batch["targets"]) ** 2
        return jnp.mean(squares), ({"loss": {"value": jnp.sum(squares), "count": squares.size}}, {})


@dataclass(frozen=True)
class Problem:
    """A model with its batches, for both loops."""

    model: ModelConfig
    batches: list[dict[str, np.ndarray]]
    trainer: Callable[..., TrainerModule]
    inputs: Callable[[Any], Any]  # of a batch
    loss: Callable[[Any, Any], Any]  # (outputs, batch) -> scalar


def toy() -> Problem:
    """A step of one and a half milliseconds."""
    x = np.random.default_rng(0).uniform(-1, 1, (32, 1536, 16)).astype(np.float32)
    batches = [{"inputs": a, "targets": np.sin(3 * a[:, 0]) * a[:, 1]} for a in x]
    return Problem(MLPConfig(), batches, Regression, lambda b: b["inputs"], lambda y, b: jnp.mean((y[:, 0] - b["targets"]) ** 2))


def tiny() -> Problem:
    """The model of the preset `tiny`, with a step of a tenth of a second or more."""
    from configs.load import load

    config = load("tiny", [])
    return language(config.model, rows=config.data.batch_size, seq_len=config.data.seq_len)


def language(model: Any, *, rows: int, seq_len: int) -> Problem:
    """Random tokens for a language model."""
    tokens = np.random.default_rng(0).integers(0, model.vocab_size, (8, rows, seq_len), np.int32)
    positions = np.broadcast_to(np.arange(seq_len, dtype=np.int32), (rows, seq_len)).copy()
    rest = {"segment_ids": np.ones((rows, seq_len), np.int32), "positions": positions}
    batches = [{"inputs": t, "targets": np.roll(t, -1, axis=1), **rest} for t in tokens]

    def inputs(batch: Any) -> Any:
        return {"tokens": batch["inputs"], "segment_ids": batch["segment_ids"], "positions": batch["positions"]}

    def loss(logits: Any, batch: Any) -> Any:
        mask = batch["segment_ids"] != 0
        return jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"]) * mask) / jnp.sum(mask)

    def trainer(*args: Any) -> TrainerModule:
        return TrainerModule(*args, objective=LMObjectiveConfig().build())

    return Problem(model, batches, trainer, inputs, loss)


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    problem: Callable[[], Problem]
    steps: int
    log_every: int
    goal: float  # steps per second of the trainer over those of the bare loop
    per_dispatch: int = 1
    count: int = 0  # steps between the two runs whose instructions are counted; 0: not counted


ROWS = {
    "toy": Row(toy, 1500, 50, 0.95),
    "every": Row(toy, 1500, 1, 0.7),
    "dispatch": Row(toy, 1500, 50, 0.95, per_dispatch=10),
    "tiny": Row(tiny, 40, 50, 0.99, count=80),
}


class Clocked:
    """Batches round and round, and the clocks, which begin when the first batch after the warm ones is asked for."""

    def __init__(self, batches: list[Any], *, warm: int):
        self.batches, self.warm = itertools.cycle(batches), warm

    def __iter__(self) -> Iterator[Any]:
        for i in itertools.count():
            if i == self.warm:
                self.began = time.perf_counter(), time.process_time()
            yield next(self.batches)

    def seconds(self) -> tuple[float, float]:
        """Wall and CPU seconds."""
        wall, cpu = self.began
        return time.perf_counter() - wall, time.process_time() - cpu


Loop = Callable[[int, int], tuple[float, float]]  # (warm steps, steps) -> wall and CPU seconds of the steps


def trainer_loop(problem: Problem, row: Row) -> Loop:
    """A trainer that begins anew with each call."""
    config = TrainerConfig(
        enable_progress_bar=False,
        check_val_every_n_epoch=-1,
        logger=LoggerConfig(log_every_n_steps=row.log_every),
        steps_per_dispatch=row.per_dispatch,
    )
    trainer = problem.trainer(config, problem.model, OPTIMIZER, problem.batches[0])

    def run(warm: int, steps: int) -> tuple[float, float]:
        trainer.state, trainer.global_step = None, 0
        loader = Clocked(problem.batches, warm=warm)
        trainer.train_model(loader, None, num_train_steps=warm + steps)
        return loader.seconds()

    return run


def bare_loop(problem: Problem) -> Loop:
    """The same of a loop with nothing in it."""
    model = problem.model.build()
    mask = lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)  # noqa: E731
    tx = optax.chain(
        optax.clip_by_global_norm(CLIP),
        optax.adamw(RATE, b1=OPTIMIZER.beta1, b2=OPTIMIZER.beta2, eps=OPTIMIZER.eps, weight_decay=DECAY, mask=mask),
    )

    @jax.jit
    def init(batch: Any) -> Any:
        params = model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, problem.inputs(batch))["params"]
        return params, tx.init(params)

    def step(state: Any, batch: Any) -> Any:
        params, opt_state = state
        loss, grads = jax.value_and_grad(lambda p: problem.loss(model.apply({"params": p}, problem.inputs(batch), train=True), batch))(
            params
        )
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), loss

    step = jax.jit(step, donate_argnums=0)

    def run(warm: int, steps: int) -> tuple[float, float]:
        loader, flying = Clocked(problem.batches, warm=warm), deque()
        state = init(problem.batches[0])
        for batch in itertools.islice(loader, warm + steps):
            state, loss = step(state, batch)
            flying.append(loss)
            if len(flying) > 1:
                flying.popleft().block_until_ready()
        jax.block_until_ready(state)
        return loader.seconds()

    return run


def compare(problem: Problem, row: Row, *, runs: int) -> dict[str, float]:
    """Steps per second of both loops, medians, and the medians of the ratios of pairs: of these, and of CPU time per step."""
    loops = {"trainer": trainer_loop(problem, row), "bare": bare_loop(problem)}
    warm = max(10, row.per_dispatch)
    for loop in loops.values():
        loop(warm, warm)  # compiles
    pairs = []
    for i in range(runs):
        order = list(loops) if i % 2 else list(loops)[::-1]
        pairs.append({name: loops[name](warm, row.steps) for name in order})
    found = {f"{name}_steps_per_s": row.steps / statistics.median(p[name][0] for p in pairs) for name in loops}
    found["ratio"] = statistics.median(p["bare"][0] / p["trainer"][0] for p in pairs)
    return found | {"cpu_over_bare": statistics.median(p["trainer"][1] / p["bare"][1] for p in pairs) - 1}


def instructions(name: str, which: str, steps: int) -> float | None:
    """Instructions of user space of a process of its own that runs so many steps; None where they cannot be counted."""
    with tempfile.NamedTemporaryFile() as out:
        command = ["perf", "stat", "-x,", "-e", "instructions:u", "-o", out.name, sys.executable, "-m", "tests.benchmarks.loop"]
        subprocess.run([*command, "--rows", name, "--only", which, "--steps", str(steps)], check=True)
        (line,) = [x for x in Path(out.name).read_text().splitlines() if "instructions" in x]
    counted = line.split(",")[0]
    return float(counted) if counted.isdigit() else None


def counts() -> str | None:
    """Why instructions cannot be counted here; None: they can."""
    if shutil.which("perf") is None:
        return "perf is not installed"
    run = subprocess.run(["perf", "stat", "-x,", "-e", "instructions:u", "true"], capture_output=True, text=True, check=False)
    return None if run.returncode == 0 and run.stderr[:1].isdigit() else "this machine lets perf count no instructions"


def count(name: str) -> dict[str, float]:
    """Instructions per step of both loops, and what the trainer has more, as a share of the bare loop's."""
    row, found = ROWS[name], {}
    for which in ("bare", "trainer"):
        few, many = (instructions(name, which, steps) for steps in (20, 20 + row.count))
        assert few is not None and many is not None, "perf counted nothing"
        found[which] = (many - few) / row.count
    return {f"{k}_instructions_per_step": v for k, v in found.items()} | {"instructions_over_bare": found["trainer"] / found["bare"] - 1}


COLUMNS = f"{'':<10}{'log every':>10}{'per dispatch':>14}{'trainer':>10}{'bare loop':>11}{'ratio':>8}{'goal':>6}{'CPU':>8}"


def allocate_as_trainers_do() -> None:
    """Begin this program anew with the allocator's settings of a trainer process, which are read at the start of a process."""
    if "GLIBC_TUNABLES" not in os.environ:
        os.execve(sys.executable, [sys.executable, "-m", "tests.benchmarks.loop", *sys.argv[1:]], os.environ | {"GLIBC_TUNABLES": MALLOC})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--rows", default=",".join(ROWS))
    parser.add_argument("--json", type=Path, help="write the figures there, too")
    parser.add_argument("--only", choices=("trainer", "bare"), help="run one loop of the first row and say nothing (for perf)")
    parser.add_argument("--steps", type=int, default=100, help="of --only")
    args = parser.parse_args()
    allocate_as_trainers_do()
    names = args.rows.split(",")
    if args.only:
        row = ROWS[names[0]]
        problem = row.problem()
        (trainer_loop(problem, row) if args.only == "trainer" else bare_loop(problem))(0, args.steps)
        return
    found: dict[str, dict[str, float]] = {}
    uncounted = counts()
    print(f"steps per second, medians of {args.runs} runs of each in turn; CPU time and instructions over those of the bare loop\n")
    print(COLUMNS + ("" if uncounted else f"{'instructions':>14}"))
    for name in names:
        row = ROWS[name]
        f = found[name] = compare(row.problem(), row, runs=args.runs)
        if row.count and not uncounted:
            f |= count(name)
        speeds = (
            f"{f['trainer_steps_per_s']:>10.1f}{f['bare_steps_per_s']:>11.1f}{f['ratio']:>8.3f}{row.goal:>6}{f['cpu_over_bare']:>+8.1%}"
        )
        more = f"{f['instructions_over_bare']:>+14.1%}" if "instructions_over_bare" in f else ""
        print(f"{name:<10}{row.log_every:>10}{row.per_dispatch:>14}{speeds}{more}", flush=True)
    if uncounted:
        print(f"\n{uncounted}, so there is no column of them")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
