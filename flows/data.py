"""The commands about data: prepare it, and look at what was prepared."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from trainer.errors import StoppedError

from .console import Preparing, say
from .shell import Json, answer, next_step, shown, split_preset

DryRun = Annotated[bool, Parameter(name="--dry-run", negative="", help="Only say what would be read, and what is done; reads listings.")]

app = App(name="data", help="Look at prepared data.")


def prepare(
    *words: str,
    dry_run: Annotated[
        bool, Parameter(name="--dry-run", negative="", help="Say what would be read and what is done; read listings only.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Prepare the data of a preset: read it, split it, train the tokenizer, pack it. Done once; training does it by itself.

    Killed or stopped, it goes on where it was when it is called again.
    """
    from configs.load import load
    from tasks.preparation import Preparation
    from trainer.data import load_manifest

    preset, overrides = split_preset(words)
    config = load(preset, overrides)
    data: Any = config.data
    preparation = Preparation(data)
    if dry_run:
        _look(preparation, words, as_json=as_json)
        return
    ref = preparation.known()
    if ref is not None:
        say(f"found prepared in {ref.path}")
    elif len(preparation.units) == 1:
        ref = Preparation(data, on_progress=say).make()  # a server of its own would take longer than the work
    else:
        try:
            ref = _by_flow(config)
        except StoppedError as e:
            say(f"stopped: {e}; what was done is kept")
            next_step(f"everstep prepare {' '.join(words)}".rstrip())
            answer({"status": "stopped"}, as_json=as_json)
            raise SystemExit(e.exit_code) from e
    manifest = load_manifest(ref.path)
    for name, split in manifest.splits.items():
        if not as_json:
            say(f"{name:<6} {split.documents:>9,} documents  {split.bytes:>13,} bytes  {split.tokens:>12,} tokens  {split.rows:>10,} rows")
    next_step(f"everstep train {' '.join(words)}".rstrip(), f"everstep data inspect {shown(ref.path)}")
    answer({"path": ref.path, "digest": ref.digest, "splits": {k: v.to_dict() for k, v in manifest.splits.items()}}, as_json=as_json)


def _by_flow(config: Any) -> Any:
    """Run the flow, with a server of this command's own where the user has none. Raises StoppedError."""
    from tasks.server import server
    from tasks.stop import was_asked

    from .console import Display
    from .launch import check_surroundings, stop_signals

    check_surroundings()
    with Display() as display, Preparing(display) as shows, stop_signals():
        try:
            with server() as url:
                from prefect import tags

                from .prepare import listeners
                from .prepare import prepare as flow

                display.line(f"Prefect UI    {url.removesuffix('/api')}")
                listeners.append(shows.advance)
                try:
                    with tags("everstep", config.name):
                        return flow(config)
                finally:
                    listeners.remove(shows.advance)
        except BaseException as e:
            if was_asked(e):
                raise StoppedError("a stop was asked for", step=0) from e
            raise


def _look(preparation: Any, words: tuple[str, ...], *, as_json: bool) -> None:
    """What `prepare` would do."""
    from tasks.preparation import results

    known = preparation.known()
    paths = [job.path for job in preparation.surveys()]
    read = sum(path is not None and results.read(path) is not None for path in paths)
    found = {
        "path": preparation.config.path,
        "files": len(preparation.files),
        "bytes": sum(file.size for file in preparation.files),
        "shards": len(preparation.units),
        "shards_read": read,
        "prepared": known.path if known else None,
    }
    if not as_json:
        say(f"{found['path']}: {found['files']:,} files, {found['bytes']:,} bytes, in {found['shards']:,} shards")
        say(f"prepared in {known.path}" if known else f"not prepared; {read:,} of {len(paths):,} shards were read already")
    next_step(f"everstep {'train' if known else 'prepare'} {' '.join(words)}".rstrip())
    answer(found, as_json=as_json)


@app.command
def inspect(
    folder: Path,
    *,
    rows: Annotated[int, Parameter(help="Rows to decode, drawn at random.")] = 2,
    split: str = "train",
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """What a prepared folder holds: counts, lengths, how full the rows are, and some of them as text."""
    from trainer.data import load_manifest

    manifest = load_manifest(folder)
    samples = list(_decoded(folder, manifest, split, count=rows, seed=seed))
    if not as_json:
        _show(manifest, samples, say)
    next_step(f"less {shown(folder / 'report.md')}", f"everstep data inspect {shown(folder)} --seed {seed + 1}")
    answer({"path": str(folder.absolute()), **manifest.to_dict(), "samples": samples}, as_json=as_json)


def _decoded(folder: Path, manifest: Any, split: str, *, count: int, seed: int) -> Any:
    """Rows of a split drawn by `seed`, as {"row", "padding", "documents": [text of each stretch]}."""
    import numpy as np

    from trainer.data import ShardedRows, load_tokenizer

    record = manifest.split(split)
    tokenizer = load_tokenizer(folder)
    held = ShardedRows([folder / shard.file for shard in record.shards])
    drawn = np.random.default_rng(seed).choice(len(held), min(max(count, 0), len(held)), replace=False)
    for number in sorted(drawn.tolist()):
        row = held[number]
        segments = row["segment_ids"]
        stretches = [row["targets"][segments == i] for i in range(1, int(segments.max(initial=0)) + 1)]
        yield {"row": number, "padding": int((segments == 0).sum()), "documents": [tokenizer.decode(some) for some in stretches]}


def _show(manifest: Any, samples: list[dict[str, Any]], line: Callable[[str], object]) -> None:
    line(f"{manifest.digest}  rows of {manifest.seq_len} tokens out of {manifest.vocab_size:,}, packing {manifest.settings['packing']}")
    for name, split in manifest.splits.items():
        line(
            f"{name:<6} {split.documents:>9,} documents  {split.bytes:>13,} bytes  {split.tokens:>12,} tokens  {split.rows:>10,} rows, "
            f"{100 * split.utilisation:.2f} % full, in {len(split.shards)} files"
        )
    line(f"left out: {manifest.duplicates.documents:,} documents and {manifest.duplicates.paragraphs:,} paragraphs that stand elsewhere")
    for reason, count in manifest.left_out.items():
        line(f"left out: {count:,} rows: {reason}")
    most = max((count for counts in manifest.histogram.values() for count in counts), default=1)
    for i in range(max(map(len, manifest.histogram.values()), default=0)):
        counts = {name: own[i] if i < len(own) else 0 for name, own in manifest.histogram.items()}
        if any(counts.values()):
            bar = "#" * -(-40 * max(counts.values()) // most)
            line(f"{2**i:>9,} tokens up  " + "  ".join(f"{name} {count:>7,}" for name, count in counts.items()) + f"  {bar}")
    for sample in samples:
        line(f"--- row {sample['row']}, {sample['padding']} of {manifest.seq_len} are padding")
        line("\n~~~\n".join(sample["documents"]))
