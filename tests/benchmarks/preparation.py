"""What preparing data costs over the bare tokenizer on the same text, in the same number of processes.

`python -m tests.benchmarks.preparation [--megabytes 50] [--workers N] [--files 1]`

The bare tokenizer is `tokenizers`' encode_batch_fast in so many processes of one thread each, over the same texts, already in
memory, cut into equal shares; nothing is read, hashed, packed or written. The preparation is the whole of it, by the flow's
own task runner on a server, with the tokenizer given; what learning one costs (a fixed price: it is learnt from a sample)
is measured apart. CPU seconds are the kernel's, of all processes, and steadier than the clock on a machine that is shared.
"""

import argparse
import json
import lzma
import os
import random
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

from configs.load import load
from tasks.server import server
from tests.benchmarks.timed import Watched

ROOT = Path(__file__).resolve().parents[2]


def texts_of(size: int) -> list[str]:
    """Stretches of the bundled documentation, each made its own, `size` bytes of them."""
    with lzma.open(ROOT / "tasks" / "corpus" / "python-docs.jsonl.xz", "rt", encoding="utf-8") as f:
        words = [word for line in f for word in json.loads(line)["text"].split(" ")]
    rng, made, have = random.Random(0), [], 0
    while have < size:
        start = rng.randrange(len(words) - 3000)
        # A word in eight is another one: without that, paragraphs would repeat and be left out.
        some = [w if rng.random() > 0.125 else rng.choice(words) for w in words[start : start + rng.randrange(50, 3000)]]
        made.append(" ".join(some))
        have += len(made[-1].encode())
    return made


def write(folder: Path, texts: list[str], files: int) -> None:
    """`texts` in JSON lines: equal shares in few files, very unequal ones in many."""
    folder.mkdir()
    rng = random.Random(1)
    weights = [rng.paretovariate(0.8) if files > 16 else 1.0 for _ in range(files)]
    shares: list[list[str]] = [[] for _ in range(files)]
    for i, text in zip(rng.choices(range(files), weights, k=len(texts)), texts, strict=True):
        shares[i].append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    for i, share in enumerate(shares):
        (folder / f"{i:05}.jsonl").write_text("".join(share), encoding="utf-8")


def bare(tokenizer: str, texts: list[str]) -> int:
    """The number of tokens of `texts`."""
    os.environ["RAYON_NUM_THREADS"] = "1"
    import tokenizers

    made = tokenizers.Tokenizer.from_file(tokenizer)
    made.encode_special_tokens = True
    count = 0
    for start in range(0, len(texts), 100):
        count += sum(len(e.ids) for e in made.encode_batch_fast(texts[start : start + 100], add_special_tokens=False))
    return count


@contextmanager
def measured(found: dict) -> Iterator[None]:
    """Wall and CPU seconds, those of ended children included."""

    def cpu() -> float:
        return sum(u.ru_utime + u.ru_stime for u in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))

    began, used = time.monotonic(), cpu()
    yield
    found.update(wall=time.monotonic() - began, cpu=cpu() - used)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--megabytes", type=float, default=50)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--kinds", default="threads,processes")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="everstep-bench-") as name:
        run(Path(name), options)


def run(home: Path, options: argparse.Namespace) -> None:
    """Measure in `home`, and print a table."""
    from tasks.preparation.tokenizer import train_bpe

    texts = texts_of(int(options.megabytes * 1e6))
    size = sum(len(text.encode()) for text in texts)
    write(home / "texts", texts, options.files)
    tokenizer = home / "tokenizer.json"
    learnt: dict = {}
    with measured(learnt):
        train_bpe(texts[: len(texts) * 16 // max(16, int(options.megabytes))], vocab_size=4096).save(str(tokenizer))
    rows: list[tuple[str, dict]] = []
    base: dict = {}
    with measured(base), ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(bare, [str(tokenizer)] * options.workers, [texts[i :: options.workers] for i in range(options.workers)]))
    rows.append(("bare tokenizer", base))
    os.environ.setdefault("PREFECT_HOME", str(home / "prefect"))
    words = [
        f"data.path={home / 'texts'}",
        "data.tokenizer.kind=file",
        f"data.tokenizer.path={tokenizer}",
        "data.tokenizer.vocab_size=null",
    ]
    with server(home / "server.log"):
        from flows.prepare import prepare

        for kind in options.kinds.split(","):
            os.environ["EVERSTEP_CACHE"] = str(home / kind)
            config = load(
                "tiny", [*words, f"execution.prepare={kind}", f"execution.prepare_workers={options.workers}", f"name=bench-{kind}"]
            )
            found: dict = {"stages": []}
            with patch("tasks.data.TaskPerJob", Watched), patch.object(Watched, "stages", found["stages"]), measured(found):
                prepare(config)
            rows.append((f"preparation, {kind}", found))
    print(f"{size / 1e6:.1f} MB in {options.files} files, {options.workers} workers")
    print(f"{'':<26}{'wall s':>9}{'CPU s':>9}{'MB/s':>8}{'over the bare one: wall':>26}{'CPU':>8}")
    for name, found in rows:
        over = [found[what] / base[what] - 1 for what in ("wall", "cpu")]
        print(f"{name:<26}{found['wall']:>9.1f}{found['cpu']:>9.1f}{size / 1e6 / found['wall']:>8.2f}{over[0]:>+26.1%}{over[1]:>+8.1%}")
    print(f"{'learning the tokenizer':<26}{learnt['wall']:>9.1f}{learnt['cpu']:>9.1f}")
    for name, found in rows[1:]:
        print(f"\n{name}: share of each stage in which a worker had no job, of each worker")
        for stage, jobs, seconds, busy in found["stages"]:
            print(f"  {stage:<10}{jobs:>5} jobs{seconds:>8.1f} s   " + "  ".join(f"{1 - one / seconds:>6.1%}" for one in busy))


if __name__ == "__main__":
    main()
