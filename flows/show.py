"""What commands show of runs: status, events, the demo's end. Reads run directories, writes none, needs no server."""

import fcntl
import json
import os
import time
from pathlib import Path
from typing import Any

from configs.load import read_config
from configs.run import config_digest
from tasks.goodput import books_of, goodput
from tasks.summary import has_test
from tasks.writer import early_stop, newest_step
from trainer import rows
from trainer.errors import ConfigError, EverstepError
from trainer.rundir import RunDir

from .console import duration, say

OWN_PRESET = """\
# What this run is. `everstep config show tiny` prints every key; a.b=c on the command line changes one.
defaults:
  - tiny
  - _self_

name: {name}
num_steps: 1500  # updates; raise it for more text

data:
  path: texts/  # .txt, .md, .jsonl or .parquet files, beside this one
  val_fraction: 0.1
  test_fraction: 0.1
"""


def write_preset(folder: Path) -> Path:
    """A short preset in `folder`, and a place for texts. Raises ConfigError where a file stands already."""
    file = folder / "run.yaml"
    if file.exists():
        raise ConfigError(f"{file} is there already; edit it, or choose another folder")
    (folder / "texts").mkdir(parents=True, exist_ok=True)
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in folder.absolute().name).lstrip("._-") or "mine"
    file.write_text(OWN_PRESET.format(name=name))
    return file


def is_running(place: RunDir) -> bool:
    """Whether some process holds the run's lock."""
    try:
        fd = os.open(place.lock, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    else:
        return False
    finally:
        os.close(fd)


def facts(path: Path) -> dict[str, Any]:
    """The state of one run in JSON terms."""
    place = RunDir(path)
    config = read_config(path)
    events, metrics = place.read_events(), rows.read(place.metrics)
    published = sorted({e["step"] for e in events if e["event"] == "published"})
    running = is_running(place)
    newest = newest_step(place) if place.checkpoints.exists() else max(published, default=None)  # of an address, only looked at
    ended, spent = early_stop(config, place), books_of(place.books)
    total = ended["step"] if ended else config.num_steps
    trained = newest == total
    tested = any(r["split"] == "test" and r["step"] == total for r in metrics) or not has_test(config)
    train = [r for r in metrics if r["split"] == "train"]
    last = train[-1] if train else {}
    seconds = last.get("time_step_s")
    step = max([newest or 0, last.get("step", 0)])
    stopped: dict[str, Any] = next((e for e in reversed(events) if e["event"] in ("stopped", "ended", "failed", "finished", "started")), {})
    return {
        "run_dir": str(place.path),
        "status": "running" if running else "done" if trained and tested else "stopped",
        "config_digest": config_digest(config),
        "last_commit": newest,
        "step": step,
        "total": total,
        "early_stop": ended["reason"] if ended else None,
        "goodput": goodput(spent) if spent else None,
        "time": spent,
        "rollbacks": sum(e["event"] == "rolled_back" for e in events),
        "lives": sum(e["event"] == "started" for e in events),
        "loss": last.get("loss_mean"),
        "throughput_tokens_per_s": last.get("throughput_tokens_per_s"),
        "eta_seconds": round(seconds * (total - step)) if seconds and running else None,
        "published": published,
        "publish_lag_steps": (newest or 0) - max(published, default=0) if config.publish.kind != "none" else None,
        "why_stopped": None if running or (trained and tested) else _why(stopped, place),
    }


def _why(event: dict[str, Any], place: RunDir) -> str:
    kind = event.get("event")
    if kind == "stopped":
        return f"asked to stop at step {event.get('step')}; go on with `everstep resume`"
    if kind == "ended":
        return f"{event.get('reason')}; go on with `everstep resume`"
    if kind == "failed":
        return f"{event.get('type')}: {event.get('message')} (see {place.logs})"
    if kind == "started":
        return f"its process {event.get('pid')} is gone without a word: killed, or the machine went down; go on with `everstep resume`"
    return "it has not been started; go on with `everstep resume`"


def status(path: Path, *, watch: bool, quiet: bool) -> dict[str, Any]:
    """The state of one run, shown; with `watch` again every two seconds until it does not run any more."""
    while True:
        found = facts(path)
        if not quiet:
            show_facts(found)
        if not watch or found["status"] != "running":
            return found
        time.sleep(2)
        say()


def _mostly(found: dict[str, Any]) -> str:
    rest = sorted(((s, name) for name, s in found["time"].items() if name not in ("step", "prepare") and s >= 1), reverse=True)[:3]
    return "; " + ", ".join(f"{name} {duration(s)}" for s, name in rest) if rest else ""


def show_facts(found: dict[str, Any]) -> None:
    """The state of one run, a line for each fact."""
    speed, eta = found["throughput_tokens_per_s"], found["eta_seconds"]
    lines = {
        "run": os.path.relpath(found["run_dir"]),
        "status": found["status"],
        "step": f"{found['step']} of {found['total']}",
        "ended early": found["early_stop"],
        "last commit": found["last_commit"],
        "published": f"up to step {found['published'][-1]}" if found["published"] else None,
        "training loss": f"{found['loss']:.4f}" if found["loss"] is not None else None,
        "speed": f"{speed:,.0f} tokens/s" if speed else None,
        "ETA": duration(eta) if eta is not None else None,
        "goodput": None
        if found["goodput"] is None
        else f"{100 * found['goodput']:.1f} % of the time went to committed steps{_mostly(found)}",
        "rolled back": f"{found['rollbacks']} times, for spikes of the loss" if found["rollbacks"] else None,
        "lives": found["lives"],
        "why it stopped": found["why_stopped"],
    }
    for name, value in lines.items():
        if value is not None:
            say(f"{name:<16}{value}")


def all_runs(root: Path, *, quiet: bool) -> list[dict[str, Any]]:
    """The state of every run under `root`, newest first."""
    found = []
    for file in sorted(root.glob("*/config.json"), key=lambda p: p.stat().st_mtime, reverse=True):
        try:
            run = facts(file.parent)
        except EverstepError as e:
            say(f"{file.parent.name:<24} cannot be read: {e}")
            continue
        found.append(run)
        if not quiet:
            say(f"{file.parent.name:<24} {run['status']:<8} step {run['last_commit'] or 0}/{run['total']}")
    if not found and not quiet:
        say(f"no runs under {root.absolute()}")
    return found


def logs(path: Path, *, follow: bool, quiet: bool) -> list[dict[str, Any]]:
    """The events of a run, shown; with `follow` also those to come, until Ctrl-C or the end of the run."""
    place, shown = RunDir(path), 0
    while True:
        events = place.read_events()
        for event in events[shown:]:
            if not quiet:
                say(_event_line(event))
        shown = len(events)
        if not follow or not is_running(place):
            return events
        time.sleep(0.5)


def _event_line(event: dict[str, Any]) -> str:
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event["time"]))
    rest = ", ".join(f"{k} {v}" for k, v in event.items() if k not in ("time", "event"))
    return f"{when}  {event['event']:<20} {rest}"


def demo(result: dict[str, Any], baseline: dict[str, Any]) -> None:
    """What a first run found: bits per byte before and after, a sample, where things are."""
    place = RunDir(result["run_dir"])
    vals = {r["step"]: r for r in rows.read(place.metrics) if r["split"] == "val"}
    first, last = vals[min(vals)], vals[max(vals)]
    sample = json.loads((place.path / "sample.json").read_text())["text"]
    say()
    before, after = (f"{row['bits_per_byte']:.3f} at step {row['step']}" for row in (first, last))
    say(f"validation bits per byte   {before}  ->  {after}")
    if "val" in baseline:
        say(f"{baseline['model']:<26} {baseline['val']:.3f}")
    say(f"a sample                   {sample!r}")
    say(f"run directory              {place.path}")
    say(f"loss plot                  {place.plot}")
    say(f"report                     {place.report}")
    say()
