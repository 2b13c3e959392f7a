"""What is kept of a step at which the trainer dies: the documents of its batch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.run import RunConfig, config_digest
from trainer.rundir import RunDir


def in_words(number: int, row: Any, tokenizer: Any) -> dict[str, Any]:
    """A row {field: (seq_len,)} as {"row", "padding", "documents": [text of each stretch]}."""
    segments = row["segment_ids"]
    stretches = [row["targets"][segments == i] for i in range(1, int(segments.max(initial=0)) + 1)]
    return {"row": number, "padding": int((segments == 0).sum()), "documents": [tokenizer.decode(some) for some in stretches]}


def batch_in_words(
    config: RunConfig, data: Path, step: int, rolled_back: Sequence[tuple[int, int]] = ()
) -> tuple[int, list[dict[str, Any]]]:
    """The place of a step's batch in the data, and its rows, see `in_words`; `rolled_back` is the run's ledger, if it has one."""
    from trainer.data import batch_of, load_manifest, load_tokenizer
    from trainer.ledger import joined

    c, left = config.data, joined(config.data.leave_out, rolled_back)
    place, batch = batch_of(data, load_manifest(data), step=step, batch_size=c.batch_size, seed=config.trainer.seed, leave_out=left)
    tokenizer = load_tokenizer(data)
    return place, [in_words(i, {name: field[i] for name, field in batch.items()}, tokenizer) for i in range(c.batch_size)]


def keep_batch(config: RunConfig, run_dir: RunDir, data: Path, step: int) -> tuple[int, Path]:
    """Write the documents of a step's batch into the run's logs; its place in the data, and the file."""
    from trainer import ledger

    place, rows = batch_in_words(config, data, step, ledger.read(run_dir, config_digest(config)))
    path = run_dir.logs / f"batch-{step:08d}.txt"
    with open(path, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(f"--- row {row['row']}, {row['padding']} tokens of padding\n")
            f.write("\n~~~\n".join(row["documents"]) + "\n")
    return place, path


def evidence(config: RunConfig, run_dir: RunDir, data: Path, step: int) -> str:
    """Where the documents of a step's batch are written down, and how to train without them."""
    at, path = keep_batch(config, run_dir, data, step)
    return f"the documents of that batch are in {os.path.relpath(path, run_dir.path)}; data.leave_out=[[{at},{at + 1}]] trains without them"
