"""What training through the whole pipeline costs over the same steps in a bare jitted loop.

`python -m tests.benchmarks.overhead [--runs 3] [--steps 320] [--chunk 80]`

The pipeline is the real command: flow, server, trainer process, commits, publishing, rows. The bare loop is written here
from jax and optax alone, with the same model, batches and memory settings, and does nothing but update. Both are timed from
a warm state, in turn, over the same number of steps; CPU seconds are the kernel's, of the trainer alone and of all processes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BARE = """
import json, sys, time
from pathlib import Path
import jax, jax.numpy as jnp, optax
from configs.load import load
from tasks.preparation import prepare
from trainer.backend import set_up_jax
from trainer.data import load_manifest, train_loader

warm, steps, overrides = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
config = load("tiny", overrides)
set_up_jax(numerics="exact")
folder = Path(prepare(config.data).path)
loader = train_loader(folder, load_manifest(folder), batch_size=config.data.batch_size, seed=config.seed)
model = config.model.build()
schedule = config.optimizer.schedule.build(num_steps=config.num_steps)
o = config.optimizer
mask = lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)
tx = optax.chain(
    optax.clip_by_global_norm(o.clip_norm),
    optax.adamw(schedule, b1=o.beta1, b2=o.beta2, eps=o.eps, weight_decay=o.weight_decay, mask=mask),
)

def inputs(batch):
    return {"tokens": batch["inputs"], "segment_ids": batch["segment_ids"], "positions": batch["positions"]}

def loss(params, batch):
    logits = model.apply({"params": params}, inputs(batch), train=True)
    mask = batch["segment_ids"] != 0
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    return jnp.sum(nll * mask) / jnp.sum(mask)

@jax.jit
def init(batch):
    params = model.init({"params": jax.random.key(0), "dropout": jax.random.key(0)}, inputs(batch))["params"]
    return params, tx.init(params)

def step(state, batch):
    params, opt_state = state
    grads = jax.grad(loss)(params, batch)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

step = jax.jit(step, donate_argnums=0)
state = init(next(loader))
for _ in range(warm):
    state = step(state, next(loader))
jax.block_until_ready(state)
wall, cpu = time.monotonic(), time.process_time()
for i in range(steps):
    state = step(state, next(loader))
    if i % 2:
        jax.block_until_ready(state)  # no more than two steps in flight, as in the trainer
jax.block_until_ready(state)
print(json.dumps({"wall": time.monotonic() - wall, "trainer": time.process_time() - cpu}))
"""

OVERRIDES = ["validate_every=1000000", "trainer.logger.log_every_n_steps=25"]


def cpu_seconds(pid: int) -> float:
    """User and system time of a live process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def family(pid: int) -> dict[int, str]:
    """The process and its children, each with the last word of its command that names it."""
    found = {pid: "command"}
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            line = Path(f"/proc/{child}/cmdline").read_text()
            found[int(child)] = "server" if "server_main" in line else "trainer" if "trainer.worker" in line else "other"
    return found


def pipeline(overrides: list[str], *, warm: int, steps: int) -> dict[str, float]:
    """Wall and CPU seconds of the command between its commits at `warm` and `warm + steps`."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        command = [str(Path(sys.executable).with_name("everstep")), "train", "tiny", *overrides, "--run-dir", str(run_dir)]
        with open(Path(folder) / "log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as p:
            marks = []
            for step in (warm, warm + steps):
                while not any(e["event"] == "committed" and e["step"] >= step for e in events(run_dir)):
                    assert p.poll() is None, (Path(folder) / "log").read_text()
                    time.sleep(0.01)
                people = family(p.pid)
                marks.append((time.monotonic(), {pid: cpu_seconds(pid) for pid in people}, people))
            p.kill()
    (t0, before, names), (t1, after, _) = marks
    spent = {pid: after.get(pid, 0.0) - before[pid] for pid in before}
    trainer = max((pid for pid in before if names[pid] == "trainer"), key=lambda pid: before[pid])
    return {"wall": t1 - t0, "trainer": spent[trainer], "all": sum(spent.values()), "rest": sum(spent.values()) - spent[trainer]}


def events(run_dir: Path) -> list[dict]:
    """The whole lines of the run's event log."""
    try:
        return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines(keepends=True) if line.endswith("\n")]
    except OSError:
        return []


def bare(overrides: list[str], *, warm: int, steps: int) -> dict[str, float]:
    """Wall and CPU seconds of the bare loop over as many steps."""
    from tasks.child import MALLOC

    env = {**os.environ, "GLIBC_TUNABLES": MALLOC}
    run = subprocess.run(
        [sys.executable, "-c", BARE, str(warm), str(steps), *overrides], env=env, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout.splitlines()[-1])
    return found | {"all": found["trainer"], "rest": 0.0}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=320)
    parser.add_argument("--chunk", type=int, default=80)
    args = parser.parse_args()
    overrides = [f"num_steps={args.chunk + args.steps + 2 * args.chunk}", f"chunk_steps={args.chunk}", *OVERRIDES]
    pairs = []
    for i in range(args.runs):
        pairs.append((pipeline(overrides, warm=args.chunk, steps=args.steps), bare(overrides, warm=args.chunk, steps=args.steps)))
        print(f"run {i + 1} of {args.runs}: {pairs[-1]}", file=sys.stderr, flush=True)
    print(f"{args.steps} steps of tiny in chunks of {args.chunk}; medians of {args.runs} runs of each, in turn\n")
    print(f"{'':<34}{'pipeline':>10}{'bare loop':>11}{'ratio':>8}")
    for key, name in (("wall", "wall, s"), ("trainer", "CPU of the trainer, s"), ("all", "CPU of all processes, s")):
        a, b = (statistics.median(pair[k][key] for pair in pairs) for k in (0, 1))
        ratio = statistics.median(p[0][key] / p[1][key] for p in pairs)
        print(f"{name:<34}{a:>10.2f}{b:>11.2f}{ratio:>8.3f}")


if __name__ == "__main__":
    main()
