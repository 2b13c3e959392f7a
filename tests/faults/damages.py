"""Damages a checkpoint's files at random, one way or another each time, and asks whether the verification sees it.

`python -m tests.faults.damages [--trials 10000] [--seed 0]`

The checkpoint is one that the trainer's own code saved. It is asked `manifest.problems` after every damage, put back from bytes
in memory, and now and then found whole again, so that a damage is never seen because of the one before it.
"""

import argparse
import collections
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from trainer import manifest
from trainer.files import seal

STEP, OTHER = 20, 10  # the damaged checkpoint, and another of the same run to mix it up with
WHOLE_EVERY = 100  # trials between looks at the checkpoint as it was


class Victim:
    """A checkpoint and what it was: damages find their files here, and `restore` puts back what they changed."""

    def __init__(self, folder: Path, other: Path, rng: random.Random):
        self.folder, self.other, self.rng = folder, other, rng
        self.bytes = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        self.folders = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_dir())
        self.names = [name for name in self.bytes if name != manifest.NAME]
        self.filled = [name for name in self.names if self.bytes[name]]

    def path(self, name: str) -> Path:
        """Of a file of the checkpoint."""
        return self.folder / name

    def restore(self) -> None:
        """The checkpoint as it was, byte for byte; whatever else lies in it is removed."""
        for path in sorted(self.folder.rglob("*"), reverse=True):
            name = path.relative_to(self.folder).as_posix()
            if path.is_symlink() or not (path.is_dir() or (path.is_file() and name in self.bytes)):
                path.unlink()
            elif path.is_dir() and name not in self.folders:
                shutil.rmtree(path)
        for name in self.folders:
            self.path(name).mkdir(parents=True, exist_ok=True)
        for name, data in self.bytes.items():
            path = self.path(name)
            if not path.is_file() or path.read_bytes() != data:
                path.write_bytes(data)


def flip(v: Victim, name: str) -> None:
    """One bit."""
    data = bytearray(v.bytes[name])
    data[v.rng.randrange(len(data))] ^= 1 << v.rng.randrange(8)
    v.path(name).write_bytes(data)


def flipped_bit(v: Victim) -> None:
    """Of a data file."""
    flip(v, v.rng.choice(v.filled))


def flipped_bits(v: Victim) -> None:
    """A burst of other bytes, as a bad sector or a bad cable gives them."""
    name = v.rng.choice(v.filled)
    data = bytearray(v.bytes[name])
    at, length = v.rng.randrange(len(data)), v.rng.randint(1, 4096)
    burst = v.rng.randbytes(len(data[at : at + length]))
    if bytes(data[at : at + length]) == burst:
        burst = bytes([burst[0] ^ 1]) + burst[1:]
    data[at : at + length] = burst
    v.path(name).write_bytes(data)


def zeroed(v: Victim) -> None:
    """A page that never reached the disk; one that was zero anyway gets a bit."""
    name = v.rng.choice(v.filled)
    data = bytearray(v.bytes[name])
    at = v.rng.randrange(len(data)) // 4096 * 4096
    data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    if data == v.bytes[name]:
        data[at] = 1
    v.path(name).write_bytes(data)


def truncated(v: Victim) -> None:
    """Cut off anywhere, at the beginning too: then it is empty."""
    name = v.rng.choice(v.filled)
    os.truncate(v.path(name), v.rng.randrange(len(v.bytes[name])))


def emptied(v: Victim) -> None:
    """A file of no bytes."""
    v.path(v.rng.choice(v.filled)).write_bytes(b"")


def grown(v: Victim) -> None:
    """More bytes at the end, zeros among them."""
    with open(v.path(v.rng.choice(v.names)), "ab") as f:
        f.write(v.rng.choice([b"\0", v.rng.randbytes(v.rng.randint(1, 5000))]))


def shifted(v: Victim) -> None:
    """A byte lost and one gained: the size is what it was."""
    name = v.rng.choice(v.filled)
    data = v.bytes[name]
    at = v.rng.randrange(len(data))
    moved = data[:at] + data[at + 1 :] + bytes([data[at] ^ v.rng.randint(1, 255)])
    v.path(name).write_bytes(moved if moved != data else bytes([data[0] ^ 1]) + data[1:])


def missing(v: Victim) -> None:
    """One file, or a folder with all that is in it."""
    if v.rng.random() < 0.7:
        v.path(v.rng.choice(v.names)).unlink()
    else:
        shutil.rmtree(v.path(v.rng.choice(v.folders)))


def extra(v: Victim) -> None:
    """A file that nobody committed, in any folder, also an empty one."""
    folder = v.path(v.rng.choice(v.folders)) if v.rng.random() < 0.8 else v.folder
    (folder / f"stray-{v.rng.randrange(1000)}").write_bytes(v.rng.choice([b"", b"x", v.rng.randbytes(100)]))


def renamed(v: Victim) -> None:
    """A file under another name."""
    path = v.path(v.rng.choice(v.names))
    os.rename(path, path.with_name(path.name + v.rng.choice(["~", ".part", ".1", "_"])))


def swapped(v: Victim) -> None:
    """Two files in each other's place."""
    a, b = v.rng.sample(v.names, 2)
    while v.bytes[a] == v.bytes[b]:
        a, b = v.rng.sample(v.names, 2)
    v.path(a).write_bytes(v.bytes[b])
    v.path(b).write_bytes(v.bytes[a])


def of_the_other(v: Victim) -> None:
    """A file of another checkpoint of the run, or all of that one."""
    theirs = {p.relative_to(v.other).as_posix(): p for p in v.other.rglob("*") if p.is_file()}
    if v.rng.random() < 0.2:
        shutil.rmtree(v.folder)
        shutil.copytree(v.other, v.folder)
        return
    name = v.rng.choice([n for n in theirs if n in v.bytes and theirs[n].read_bytes() != v.bytes[n]])
    shutil.copyfile(theirs[name], v.path(name))


def a_folder_instead(v: Victim) -> None:
    """A directory of a file's name, empty or not."""
    path = v.path(v.rng.choice(v.names))
    path.unlink()
    path.mkdir()
    if v.rng.random() < 0.5:
        (path / "data").write_bytes(b"x")


def a_link_instead(v: Victim) -> None:
    """A link of a file's or a folder's name: to nothing, to equal bytes elsewhere, or to another file of the checkpoint."""
    name = v.rng.choice([*v.bytes, *v.folders])
    path, aside = v.path(name), v.folder.parent / "aside"
    if aside.is_dir():
        shutil.rmtree(aside)
    aside.unlink(missing_ok=True)
    os.rename(path, aside)
    os.symlink(v.rng.choice([aside, v.path(v.rng.choice(v.names)), Path("nowhere")]), path)


def a_pipe_instead(v: Victim) -> None:
    """What is no file at all."""
    path = v.path(v.rng.choice(v.names))
    path.unlink()
    os.mkfifo(path)


def manifest_bit(v: Victim) -> None:
    """A flipped bit of the manifest."""
    flip(v, manifest.NAME)


def manifest_cut(v: Victim) -> None:
    """The manifest truncated, emptied or gone."""
    path = v.path(manifest.NAME)
    if v.rng.random() < 0.2:
        path.unlink()
    else:
        os.truncate(path, v.rng.randrange(len(v.bytes[manifest.NAME])))


def manifest_grown(v: Victim) -> None:
    """White space is enough: it is compared byte for byte."""
    data = v.bytes[manifest.NAME]
    v.path(manifest.NAME).write_bytes(v.rng.choice([data + b"\n", b" " + data, data + data, data.replace(b":", b": ", 1)]))


def manifest_of_the_other(v: Victim) -> None:
    """That of another step, or of another step under this one's number."""
    data = (v.other / manifest.NAME).read_bytes()
    if v.rng.random() < 0.5:
        data = seal({"files": json.loads(data)["files"], "step": STEP, "version": manifest.VERSION})
    v.path(manifest.NAME).write_bytes(data)


def manifest_sealed_anew(v: Victim) -> None:
    """A manifest that is whole in itself, with an entry that is stale, gone, of nothing, or of the wrong kind."""
    record = json.loads(v.bytes[manifest.NAME])
    files, name = record["files"], v.rng.choice(v.names)
    how = v.rng.choice(["crc32c", "crc32", "size", "gone", "new", "step", "empty", "kind"])
    if how in ("crc32c", "crc32"):
        files[name][how] = f"{int(files[name][how], 16) ^ 1 << v.rng.randrange(32):08x}"
    elif how == "size":
        files[name]["size"] += v.rng.choice([-1, 1, 4096])
    elif how == "gone":
        del files[name]
    elif how == "new":
        files[f"{name}.0"] = files[name]
    elif how == "empty":
        files.clear()
    elif how == "kind":
        files[name] = v.rng.choice([{}, {"size": 1}, {"crc32c": "0"}, None, [], 3])
    step = STEP + v.rng.choice([-1, 1]) if how == "step" else STEP
    v.path(manifest.NAME).write_bytes(seal({"files": files, "step": step, "version": manifest.VERSION}))


DAMAGES: list[Callable[[Victim], None]] = [
    *[flipped_bit] * 4,
    *[flipped_bits, zeroed, truncated, emptied, grown, shifted, missing, extra, renamed, swapped, of_the_other],
    *[a_folder_instead, a_link_instead, a_pipe_instead],
    *[manifest_bit, manifest_cut, manifest_grown, manifest_of_the_other, manifest_sealed_anew],
]


def checkpoints(run_dir: Path) -> None:
    """Commit two checkpoints of a small state, as a trainer does."""
    import jax.numpy as jnp
    import numpy as np
    import optax

    from trainer import metrics
    from trainer.checkpoint import Checkpoints
    from trainer.state import TrainState

    store = Checkpoints(run_dir)
    for step in (OTHER, STEP):
        rng = np.random.default_rng(step)
        params = {"a": {"w": jnp.asarray(rng.normal(size=(48, 32)), jnp.float32)}, "b": jnp.asarray(rng.normal(size=5), jnp.bfloat16)}
        state = TrainState(jnp.asarray(step, jnp.int32), params, optax.adamw(1e-3).init(params), {})
        window = metrics.window_of(metrics.parse({"loss": {"value": jnp.float32(step / 3), "count": step + 1}}, ("mean",)))
        store.save(state, window, {"loader": {"next_index": step}})
        store.finish()
    store.close()


def campaign(run_dir: Path, *, trials: int, seed: int) -> tuple[collections.Counter[str], list[str]]:
    """Trials of each kind, and what passed unseen. Raises AssertionError where the checkpoint is not whole without a damage."""
    root, rng = run_dir / "checkpoints", random.Random(seed)
    victim = Victim(root / manifest.name_of(STEP), root / manifest.name_of(OTHER), rng)
    tried, unseen = collections.Counter[str](), []
    for trial in range(trials):
        if trial % WHOLE_EVERY == 0:
            assert not manifest.problems(victim.folder, STEP), "it is not whole before it is damaged"
        damage = rng.choice(DAMAGES)
        damage(victim)
        try:
            seen = manifest.problems(victim.folder, STEP)
        except Exception as e:
            seen = []
            unseen.append(f"trial {trial}: {damage.__name__} raised {type(e).__name__}: {e}")
        else:
            unseen += [] if seen else [f"trial {trial}: {damage.__name__}"]
        tried[damage.__name__] += 1
        victim.restore()
    assert not manifest.problems(victim.folder, STEP)
    return tried, unseen


def main() -> int:
    """Run, print a line per kind and a score; 1 where a damage passed unseen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="everstep-damages-") as name:
        checkpoints(Path(name))
        tried, unseen = campaign(Path(name), trials=args.trials, seed=args.seed)
    for kind, count in sorted(tried.items()):
        print(f"{kind:<24}{count:>7}")
    for line in unseen[:20]:
        print(f"UNSEEN: {line}")
    print(f"{args.trials} damages, {len(unseen)} passed unseen, {time.monotonic() - began:.0f} s (seed {args.seed})")
    return 1 if unseen else 0


if __name__ == "__main__":
    sys.exit(main())
