"""What is kept of a step at which the trainer dies: the documents of its batch."""

from pathlib import Path
from typing import Any

from configs.run import RunConfig
from trainer.rundir import RunDir


def in_words(number: int, row: Any, tokenizer: Any) -> dict[str, Any]:
    """A row {field: (seq_len,)} as {"row", "padding", "documents": [text of each stretch]}."""
    segments = row["segment_ids"]
    stretches = [row["targets"][segments == i] for i in range(1, int(segments.max(initial=0)) + 1)]
    return {"row": number, "padding": int((segments == 0).sum()), "documents": [tokenizer.decode(some) for some in stretches]}


def batch_in_words(config: RunConfig, data: Path, step: int) -> tuple[int, list[dict[str, Any]]]:
    """The place of a step's batch in the data, and its rows, see `in_words`."""
    from trainer.data import batch_of, load_manifest, load_tokenizer

    c = config.data
    place, batch = batch_of(data, load_manifest(data), step=step, batch_size=c.batch_size, seed=config.trainer.seed, leave_out=c.leave_out)
    tokenizer = load_tokenizer(data)
    return place, [in_words(i, {name: field[i] for name, field in batch.items()}, tokenizer) for i in range(c.batch_size)]


def keep_batch(config: RunConfig, run_dir: RunDir, data: Path, step: int) -> tuple[int, Path]:
    """Write the documents of a step's batch into the run's logs; its place in the data, and the file."""
    place, rows = batch_in_words(config, data, step)
    path = run_dir.logs / f"batch-{step:08d}.txt"
    with open(path, "w", encoding="utf-8") as f:
        for row in rows:
            f.write(f"--- row {row['row']}, {row['padding']} tokens of padding\n")
            f.write("\n~~~\n".join(row["documents"]) + "\n")
    return place, path
