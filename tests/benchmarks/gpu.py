"""How the trainer does on an accelerator: speed over a bare loop, model FLOPs utilisation, memory, a trace, equal bits.

`python -m tests.benchmarks.gpu [--out FOLDER] [--model llama-125m] [--rows 8] [--seq-len 2048] [--numerics exact] [--cpu]`

Everything is measured in processes of its own, one after the other, for a process keeps the card's memory as long as it
lives. The bare loop is that of `tests.benchmarks.loop`, in the same process and with the same settings, so its kernels are the
trainer's. Parameters after so many steps are those of two processes that know nothing of each other. Without an accelerator
there is nothing to measure, which is said; `--cpu` runs the same code in small on the CPU, to see that it works.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
FORMULA = "MFU = tokens/s x (6 N + 12 L H Q T) / peak FLOP/s of all devices"


def measure(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """Steps per second of both loops, MFU where the peak is known, the trainer's peak of memory, and a trace."""
    import jax

    from trainer.callbacks.throughput import device_peak_bytes
    from trainer.params import count
    from trainer.throughput import peak_flops

    from . import loop

    problem = loop.language(model, rows=args.rows, seq_len=args.seq_len)
    row = loop.Row(lambda: problem, args.steps, log_every=50, goal=0.99, per_dispatch=args.per_dispatch)
    trainer = loop.trainer_loop(problem, row)
    trainer(0, 2 * args.per_dispatch)
    peak_bytes = device_peak_bytes(jax.local_devices())  # before the bare loop, whose memory is not the trainer's
    with jax.profiler.trace(str(args.out / "trace")):
        trainer(0, 4 * args.per_dispatch)
    del trainer
    found: dict[str, Any] = loop.compare(problem, row, runs=args.runs)
    devices = jax.devices()
    keys = {"params": jax.random.key(0), "dropout": jax.random.key(0)}
    num_parameters = count(jax.eval_shape(lambda: model.build().init(keys, problem.inputs(problem.batches[0]))))
    peak = peak_flops(devices[0].device_kind, dtype=model.dtype)
    per_token = model.flops_per_token(args.seq_len)
    tokens_per_s = found["trainer_steps_per_s"] * args.rows * args.seq_len
    return found | {
        "device": devices[0].device_kind,
        "num_devices": len(devices),
        "num_parameters": num_parameters,
        "tokens_per_s": tokens_per_s,
        "flops_per_token": per_token,
        "peak_flops_per_s": peak,
        "mfu": tokens_per_s * per_token / (peak * len(devices)) if peak else None,
        "peak_memory_bytes": peak_bytes,
    }


def digest(args: argparse.Namespace, model: Any) -> dict[str, Any]:
    """The sha256 of the parameters after so many steps from the seed."""
    import itertools

    import jax

    from trainer import TrainerConfig
    from trainer.params import digest, flatten

    from . import loop

    problem = loop.language(model, rows=args.rows, seq_len=args.seq_len)
    config = TrainerConfig(enable_progress_bar=False, check_val_every_n_epoch=-1, steps_per_dispatch=args.per_dispatch)
    trainer = problem.trainer(config, model, loop.OPTIMIZER, problem.batches[0])
    trainer.train_model(itertools.cycle(problem.batches), None, num_train_steps=args.digest_steps)
    return {"params_sha256": digest(flatten(jax.device_get(trainer.state.params)))}


def child(args: argparse.Namespace, what: str) -> dict[str, Any]:
    """What `measure` or `digest` gives in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        env = {**os.environ, "JAX_PLATFORMS": "cpu"} if args.cpu else dict(os.environ)
        command = [sys.executable, "-m", "tests.benchmarks.gpu", *args.given, "--child", what, "--answer", answer.name]
        subprocess.run(command, cwd=ROOT, env=env, check=True)
        return json.loads(Path(answer.name).read_text())


def answer(args: argparse.Namespace) -> None:
    """The work of a child."""
    from configs.load import load
    from trainer.backend import set_up_jax

    set_up_jax(numerics=args.numerics)
    # The tokens here are random numbers, so the smallest tokenizer will do, whatever the model's vocabulary is.
    model = load("accelerator", [f"model={args.model}", "data.tokenizer.kind=byte", "data.tokenizer.vocab_size=null"]).model
    found = {"measure": measure, "digest": digest}[args.child](args, model)
    Path(args.answer).write_text(json.dumps(found))


def platform() -> str:
    """The platform that JAX would use, asked of a process that goes away again."""
    run = subprocess.run([sys.executable, "-c", "import jax; print(jax.default_backend())"], capture_output=True, text=True, check=False)
    return run.stdout.split()[-1] if run.returncode == 0 else f"none ({run.stderr.strip().splitlines()[-1]})"


def parse() -> argparse.Namespace:
    """The command line; sizes that were not given are large on an accelerator, and small with --cpu."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "gpu", help="a folder for gpu.json and the trace")
    parser.add_argument("--cpu", action="store_true", help="the same code in small, on the CPU")
    parser.add_argument("--numerics", choices=("exact", "fast"), default="exact")
    parser.add_argument("--model", help="a group of configs/presets/model")
    for name in ("rows", "seq-len", "steps", "runs", "per-dispatch", "digest-steps"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--child", choices=("measure", "digest"), help=argparse.SUPPRESS)
    parser.add_argument("--answer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    small = {"model": "llama-tiny", "rows": 2, "seq_len": 32, "steps": 4, "runs": 1, "per_dispatch": 1, "digest_steps": 4}
    large = {"model": "llama-125m", "rows": 8, "seq_len": 2048, "steps": 50, "runs": 5, "per_dispatch": 1, "digest_steps": 20}
    for name, value in (small if args.cpu else large).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out.absolute()
    args.given = sys.argv[1:]
    return args


def main() -> int:
    args = parse()
    if args.child:
        answer(args)
        return 0
    if not args.cpu and (found := platform()) not in ("gpu", "tpu"):
        print(f"NO ACCELERATOR: JAX finds {found}, so nothing was measured. `--cpu` runs the same code in small on the CPU.")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    result = child(args, "measure")
    digests = [child(args, "digest")["params_sha256"] for _ in range(2)]
    sizes = {
        name: getattr(args, name) for name in ("model", "rows", "seq_len", "steps", "runs", "per_dispatch", "digest_steps", "numerics")
    }
    result |= {"sizes": sizes, "params_sha256": digests, "equal_bits": digests[0] == digests[1]}
    (args.out / "gpu.json").write_text(json.dumps(result, indent=2) + "\n")
    report(result, args.out)
    return 1 if args.numerics == "exact" and not result["equal_bits"] else 0


def report(result: dict[str, Any], out: Path) -> None:
    """Print it."""
    sizes, speeds = result["sizes"], (result["trainer_steps_per_s"], result["bare_steps_per_s"])
    print(f"{result['num_devices']} x {result['device']}, numerics {sizes['numerics']}")
    print(f"{sizes['model']}, {result['num_parameters']:,} parameters, batches of {sizes['rows']} x {sizes['seq_len']} tokens")
    print(f"medians of {sizes['runs']} runs of {sizes['steps']} steps of each loop, in turn\n")
    print(f"steps/s       trainer {speeds[0]:.3f}, bare loop {speeds[1]:.3f}, ratio {result['ratio']:.4f}")
    print(f"tokens/s      {result['tokens_per_s']:,.0f}; {result['flops_per_token']:.4g} model FLOPs per token")
    if result["mfu"] is None:
        print("MFU           left out: the peak of this device is not known")
    else:
        print(f"MFU           {result['mfu']:.1%}; {FORMULA}; dense bf16 peak {result['peak_flops_per_s'] / 1e12:g} TFLOP/s")
    memory = result["peak_memory_bytes"]
    print(f"peak memory   {'not counted by this device' if memory is None else f'{memory / 2**30:.2f} GiB on one device'}")
    print(f"parameters    {'equal' if result['equal_bits'] else 'NOT EQUAL'} after {sizes['digest_steps']} steps in two processes:")
    print("              " + "\n              ".join(result["params_sha256"]))
    print(f"written       {out / 'gpu.json'} and {out / 'trace'}")


if __name__ == "__main__":
    sys.exit(main())
