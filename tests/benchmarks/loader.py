"""What the training loader gives: tokens per second, memory of its own, and the time of a seek, over rows larger than memory likes.

`python -m tests.benchmarks.loader [--gigabytes 10] [--seq-len 2048] [--batch-size 32] [--batches 500]`

The rows are written for this into a temporary folder, one shard over and over by hard links: the loader maps each as a file
of its own. Memory is what the process has beyond mapped files, which the kernel takes back when it needs the space.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from trainer.data.base import FIELDS
from trainer.data.loader import TrainLoader, batches_of
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--batches", type=int, default=500)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "train-00000.arrow"
        size = write_shard(first, rows=8192 * 2048 // args.seq_len, seq_len=args.seq_len)
        paths = [first]
        while size * len(paths) < args.gigabytes * 1e9:
            paths.append(Path(folder) / f"train-{len(paths):05}.arrow")
            os.link(first, paths[-1])
        rows = ShardedRows(paths)
        loader = TrainLoader(batches_of(rows, batch_size=args.batch_size, seed=0))
        next(loader)
        speeds, memory = [], [own_memory()]
        for _ in range(5):
            began = time.perf_counter()
            for _ in range(args.batches):
                next(loader)
            speeds.append(args.batches * args.batch_size * args.seq_len / (time.perf_counter() - began))
            memory.append(own_memory())
        seeks = []
        for k in range(5):
            began = time.perf_counter()
            loader.set_state({"next_index": (10**9 + 7919 * k) // args.batch_size})
            next(loader)
            seeks.append(time.perf_counter() - began)
    print(f"{len(rows):,} rows of {args.seq_len} tokens in {len(paths)} files, {size * len(paths) / 1e9:.1f} GB")
    print(f"speed     {statistics.median(speeds) / 1e6:.1f} million tokens/s (median of {len(speeds)}, lowest {min(speeds) / 1e6:.1f})")
    print(f"memory    {memory[0] / 1e6:.0f} MB after the first batch, {max(memory) / 1e6:.0f} MB at most, without mapped files")
    print(f"seek      {1000 * statistics.median(seeks):.1f} ms to row 10^9 and its batch (median of {len(seeks)})")


if __name__ == "__main__":
    main()
