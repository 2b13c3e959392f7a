"""What the training loader gives: tokens per second, memory of its own, and the time of a seek, over rows larger than memory
likes; and how long a training waits for it.

`python -m tests.benchmarks.loader [--gigabytes 10] [--seq-len 2048] [--batch-size 32] [--batches 500] [--json]`

The rows are written for this into a temporary folder, one shard over and over by hard links: the loader maps each as a file
of its own. Memory is what the process has beyond mapped files, which the kernel takes back when it needs the space.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from trainer.data.base import FIELDS
from trainer.data.loader import MOST_HELD, SPARE, TrainLoader, batches_of
from trainer.data.packed import ShardedRows


def write_shard(path: Path, *, rows: int, seq_len: int) -> int:
    """A shard of random tokens; its size in bytes."""
    rng = np.random.default_rng(0)
    arrays = [pa.FixedSizeListArray.from_arrays(pa.array(rng.integers(0, 4096, rows * seq_len, dtype=np.int32)), seq_len) for _ in FIELDS]
    schema = pa.schema([(name, array.type) for name, array in zip(FIELDS, arrays, strict=True)])
    with pa.OSFile(str(path), "wb") as f, pa.ipc.new_file(f, schema) as writer:
        for start in range(0, rows, 1024):
            writer.write_batch(pa.record_batch([a.slice(start, 1024) for a in arrays], schema=schema))
    return path.stat().st_size


def own_memory() -> int:
    """Bytes of this process that are not of mapped files."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def at_rest(read: Callable[[], int]) -> int:
    """What `read` says once all is read ahead that will be."""
    last, same = read(), 0
    while same < 3:
        time.sleep(0.07)
        now = read()
        same, last = (same + 1 if abs(now - last) < 100_000 else 0), now
    return last


def linked(folder: Path, *, size: float, rows: int, seq_len: int) -> list[Path]:
    """Shards of `size` bytes together, which are one."""
    first = folder / "train-00000.arrow"
    own = write_shard(first, rows=rows, seq_len=seq_len)
    paths = [first]
    while own * len(paths) < size:
        paths.append(folder / f"train-{len(paths):05}.arrow")
        os.link(first, paths[-1])
    return paths


def measure(paths: list[Path], *, batch_size: int, batches: int) -> dict[str, float]:
    """What a loader gives, and takes, over five times `batches`."""
    import grain  # noqa: F401  what the libraries take is not the loader's

    before = own_memory()
    rows = ShardedRows(paths)
    loader = TrainLoader(batches_of(rows, batch_size=batch_size, seed=0))
    shape = next(loader)["inputs"].shape
    speeds, memory, seeks = [], [], []
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(batches):
            next(loader)
        speeds.append(batches * shape[0] * shape[1] / (time.perf_counter() - began))
        memory.append(at_rest(own_memory) - before)
    for k in range(5):
        began = time.perf_counter()
        loader.set_state({"next_index": (10**9 + 7919 * k) // batch_size})
        next(loader)
        seeks.append(time.perf_counter() - began)
    bound = MOST_HELD * len(FIELDS) * 4 * shape[0] * shape[1] + SPARE
    found = {"rows": len(rows), "tokens_per_s": statistics.median(speeds), "lowest": min(speeds), "seek": statistics.median(seeks)}
    return {**found, "memory": max(memory), "memory_early": memory[0], "bound": bound}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=500)
    parser.add_argument("--shard-rows", type=int, default=8192)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        paths = linked(Path(folder), size=args.gigabytes * 1e9, rows=args.shard_rows, seq_len=args.seq_len)
        size = sum(path.stat().st_size for path in paths)
        found = measure(paths, batch_size=args.batch_size, batches=args.batches)
    if args.json:
        print(json.dumps({**found, "bytes": size}))
        return
    mb = {name: found[name] / 1e6 for name in ("memory", "memory_early", "bound")}
    print(f"{found['rows']:,} rows of {args.seq_len} tokens in {len(paths)} files, {size / 1e9:.1f} GB")
    print(f"speed     {found['tokens_per_s'] / 1e6:.1f} million tokens/s (median of 5, lowest {found['lowest'] / 1e6:.1f})")
    print(
        f"memory    {mb['memory_early']:.0f} MB after {args.batches} batches, {mb['memory']:.0f} MB at most after {5 * args.batches}, "
        f"without libraries and mapped files; the bound is {mb['bound']:.0f} MB"
    )
    print(f"seek      {1000 * found['seek']:.1f} ms to row 10^9 and its batch (median of 5)")
    wait, step = wait_in_training(steps=200)
    print(f"waiting   {100 * wait / step:.2f} % of a step, {1e6 * wait:.0f} us of {1e3 * step:.2f} ms (preset tiny, 200 steps)")


def wait_in_training(*, steps: int) -> tuple[float, float]:
    """Seconds that a step of the preset tiny waits for its batch, and that it takes, once it is compiled."""
    from configs.load import load
    from tasks.preparation import prepare
    from tasks.session import training_config
    from trainer.assemble import TrainingConfig, assemble
    from trainer.run import Run
    from trainer.rundir import RunDir

    waited = [0.0]
    plain = TrainLoader.__next__

    def timed(self: TrainLoader) -> Any:
        began = time.perf_counter()
        batch = plain(self)
        waited[0] += time.perf_counter() - began
        return batch

    TrainLoader.__next__ = timed  # type: ignore[method-assign]
    try:
        config = load("tiny", ["execution.mode=inline"])
        training = TrainingConfig.model_validate(training_config(config))
        with tempfile.TemporaryDirectory() as folder:
            run = Run(training, assemble(training), RunDir(Path(folder)), Path(prepare(config.data).path))
            run.open()
            run.train_until(50)
            waited[0], began = 0.0, time.perf_counter()
            run.train_until(50 + steps)
            seconds = time.perf_counter() - began
            run.close()
    finally:
        TrainLoader.__next__ = plain  # type: ignore[method-assign]
    return waited[0] / steps, seconds / steps


if __name__ == "__main__":
    main()
