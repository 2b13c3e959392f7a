"""Where files that outlive a run are kept: prepared data, compiled programs."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`$EVERSTEP_CACHE`, or `~/.cache/everstep`. May not exist yet."""
    return Path(os.environ.get("EVERSTEP_CACHE") or "~/.cache/everstep").expanduser().absolute()
