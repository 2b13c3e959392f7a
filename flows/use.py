"""Commands that compute: prepare, plan, evaluate, generate, doctor, ui. Each beside a live run, without disturbing it."""

import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from configs.load import read_config
from configs.run import RunConfig, chunk_ends
from trainer import manifest
from trainer.errors import CheckpointError, ConfigError, RunDirError
from trainer.rundir import RunDir

from .console import say


def prepare(config: RunConfig, *, quiet: bool = True) -> Any:
    """The prepared data of a run, made where it is not there yet."""
    from tasks.preparation import prepare as make

    data: Any = config.data
    return make(data, on_progress=None if quiet else say)


def baseline(config: RunConfig) -> dict[str, Any]:
    """Bits per byte of a simple model of the same text, to compare with."""
    from trainer.data import load_manifest

    return load_manifest(prepare(config).path).baseline


def loaded(path: Path, step: int | None) -> tuple[RunConfig, Any, Any, Any, int]:
    """(config, trainer, params, mutable, step) of a committed step of a run: the best, where none is named."""
    from tasks.session import training_config
    from tasks.summary import best_of
    from trainer.assemble import TrainingConfig, assemble
    from trainer.backend import set_up_jax
    from trainer.restore import state_to_evaluate

    place, config = RunDir(path), read_config(path)
    steps = manifest.steps_in(place.checkpoints)
    if not steps:
        raise CheckpointError(f"{path} has no checkpoint yet; train it first: everstep resume {path}")
    best = best_of(config, place)
    step = step if step is not None else best if best in steps else steps[-1]
    if step not in steps:
        raise ConfigError(f"step {step} has no checkpoint; choose one of {', '.join(map(str, steps))}")
    set_up_jax(numerics=config.execution.numerics)
    trainer = assemble(TrainingConfig.model_validate(training_config(config)))
    params, mutable = trainer.weights(state_to_evaluate(trainer, place.path, step))
    return config, trainer, params, mutable, step


def evaluate(path: Path, *, step: int | None, split: str) -> dict[str, Any]:
    """Values of a split with the weights of a committed step."""
    from trainer.data import eval_batches, load_manifest
    from trainer.run import add_bits_per_byte

    config, trainer, params, mutable, step = loaded(path, step)
    ref = prepare(config)
    data = load_manifest(ref.path)
    batches = eval_batches(ref.path, data, split, batch_size=config.data.eval_batch_size or config.data.batch_size)
    values = trainer.run_evaluation((params, mutable), batches)
    return {"run_dir": str(path), "step": step, "split": split, "values": add_bits_per_byte(values, data, split)}


def generate(
    path: Path,
    prompt: str,
    *,
    step: int | None,
    max_tokens: int,
    temperature: float,
    top_k: int | None,
    seed: int,
    device: str | None,
    on_text: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Continue `prompt`; `on_text` gets the text as it grows."""
    if device:
        os.environ["JAX_PLATFORMS"] = device
        import jax

        try:
            jax.devices()
        except RuntimeError as e:
            raise ConfigError(f"device {device!r} cannot be used: {e}; try --device cpu") from e
    from trainer.data import load_tokenizer
    from trainer.generate import generate as continue_text

    if not temperature >= 0:
        raise ConfigError(f"temperature {temperature} is not 0 or more; 0 takes the likeliest token each time")
    if max_tokens < 0 or (top_k is not None and top_k < 1):
        raise ConfigError(f"max-tokens {max_tokens} and top-k {top_k} must be at least 0 and 1; leave them out for their defaults")
    config, trainer, params, _, step = loaded(path, step)
    tokenizer = load_tokenizer(prepare(config).path)
    tokens = tokenizer.encode(prompt).tolist()
    text = tokenizer.decode(tokens)
    if on_text:
        on_text(text)
    began = time.monotonic()
    stream = continue_text(
        trainer.model.apply,
        params,
        tokens,
        eos_id=tokenizer.eos_id,
        window=config.data.seq_len,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=min(top_k, tokenizer.vocab_size) if top_k else None,
        seed=seed,
    )
    for token in stream:
        tokens.append(token)
        longer = tokenizer.decode(tokens)
        if on_text and longer.startswith(text) and not longer.endswith("\ufffd"):  # a character may take several tokens
            on_text(longer[len(text) :])
            text = longer
    return {
        "run_dir": str(path),
        "step": step,
        "prompt": prompt,
        "text": tokenizer.decode(tokens),
        "seconds": round(time.monotonic() - began, 3),
    }


def plan(config: RunConfig, run_dir: Path | None, *, memory: bool = False) -> dict[str, Any]:
    """What `train` would do: what is done, what is left, and what it takes. `memory` asks the compiler, which compiles the step."""
    from tasks.writer import default_run_dir, is_trained, settle_config

    place = RunDir(run_dir or default_run_dir(config))
    if place.config.exists():
        settle_config(place, config, dry=True)
    newest = manifest.newest_whole(place.checkpoints)
    from tasks.session import training_config
    from trainer.assemble import TrainingConfig, assemble
    from trainer.backend import set_up_jax
    from trainer.memory import step_memory

    set_up_jax(numerics=config.execution.numerics)
    trainer = assemble(TrainingConfig.model_validate(training_config(config)))
    sizes, used = _bytes(trainer.shapes), step_memory(trainer) if memory else None
    start = newest.step if newest else 0
    tokens = config.data.batch_size * config.data.seq_len
    left = [e for e in chunk_ends(config) if e > start]
    return {
        "run_directory": str(place.path),
        "does": "nothing: all is trained" if is_trained(config, place) else f"goes on from step {start}" if newest else "starts anew",
        "steps": f"{start} -> {config.num_steps} in {len(left)} chunks of at most {config.chunk_steps}",
        "parameters": trainer.get_num_params(),
        "devices": len(trainer.mesh.devices.ravel()),
        "state_bytes_per_device": sizes[1],
        **({"step_bytes_per_device": used["peak"]} if used else {}),
        "tokens_per_step": tokens,
        "tokens_left": tokens * (config.num_steps - start),
        "disk_bytes": sizes[0] * (config.checkpoint.keep_latest + 1) * (2 if config.publish.kind == "local" else 1),
        "disk_free_bytes": shutil.disk_usage(_existing(place.path)).free,
    }


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _bytes(shapes: Any) -> tuple[int, int]:
    """Bytes of a state, as a whole and on one device."""
    import math

    import jax

    whole = own = 0
    for x in jax.tree.leaves(shapes):
        whole += x.size * x.dtype.itemsize
        own += math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
    return whole, own


def doctor(storage: str | None = None) -> list[dict[str, Any]]:
    """Checks, each with what was found and, where that is bad, the cure; `storage` is a place for copies to be tried."""
    checks = {**CHECKS, **({"storage": lambda: _storage(storage)} if storage else {})}
    return [_check(name, look) for name, look in checks.items()]


def _check(what: str, look: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"what": what, "ok": True, "found": look(), "cure": None}
    except Bad as e:
        return {"what": what, "ok": False, "found": e.args[0], "cure": e.args[1]}
    except Exception as e:
        return {
            "what": what,
            "ok": False,
            "found": f"{type(e).__name__}: {e}",
            "cure": "make clean, then make demo, brings a fresh environment",
        }


class Bad(Exception):
    """A finding and its cure."""


def _python() -> str:
    return f"{sys.version.split()[0]} at {sys.executable}"


def _devices() -> str:
    import glob

    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu" and glob.glob("/dev/nvidia[0-9]*"):
        raise Bad("an NVIDIA card is present, but JAX sees only the CPU", "install the accelerator's packages: make demo ACCEL=cuda13")
    return f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform}), {len(os.sched_getaffinity(0))} cores"


def _cache() -> str:
    from trainer.paths import cache_dir

    folder = cache_dir()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_bytes(b"x")
        probe.unlink()
    except OSError as e:
        raise Bad(f"{folder} cannot be written: {e.strerror}", "set EVERSTEP_CACHE to a folder that can") from e
    free = shutil.disk_usage(folder).free
    if free < 1 << 30:
        raise Bad(f"{folder}: {free / 1e9:.1f} GB free", "free some space, or set EVERSTEP_CACHE to another disk")
    return f"{folder}, {free / 1e9:.0f} GB free"


def _runs() -> str:
    place = _existing(Path("runs").absolute())
    if not os.access(place, os.W_OK):
        raise Bad(f"{place} cannot be written", "change to a folder of your own, or pass --run-dir")
    return f"{place} can be written"


def _server() -> str:
    from tasks.server import configured_api_url, server

    if url := configured_api_url():
        import urllib.request

        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return f"yours at {url} answers"
        except OSError as e:
            raise Bad(f"yours at {url} does not answer: {e}", "start it, or unset PREFECT_API_URL to have one per command") from e
    began = time.monotonic()
    with server() as url:
        return f"one of its own came up in {time.monotonic() - began:.1f} s"


def _storage(address: str) -> str:
    from tasks.stores.probe import Unusable, probe

    try:
        return probe(address)
    except Unusable as e:
        raise Bad(*e.args) from e


CHECKS: dict[str, Callable[[], str]] = {"python": _python, "devices": _devices, "cache": _cache, "runs": _runs, "prefect": _server}


def ui(port: int, *, on_ready: Callable[[str], object]) -> None:
    """Serve the Prefect UI in this process's own server until a signal."""
    import signal
    import threading

    from tasks.server import OwnedServer, configured_api_url

    if url := configured_api_url():
        raise RunDirError(f"PREFECT_API_URL is set, so the UI is already at {url.removesuffix('/api')}; open it there")
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: done.set())
    with OwnedServer(port=port) as owned:
        owned.wait_ready()
        on_ready(owned.ui_url)
        done.wait()
