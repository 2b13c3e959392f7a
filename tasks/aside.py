"""What a run set aside: damaged checkpoints, the abandoned future of a rollback, files of rows with a line that cannot be read.

Nothing reads it any more, but somebody may want to; so it stays until it is pruned, or is more than `checkpoint.quota_gb`.
"""

import logging
from pathlib import Path

from configs.run import RunConfig
from trainer import manifest
from trainer.files import remove, size_of
from trainer.rundir import RunDir

log = logging.getLogger(__name__)

FOLDERS = ("damaged", "abandoned")
FILES = "damaged-*.jsonl"


def aside(run_dir: RunDir) -> dict[Path, int]:
    """What is set aside, the oldest first, and its bytes."""
    found = [p for folder in FOLDERS if (run_dir.path / folder).is_dir() for p in (run_dir.path / folder).iterdir()]
    found += run_dir.path.glob(FILES)
    return {p: size_of(p) for p in sorted(found, key=lambda p: (p.lstat().st_mtime, p.name))}


def keep_to_quota(config: RunConfig, run_dir: RunDir) -> list[Path]:
    """Remove the oldest of what is set aside until the rest is within the quota; what was removed.

    Where no checkpoint is whole all of it stays: it may be all there is of the run.
    """
    if config.checkpoint.quota_gb is None:
        return []
    limit, sizes = config.checkpoint.quota_gb * 1e9, aside(run_dir)
    total = sum(sizes.values())
    if total <= limit:
        return []
    if manifest.newest_whole(run_dir.checkpoints) is None:
        log.warning("%.3f GB are set aside, above checkpoint.quota_gb=%g, and stay: no checkpoint is whole", total / 1e9, limit / 1e9)
        return []
    gone: list[Path] = []
    for path, size in sizes.items():
        if total <= limit:
            break
        remove(path)
        total -= size
        gone.append(path)
    log.warning(
        "%s removed: %.3f GB were set aside, above checkpoint.quota_gb=%g; %.3f GB are left",
        ", ".join(str(p.relative_to(run_dir.path)) for p in gone),
        sum(sizes.values()) / 1e9,
        limit / 1e9,
        total / 1e9,
    )
    return gone
