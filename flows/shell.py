"""What the commands share: their common options, and how they say what they found."""

import json
import os
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import Parameter

from trainer.errors import RunDirError

from .console import say

Json = Annotated[bool, Parameter(name="--json", negative="", help="One JSON object on stdout; everything else goes to stderr.")]
RunPath = Annotated[str, Parameter(help="A run directory, its name under runs/, or the address of its published copies, gs://...")]


def run_path(run: str, *, weights: Literal["newest", "all", "none"] = "newest") -> Path:
    """The directory of a run, given as such or by its name. Raises RunDirError if there is none.

    Of an address, a directory below the cache into which is fetched what is published there: of its checkpoints, `weights`.
    """
    if "://" in run:
        from tasks.adopt import look_at

        return look_at(run, weights=weights)
    for path in (Path(run), Path("runs", run)):
        if (path / "config.json").exists():
            return path.absolute()
    raise RunDirError(f"there is no run at {Path(run)} or {Path('runs', run)}; `everstep train` makes one, `ls runs` shows what there is")


def next_step(*commands: str) -> None:
    """Name what one may want to do next."""
    say("next: " + "\n      ".join(commands))


def answer(result: dict[str, Any], *, as_json: bool) -> None:
    """The one JSON object, where it is asked for."""
    if as_json:
        print(json.dumps(result), flush=True)


def split_preset(words: tuple[str, ...], *, default: str = "tiny") -> tuple[str, list[str]]:
    """The preset (or file) among the words, if any, and the overrides."""
    if words and ("=" not in words[0] or words[0].endswith(".yaml")):
        return words[0], list(words[1:])
    return default, list(words)


def shown(path: Path | str) -> str:
    """A path as short as it can be typed here."""
    short = os.path.relpath(path)
    return short if not short.startswith("..") else str(path)
