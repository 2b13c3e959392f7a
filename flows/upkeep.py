"""The commands that look after what a run left on disks: are its files whole, and what of them does nothing keep."""

import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from trainer.errors import ConfigError

from .console import say
from .shell import Json, RunPath, answer, next_step, run_path, shown


def verify(
    run: RunPath | None = None,
    *,
    every: Annotated[
        bool, Parameter(name="--all", negative="", help="Its published copies too, and repair; without RUN, of all runs under runs/.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check every file of every checkpoint against its manifest, and give the digests of what they hold. Changes nothing.

    With --all, checkpoints and their published copies are read again, and one is repaired from the other.
    """
    if every:
        _scrub(run, as_json=as_json)
        return
    if run is None:
        raise ConfigError("verify needs a run, or --all for the checkpoints and copies of all runs under runs/")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # a card may be busy training
    from trainer.checkpoint import verify as check

    path = run_path(run, weights="all")
    found = check(path)
    for row in found:
        state = f"params {row['params_sha256'][:16]}  state {row['state_sha256'][:16]}" if row["ok"] else "; ".join(row["problems"])
        if not as_json:
            say(f"step {row['step']:>8}  {'ok     ' if row['ok'] else 'DAMAGED'}  {state}")
    good = bool(found) and all(row["ok"] for row in found)
    next_step(
        *([f"everstep status {shown(path)}"] if good else []),
        *([] if good else [f"everstep verify {shown(path)} --all   repairs what has a whole copy"] if found and "://" not in run else []),
        *([] if good else [f"everstep resume {shown(path)}   sets damaged ones aside and trains them again"]),
    )
    answer({"checkpoints": found}, as_json=as_json)
    if not good:
        raise SystemExit(1)


def _scrub(run: str | None, *, as_json: bool) -> None:
    from tasks.scrub import runs_under, scrub

    if run is not None and "://" in run:
        raise ConfigError(f"verify --all repairs a run directory, and {run} is an address; everstep verify {run} reads what is there")
    found = []
    for path in [run_path(run)] if run is not None else runs_under(Path("runs")):
        seen = scrub(path)
        found.append(seen.to_dict())
        if not as_json:
            _show(found[-1])
    bad = [shown(one["run_dir"]) for one in found if not one["ok"]]
    if not found:
        say("there are no runs under runs/")
    cures = [f"everstep resume {where}   sets damaged ones aside and trains them again" for where in bad]
    next_step(*(cures or ["everstep status"]))
    answer({"ok": not bad, "runs": found}, as_json=as_json)
    if bad:
        raise SystemExit(1)


def _show(found: dict[str, Any]) -> None:
    say(shown(found["run_dir"]))
    for row in found["steps"]:
        wrong = "; ".join(row["problems"][:3])
        words = [f"here {row['local']}", f"copy {row['copy']}"]
        say(f"  step {row['step']:>8}  {'ok ' if row['ok'] else 'BAD'}  {', '.join(words)}" + (f"  ({wrong})" if wrong else ""))
        if row["done"]:
            say(f"                      -> {row['done']}")
    for note in found["notes"]:
        say(f"  {note}")


def prune(
    run: RunPath,
    *,
    dry_run: Annotated[bool, Parameter(name="--dry-run", negative="", help="Show what would be removed; remove nothing.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what nothing keeps: checkpoints and copies by retention, what is set aside or rolled back, leftovers of what was cut off.

    Never the newest whole checkpoint, the best, or what is not published yet.
    """
    from tasks.prune import prune as remove

    if "://" in run:
        raise ConfigError(f"prune works on a run directory, and {run} is an address; a run prunes its copies itself")
    path = run_path(run)
    items, notes = remove(path, dry=dry_run)
    for item in () if as_json else items:
        size = "?" if item.bytes is None else f"{item.bytes / 1e6:,.2f}"
        say(f"{size:>12} MB  {item.what:<22} {item.path if '://' in item.path else shown(item.path)}")
    for note in notes:
        say(note)
    total = sum(item.bytes or 0 for item in items)
    say(f"{'would free' if dry_run else 'freed'} {total / 1e6:,.2f} MB" if items else "there is nothing that nothing keeps")
    next_step(f"everstep prune {shown(path)}" if dry_run and items else f"everstep status {shown(path)}")
    answer({"run_dir": str(path), "dry_run": dry_run, "bytes": total, "removed": [item.to_dict() for item in items]}, as_json=as_json)
