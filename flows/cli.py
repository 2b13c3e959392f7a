"""The command line: what each command takes, and how it ends. The work is elsewhere and imported when it is needed.

Every command takes `--json` (one object on stdout, all else on stderr) and ends by naming the next useful command. Exit
codes: 0 done, 1 failed, 2 bad usage or config, 75 stopped early and resumable.
"""

import contextlib
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import cyclopts
from cyclopts import App, Parameter

from trainer.errors import ConfigError, EverstepError, StoppedError

from . import data, upkeep
from .console import say
from .shell import Json, RunPath, answer, next_step, run_path, shown, split_preset

app = App(
    name="everstep",
    help="Declarative training of language models: one preset says what a run is; kill it anywhere, it goes on to the same bits.",
    version_flags=["--version"],
)
config_app = App(name="config", help="Show presets and what a run's config may hold.")
app.command(config_app)
app.command(data.prepare)
app.command(data.app)
app.command(upkeep.verify)
app.command(upkeep.prune)

Overrides = Annotated[tuple[str, ...], Parameter(help="Changes of the preset, such as optimizer.schedule.lr=1e-3 or model=llama-small.")]
RunDirOption = Annotated[Path | None, Parameter(name="--run-dir", help="Where the run lives; runs/NAME if not given.")]
RequireExact = Annotated[bool, Parameter(name="--require-exact", negative="", help="Refuse to go on where bits might differ.")]


@app.command
def train(
    *words: Annotated[str, Parameter(help="A preset or YAML file (default: tiny), then overrides a.b=c.")],
    run_dir: RunDirOption = None,
    require_exact: RequireExact = False,
    as_json: Json = False,
) -> None:
    """Train a run to its end. On an existing run directory it goes on where that stopped, or says that all is done."""
    from configs.load import load

    preset, overrides = split_preset(words)
    _train(load(preset, overrides), run_dir, require_exact=require_exact, as_json=as_json)


@app.command
def resume(
    run: RunPath,
    *,
    run_dir: Annotated[
        Path | None, Parameter(name="--run-dir", help="Of a run given by address: where it lives here; else runs/NAME.")
    ] = None,
    trust_code: Annotated[
        bool, Parameter(name="--trust-code", negative="", help="Of an address: import the code its config names.")
    ] = False,
    require_exact: RequireExact = False,
    as_json: Json = False,
) -> None:
    """Go on with a run from its newest commit; given by the address of its copies, on a machine that has nothing else of it."""
    from configs.load import read_config

    path = _adopted(run, run_dir, trust_code=trust_code) if "://" in run else run_path(run)
    if run_dir is not None and "://" not in run:
        raise ConfigError(f"--run-dir {run_dir} is for a run given by address; {run} is where it lives already")
    _train(read_config(path), path, require_exact=require_exact, as_json=as_json)


def _adopted(address: str, run_dir: Path | None, *, trust_code: bool) -> Path:
    from tasks.adopt import adopt

    say(f"looking at {address}")
    path = adopt(address, run_dir, trust_code=trust_code)
    say(f"the run is in {shown(path)} now, as it was published")
    return path


def _train(config: Any, run_dir: Path | None, *, require_exact: bool, as_json: bool) -> None:
    from tasks.writer import default_run_dir

    from . import launch

    def finish(result: dict[str, Any]) -> None:
        where = shown(result["run_dir"])
        bits = result["test"].get("bits_per_byte", result["val"].get("bits_per_byte"))
        say(f"done: step {result['step']}" + (f", {bits:.3f} bits per byte" if bits else "") + f", report {shown(result['report'])}")
        next_step(f"everstep generate {where} --prompt 'The function'", f"everstep status {where}", "everstep ui")
        answer(result, as_json=as_json)

    try:
        launch.train(config, run_dir, require_exact=require_exact, finish=finish)
    except StoppedError as e:
        where = (run_dir or default_run_dir(config)).absolute()
        say(f"stopped: {e}")
        next_step(f"everstep resume {shown(where)}")
        answer({"run_dir": str(where), "status": "stopped", "step": e.step}, as_json=as_json)
        leave(e.exit_code)


@app.command
def demo(*, run_dir: RunDirOption = None, as_json: Json = False) -> None:
    """Train the preset tiny on the bundled text, and show what came of it."""
    from configs.load import load

    from . import launch, show, use

    config = load("tiny", ["name=demo"])

    def finish(result: dict[str, Any]) -> None:
        where = shown(result["run_dir"])
        show.demo(result, use.baseline(config))
        next_step(
            f"everstep generate {where} --prompt 'The module'",
            "everstep ui           the run in the Prefect UI",
            "everstep init mine    a preset and a folder for text of your own",
        )
        answer(result, as_json=as_json)

    try:
        launch.train(config, run_dir, require_exact=False, finish=finish)
    except StoppedError as e:
        say(f"stopped: {e}")
        next_step("everstep demo goes on")
        leave(e.exit_code)


@app.command
def init(folder: Path, *, as_json: Json = False) -> None:
    """Write a short preset of your own, and a folder for your text, into FOLDER."""
    from . import show

    file = show.write_preset(folder)
    say(f"wrote {shown(file)}; put .txt, .md, .jsonl or .parquet files into {shown(folder / 'texts')}")
    next_step(f"everstep plan {shown(file)}", f"everstep train {shown(file)}")
    answer({"preset": str(file)}, as_json=as_json)


@app.command
def status(run: RunPath | None = None, *, watch: bool = False, as_json: Json = False) -> None:
    """How far a run is, what it is doing, and why it stopped; without RUN, of all runs under runs/."""
    from . import show

    if run is None:
        answer({"runs": show.all_runs(Path("runs"), quiet=as_json)}, as_json=as_json)
        next_step("everstep status RUN")
        return
    path = run_path(run, weights="none")
    found = show.status(path, watch=watch, quiet=as_json)
    where = run if "://" in run else shown(path)
    next_step(f"everstep resume {where}" if found["status"] != "done" else f"everstep generate {where} --prompt 'The function'")
    answer(found, as_json=as_json)


@app.command
def logs(run: RunPath, *, follow: Annotated[bool, Parameter(name=["--follow", "-f"], negative="")] = False, as_json: Json = False) -> None:
    """The events of a run, and where its processes log."""
    from . import show

    path = run_path(run)
    events = show.logs(path, follow=follow, quiet=as_json)
    next_step(f"everstep status {shown(path)}")
    answer({"events": events, "logs": str(path / "logs")}, as_json=as_json)


@app.command(name="eval")
def evaluate(
    run: RunPath,
    *,
    step: Annotated[int | None, Parameter(help="A committed step; the best if not given.")] = None,
    split: str = "val",
    as_json: Json = False,
) -> None:
    """Evaluate the weights of a run on one split of its data. Writes nothing."""
    from . import use

    path = run_path(run)
    found = use.evaluate(path, step=step, split=split)
    if not as_json:
        say(f"step {found['step']} on {split}: " + ", ".join(f"{k} {v:.4f}" for k, v in found["values"].items() if isinstance(v, float)))
    next_step(f"everstep generate {shown(path)} --prompt 'The function'")
    answer(found, as_json=as_json)


@app.command
def generate(
    run: RunPath,
    *,
    prompt: str,
    step: Annotated[int | None, Parameter(help="A committed step; the best if not given.")] = None,
    max_tokens: int = 200,
    temperature: Annotated[float, Parameter(help="0 takes the likeliest token each time.")] = 0.8,
    top_k: int | None = 50,
    seed: int = 0,
    device: Annotated[str | None, Parameter(help="cpu leaves an accelerator alone that is training.")] = None,
    as_json: Json = False,
) -> None:
    """Continue a text with the weights of a run."""
    from . import use

    path = run_path(run)
    found = use.generate(
        path,
        prompt,
        step=step,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        seed=seed,
        device=device,
        on_text=None if as_json else lambda text: print(text, end="", flush=True),
    )
    if not as_json:
        print(flush=True)
    next_step(f"everstep generate {shown(path)} --prompt '...' --seed {seed + 1}")
    answer(found, as_json=as_json)


@app.command
def plan(*words: str, run_dir: RunDirOption = None, memory: bool = False, as_json: Json = False) -> None:
    """What `train` would do with the same words, and what that takes: parameters, memory, tokens, disk. Trains nothing.

    Parameters
    ----------
    memory
        Also what a step takes of a device, which compiles it here: a minute for a large model, that its run is spared.
    """
    from configs.load import load

    from . import use

    preset, overrides = split_preset(words)
    found = use.plan(load(preset, overrides), run_dir, memory=memory)
    if not as_json:
        width = max(map(len, found))
        for key, value in found.items():
            say(f"{key.replace('_', ' '):<{width}}  {value:,}" if isinstance(value, int) else f"{key.replace('_', ' '):<{width}}  {value}")
    next_step(f"everstep train {' '.join(words)}".rstrip() + (f" --run-dir {run_dir}" if run_dir else ""))
    answer(found, as_json=as_json)


@config_app.command(name="show")
def config_show(*words: str, as_json: Json = False) -> None:
    """A preset with overrides, resolved, as YAML; without words, the presets."""
    from configs.load import dump_yaml, load, presets

    if not words:
        found = presets()
        for name, text in found.items():
            if not as_json:
                print(f"{name:<14}{text}")
        next_step("everstep config show tiny", "everstep init mine")
        answer({"presets": found}, as_json=as_json)
        return
    preset, overrides = split_preset(words)
    config = load(preset, overrides)
    if not as_json:
        print(dump_yaml(config), end="")
    next_step(f"everstep plan {' '.join(words)}")
    answer(config.to_dict(), as_json=as_json)


@config_app.command(name="schema")
def config_schema(*, as_json: Json = False) -> None:
    """The JSON schema of a config: every key, its type, its default."""
    from configs.load import schema

    print(json.dumps(schema(), indent=None if as_json else 2))
    next_step("everstep config show tiny")


@config_app.command(name="diff")
def config_diff(*words: str, as_json: Json = False) -> None:
    """What overrides, or a file, change of a preset: `config diff tiny a.b=c`; of a run: `config diff RUN tiny`."""
    from configs.load import load, preset_diff, read_config

    if not words:
        raise ConfigError("config diff needs a preset and overrides, or a run and a preset")
    if len(words) == 2 and "=" not in words[1]:
        lines = preset_diff(read_config(run_path(words[0])), words[1])
    else:
        lines = preset_diff(load(words[0], words[1:]), words[0])
    for line in lines if not as_json else ():
        print(line)
    next_step(f"everstep config show {words[-1] if '=' not in words[-1] else words[0]}")
    answer({"differences": lines}, as_json=as_json)


@app.command
def doctor(
    *,
    storage: Annotated[
        str | None, Parameter(help="A place for copies, gs://BUCKET/PREFIX or a folder: a file is written, read, deleted.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Look at what this machine offers a run, and say what is wrong and how to mend it."""
    from . import use

    found = use.doctor(storage)
    for check in () if as_json else found:
        say(
            f"{'ok ' if check['ok'] else 'BAD'}  {check['what']:<12} {check['found']}"
            + ("" if check["ok"] else f"\n     -> {check['cure']}")
        )
    next_step("everstep demo" if all(c["ok"] for c in found) else "mend what is BAD above, then everstep doctor")
    answer({"checks": found}, as_json=as_json)
    if not all(check["ok"] for check in found):
        raise SystemExit(1)


@app.command
def ui(*, port: int = 4200, as_json: Json = False) -> None:
    """Start the stock Prefect UI on this user's database, where every run shows up. Ends with Ctrl-C."""
    from . import use

    def ready(url: str) -> None:
        say(f"Prefect UI: {url}/runs   (Ctrl-C ends it)")
        answer({"url": url}, as_json=as_json)

    use.ui(port, on_ready=ready)
    next_step("everstep status")


def check_packages() -> None:
    """See that the packages imported are ours. Raises ConfigError that names what stands in front of them."""
    import importlib.util

    ours = Path(__file__).resolve().parent.parent
    for name in ("trainer", "configs", "tasks"):
        spec = importlib.util.find_spec(name)
        found = Path(spec.origin).resolve() if spec and spec.origin else None
        if found is None or found.parent.parent != ours:
            raise ConfigError(f"the package {name!r} comes from {found}, not from {ours}; rename what stands there, or leave that folder")


def main() -> None:
    """Run one command; every way out has its exit code."""
    as_json = "--json" in sys.argv
    try:
        check_packages()
        app(exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as e:
        _fail(str(e) or type(e).__name__, 2, as_json=as_json, hint="everstep --help")
    except EverstepError as e:
        _fail(str(e), e.exit_code, as_json=as_json, kind=type(e).__name__)
    except BrokenPipeError:
        os._exit(1)
    except KeyboardInterrupt:
        os._exit(75)


def leave(code: int) -> NoReturn:
    """End the process now; threads of libraries that still wait for something are not waited for."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(code)


def _fail(message: str, code: int, *, as_json: bool, kind: str = "UsageError", hint: str | None = None) -> None:
    say(f"error: {message}")
    if hint:
        next_step(hint)
    if as_json:
        print(json.dumps({"status": "stopped" if code == 75 else "failed", "error": {"type": kind, "message": message}}), flush=True)
    leave(code)
