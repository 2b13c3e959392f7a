"""report.md of a preparation: what was read, what was left out and why, how long documents are, and what they look like."""

from collections.abc import Iterable, Mapping
from itertools import islice

from configs.prepare import TextDataConfig
from trainer.data.packed import DataManifest

NAME = "report.md"
SAMPLES = 3  # documents of each split
SAMPLE_LETTERS = 400
MOST_SOURCES = 50


def compose(config: TextDataConfig, manifest: DataManifest, bad: list[str], texts: Mapping[str, Iterable[str]]) -> str:
    """The report as markdown. Says nothing of when and how fast, so equal data has equal reports."""
    lines = [f"# Data of {config.path}", "", f"`{manifest.digest}`", "", "| split | documents | bytes | tokens | rows | utilisation |"]
    lines += ["|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {s.documents:,} | {s.bytes:,} | {s.tokens:,} | {s.rows:,} | {s.utilisation:.4f} |"
        for name, s in manifest.splits.items()
    ]
    total = manifest.splits["train"]
    packing = f"rows of {manifest.seq_len} tokens, packed by {config.packing}"
    lines += ["", f"{manifest.vocab_size:,} tokens in the vocabulary, {total.bytes / total.tokens:.2f} bytes a token; {packing}."]
    counted = ", ".join(f"{v:.3f} on {k}" for k, v in manifest.baseline.items() if k != "model")
    lines += ["", f"An {manifest.baseline['model']} reaches {counted} (bits per byte).", "", "## Left out", ""]
    lines += [f"- {manifest.duplicates.documents:,} documents equal to an earlier one"]
    lines += [f"- {manifest.duplicates.paragraphs:,} paragraphs that are held out in a smaller split"]
    lines += [f"- {count:,} rows: {reason}" for reason, count in manifest.left_out.items()]
    if bad:
        lines += ["", "Rows that are no text, the first of them:", "", "```text", *(_one_line(line) for line in bad), "```"]
    lines += ["", "## Lengths", "", "| tokens | " + " | ".join(manifest.histogram) + " |", "|---" * (len(manifest.histogram) + 1) + "|"]
    for i in range(max(map(len, manifest.histogram.values()))):
        counts = [own[i] if i < len(own) else 0 for own in manifest.histogram.values()]
        if any(counts):
            lines.append(f"| {2**i:,} to {2 ** (i + 1) - 1:,} | " + " | ".join(f"{count:,}" for count in counts) + " |")
    lines += ["", "## Samples", ""]
    for name, some in texts.items():
        for text in islice(some, SAMPLES):
            shown = text[:SAMPLE_LETTERS] + ("..." if len(text) > SAMPLE_LETTERS else "")
            lines += [f"{name}:", "", *("    " + line for line in shown.splitlines()), ""]  # indented: a text may hold a fence
    lines += ["## Sources", "", "| file | bytes | documents | what they say |", "|---|---|---|---|"]
    lines += [f"| {_one_line(s.path)} | {s.bytes:,} | {s.documents:,} | `{s.sha256[:16]}` |" for s in manifest.sources[:MOST_SOURCES]]
    if len(manifest.sources) > MOST_SOURCES:
        lines += ["", f"and {len(manifest.sources) - MOST_SOURCES:,} more, in manifest.json."]
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    return "\n".join([*lines, "", f"Made with {versions}.", ""])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300]
