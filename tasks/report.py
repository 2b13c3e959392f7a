"""What a run found, for people: report.md, loss.png, and the same as artifacts in the Prefect UI."""

import base64
import io
import json
import math
from typing import Any

from prefect import task

from configs.load import dump_yaml
from configs.run import RunConfig
from trainer import rows
from trainer.data import DataManifest, load_manifest
from trainer.files import write_atomic
from trainer.rundir import RunDir

from .artifacts import Artifacts
from .goodput import as_table, goodput
from .refs import CheckpointRef, DataRef
from .retry import WITH_TRAINER
from .summary import checkpoints, report_mark, result_of, validations
from .writer import current, early_stop


def curve(metrics: list[dict[str, Any]], *, title: str, reference: float | None = None) -> bytes:
    """A PNG of the training and validation loss by step; `reference` is drawn as a line, in nats per token."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for split, key, style in (
        ("train", "loss_mean", {"color": "#9db4c8", "lw": 1.2}),
        ("val", "loss", {"color": "#c2410c", "marker": "o"}),
    ):
        points = [(r["step"], r[key]) for r in metrics if r["split"] == split and r.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label="training" if split == "train" else "validation", **style)
    if reference is not None:
        axes.axhline(reference, color="#555", ls="--", lw=1, label="byte 5-gram model")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.set_title(title, loc="left")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()


@task(task_run_name="report[{config.name}]", **WITH_TRAINER)
def write_report(config: RunConfig, data: DataRef, best: CheckpointRef) -> str:
    """Write report.md and loss.png, and show them in the UI. Returns the report's path."""
    writer = current()
    run_dir = writer.run_dir
    text, picture = compose(config, run_dir, load_manifest(data.path), sample_of(config, best), writer.keeper.seconds())
    write_atomic(run_dir.plot, picture)
    write_atomic(run_dir.report, text.encode())
    show(config, run_dir, writer.artifacts, text=text, picture=picture)
    return str(run_dir.report)


PROMPT = "The function returns"


def sample_of(config: RunConfig, best: CheckpointRef) -> str:
    """A generated text of the run, kept with the report: written once for the best step."""
    writer = current()
    kept = writer.run_dir.sample
    try:
        found = json.loads(kept.read_text())
        if found["step"] == best.step:
            return found["text"]
    except (OSError, ValueError, KeyError, TypeError):
        pass
    text = writer.session.sample(best.step, PROMPT)
    write_atomic(kept, json.dumps({"step": best.step, "text": text}).encode())
    return text


def compose(config: RunConfig, run_dir: RunDir, data: DataManifest, sample: str, spent: dict[str, float]) -> tuple[str, bytes]:
    """The report as markdown, with the curve as loss.png beside it, and that curve; `spent` are seconds by what they went to."""
    found = result_of(config, run_dir)
    table = validations(run_dir)
    first, last = (table[0], table[-1]) if table else ({}, {})
    val = data.splits["val"]
    reference = data.baseline.get("val")
    # The reference is known in bits per byte; the curve is in nats per token of the same text.
    nats = reference * math.log(2) * val.bytes / val.tokens if reference else None
    picture = curve(rows.read(run_dir.metrics), title=f"{config.name}: loss by step", reference=nats)
    lines = [f"# {config.name}", ""]
    if ended := early_stop(config, run_dir):
        lines += [f"Training ended at step {ended['step']} of {config.num_steps}: {ended['reason']}.", ""]
    if "bits_per_byte" in last:
        lines += ["| bits per byte | |", "|---|---|"]
        lines += [f"| validation at step {first['step']} | {first['bits_per_byte']:.3f} |"]
        lines += [f"| validation at step {last['step']} | **{last['bits_per_byte']:.3f}** |"]
        if "bits_per_byte" in found["test"]:
            lines += [f"| test, weights of step {found['best_step']} (the best) | **{found['test']['bits_per_byte']:.3f}** |"]
        if reference:
            lines += [f"| {data.baseline['model']} of the training text, on validation | {reference:.3f} |"]
        lines += [""]
    lines += ["![loss](loss.png)", "", "## Validations", ""]
    lines += _markdown_table(table)
    lines += ["", "## A sample", "", "```text", sample.strip(), "```", "", "## Data", ""]
    lines += _markdown_table(
        [{"split": name, "documents": s.documents, "bytes": s.bytes, "tokens": s.tokens, "rows": s.rows} for name, s in data.splits.items()]
    )
    lines += [
        "",
        f"Prepared as `{data.digest[:16]}`.",
        "",
        "## Config",
        "",
        "```yaml",
        dump_yaml(config).rstrip(),
        "```",
        "",
        "## Time",
        "",
        f"What the wall time went to; {_percent(goodput(spent))} of it, preparation aside, to steps that were committed.",
        "",
        *_markdown_table(as_table(spent)),
        "",
        report_mark(config),
    ]
    return "\n".join(lines), picture


def _markdown_table(table: list[dict[str, Any]]) -> list[str]:
    if not table:
        return ["none"]
    keys = list(dict.fromkeys(k for row in table for k in row))
    body = ["| " + " | ".join(str(row.get(k, "")) for k in keys) + " |" for row in table]
    return ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys), *body]


def show(config: RunConfig, run_dir: RunDir, artifacts: Artifacts, *, text: str, picture: bytes) -> None:
    """The report and the tables in the UI; the picture stands in the markdown itself, for the UI shows no files."""
    inline = text.replace("(loss.png)", f"(data:image/png;base64,{base64.b64encode(picture).decode()})")
    artifacts.markdown(artifact_key(config, "report"), inline, description=f"Report of {config.name} in `{run_dir.path}`")
    show_tables(config, run_dir, artifacts)


def _percent(share: float | None) -> str:
    return "nothing" if share is None else f"{100 * share:.1f} %"


def show_tables(config: RunConfig, run_dir: RunDir, artifacts: Artifacts) -> None:
    """The tables of validations, checkpoints and time in the UI."""
    published, spent = current().copies.known, current().keeper.seconds()
    artifacts.table(artifact_key(config, "time"), as_table(spent), description=f"Goodput of {config.name}: {_percent(goodput(spent))}")
    artifacts.table(artifact_key(config, "validations"), validations(run_dir), description=f"Validations of {config.name}")
    artifacts.table(
        artifact_key(config, "checkpoints"), checkpoints(config, run_dir, published), description=f"Checkpoints of {config.name}"
    )


def artifact_key(config: RunConfig, what: str) -> str:
    """A key as Prefect wants it: lower-case letters, digits and dashes."""
    name = "".join(c if c.isalnum() else "-" for c in config.name.lower())
    return f"{name}-{what}"
