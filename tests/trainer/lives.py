"""What a run left in its directory, to be compared."""

from trainer import rows
from trainer.checkpoint import verify


def digests(path):
    return {row["step"]: row["state_sha256"] for row in verify(path) if row["ok"]}


def stable_rows(path):
    return {(r["split"], r["step"]): rows.stable(rows.values_of(r)) for r in rows.read(path / "metrics.jsonl")}
