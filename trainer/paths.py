"""Where files that outlive a run are kept: prepared data, compiled programs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$EVERSTEP_CACHE`, or `~/.cache/everstep`. May not exist yet."""
    return Path(os.environ.get("EVERSTEP_CACHE") or "~/.cache/everstep").expanduser().absolute()


def prepared_dir(digest: str, *, cache: Path | None = None) -> Path:
    """Where prepared data of this digest is kept in a cache, by default the user's. May not exist."""
    return (cache or cache_dir()) / "data" / digest[:16]
