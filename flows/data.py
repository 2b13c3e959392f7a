"""The commands about data: prepare it, and look at what was prepared."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from trainer.errors import ConfigError, DataError, StoppedError

from .console import Preparing, say
from .shell import Json, RunPath, answer, next_step, run_path, shown, split_preset

LETTERS = 160  # of a document that are shown

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
    from tasks.preparation import preparation_of
    from trainer.data import load_manifest

    preset, overrides = split_preset(words)
    config = load(preset, overrides)
    data: Any = config.data
    preparation = preparation_of(data)
    if dry_run:
        _look(preparation, words, as_json=as_json)
        return
    ref = preparation.known()
    if ref is not None:
        say(f"found prepared in {ref.path}")
    elif len(preparation.units) < 2:
        ref = preparation_of(data, on_progress=say).make()  # a server of its own would take longer than the work
    else:
        try:
            ref = _by_flow(config)
        except StoppedError as e:
            say(f"stopped: {e}; what was done is kept")
            next_step(f"everstep prepare {' '.join(words)}".rstrip())
            answer({"status": "stopped"}, as_json=as_json)
            raise SystemExit(e.exit_code) from e
    manifest = load_manifest(ref.path)
    for name, split in _in_order(manifest.splits):
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
        "path": preparation.path,
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

    from tasks.evidence import in_words
    from trainer.data import load_tokenizer, rows_of

    tokenizer = load_tokenizer(folder)
    held = rows_of(folder, manifest, split)
    drawn = np.random.default_rng(seed).choice(len(held), min(max(count, 0), len(held)), replace=False)
    for number in sorted(drawn.tolist()):
        yield in_words(number, held[number], tokenizer)


def _in_order(splits: Any) -> list[tuple[str, Any]]:
    """The splits as people name them: train, val, test."""
    from tasks.preparation.documents import SPLITS

    return [(name, splits[name]) for name in SPLITS if name in splits]


def _show(manifest: Any, samples: list[dict[str, Any]], line: Callable[[str], object]) -> None:
    line(f"{manifest.digest}  rows of {manifest.seq_len} tokens out of {manifest.vocab_size:,}, packing {manifest.settings['packing']}")
    for name, split in _in_order(manifest.splits):
        line(
            f"{name:<6} {split.documents:>9,} documents  {split.bytes:>13,} bytes  {split.tokens:>12,} tokens  {split.rows:>10,} rows, "
            f"{100 * split.utilisation:.2f} % full, in {len(split.shards)} files"
        )
    line(f"left out: {manifest.duplicates.documents:,} documents and {manifest.duplicates.paragraphs:,} paragraphs that stand elsewhere")
    for reason, count in manifest.left_out.items():
        line(f"left out: {count:,} rows: {reason}")
    most = max((count for counts in manifest.histogram.values() for count in counts), default=1)
    for i in range(max(map(len, manifest.histogram.values()), default=0)):
        counts = {name: own[i] if i < len(own) else 0 for name, own in _in_order(manifest.histogram)}
        if any(counts.values()):
            bar = "#" * -(-40 * max(counts.values()) // most)
            line(f"{2**i:>9,} tokens up  " + "  ".join(f"{name} {count:>7,}" for name, count in counts.items()) + f"  {bar}")
    for sample in samples:
        line(f"--- row {sample['row']}, {sample['padding']} of {manifest.seq_len} are padding")
        line("\n~~~\n".join(sample["documents"]))


@app.command
def show(
    run: RunPath,
    *,
    step: Annotated[int, Parameter(help="A step of the run, from 1; it need not be trained yet.")],
    row: Annotated[int | None, Parameter(help="Of the batch, from 0; all if not given.")] = None,
    full: Annotated[bool, Parameter(negative="", help="Whole documents, not only their beginnings.")] = False,
    as_json: Json = False,
) -> None:
    """The documents of the batch that a run trains at a step, row by row. JSON has them whole."""
    from configs.load import read_config
    from configs.run import config_digest
    from tasks.evidence import batch_in_words
    from trainer import ledger
    from trainer.rundir import RunDir

    path = run_path(run)
    config = read_config(path)
    folder, manifest = _data_of(path, config)
    if not 1 <= step <= config.num_steps:
        raise ConfigError(f"step {step} is none of the run's: they are 1 to {config.num_steps} (num_steps)")
    rows = range(config.data.batch_size)
    if row is not None and row not in rows:
        raise ConfigError(f"row {row} is none of the batch's: they are 0 to {rows[-1]} (data.batch_size {config.data.batch_size})")
    place, batch = batch_in_words(config, folder, step, ledger.read(RunDir(path), config_digest(config)))
    found = batch if row is None else [batch[row]]
    if not as_json:
        print(f"step {step} of {config.num_steps}, place {place} in the data: {len(rows)} rows of {manifest.seq_len} tokens")
        for one in found:
            print(f"--- row {one['row']}, {one['padding']} of {manifest.seq_len} are padding")
            print("\n~~~\n".join(text if full else _cut(text) for text in one["documents"]))
    next_step(f"everstep data show {shown(path)} --step {min(step + 1, config.num_steps)}", f"everstep data inspect {shown(folder)}")
    answer({"run_dir": str(path), "step": step, "place": place, "data": manifest.digest, "rows": found}, as_json=as_json)


def _cut(text: str) -> str:
    return text if len(text) <= LETTERS else f"{text[:LETTERS]} ... and {len(text) - LETTERS} characters more"


def _data_of(path: Path, config: Any) -> tuple[Path, Any]:
    """The prepared data that a run was trained on, and its manifest. Raises DataError where it is gone or other data."""
    from tasks.preparation import preparation_of
    from trainer import manifest
    from trainer.data import load_manifest
    from trainer.paths import prepared_dir
    from trainer.rundir import RunDir

    digest = manifest.newest_meta(RunDir(path).checkpoints)["data_digest"]
    data: Any = config.data
    folder = Path(preparation_of(data).make().path) if data.kind == "packed" else prepared_dir(digest)
    way_out = f"`everstep eval {shown(path)}` prepares it again; or set EVERSTEP_CACHE to the cache that has it"
    if not folder.exists():
        raise DataError(f"the data of {path}, {digest[:16]}, is not in {folder.parent}; {way_out}")
    found = load_manifest(folder)
    if found.digest != digest:
        raise DataError(f"{folder} holds data {found.digest}, but {path} was trained on {digest}; delete that folder, then {way_out}")
    return folder, found
