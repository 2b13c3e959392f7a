"""The ledger: which batches a run left out because their loss was a spike, and what was rolled back for it.

A rollback becomes real with one line of the event log. Before it nothing has happened, and a life that trains up to the spike again
finds it again; after it every life leaves the batches out and moves away what was committed beyond them. A commit says for itself
which batches it was trained without, so what belongs to an abandoned future is known wherever it turns up.
"""

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import manifest
from .data import place_of
from .errors import DivergedError, EverstepError, RolledBackError
from .rundir import RunDir

if TYPE_CHECKING:
    from .assemble import TrainingConfig
    from .checkpoint import Checkpoints

log = logging.getLogger(__name__)

EVENT = "rolled_back"
Range = tuple[int, int]  # places [a, b) in the order of training batches


def read(run_dir: RunDir, config_digest: str) -> list[Range]:
    """The places that rollbacks of this run left out, in ascending order; what a run of another config rolled back is none of them."""
    told = [e["places"] for e in run_dir.read_events() if e["event"] == EVENT and e.get("config_digest") == config_digest]
    kept = [places for step in manifest.steps_in(run_dir.checkpoints) for places in _own(meta_of(run_dir.checkpoints, step))]
    return sorted({(a, b) for a, b in [*told, *kept]})


def joined(*ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Ranges of any kind as ranges in ascending order and apart."""
    out: list[Range] = []
    for a, b in sorted((a, b) for some in ranges for a, b in some):
        if out and a <= out[-1][1]:
            out[-1] = (out[-1][0], max(b, out[-1][1]))
        else:
            out.append((a, b))
    return tuple(out)


def meta_of(root: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says of itself; nothing where that cannot be read."""
    try:
        return json.loads((root / manifest.name_of(step) / "meta" / "metadata").read_text())
    except (OSError, ValueError):
        return {}


def _own(meta: Mapping[str, Any]) -> list[Range]:
    return [(a, b) for a, b in meta.get(EVENT, [])]


def abandoned_steps(root: Path, ledger: Iterable[Range]) -> list[int]:
    """The committed steps that were trained with a batch of the ledger, ascending."""

    def is_abandoned(meta: Mapping[str, Any]) -> bool:
        place = meta.get("loader", {}).get("train", {}).get("next_index", 0)
        return any(a < place and (a, b) not in _own(meta) for a, b in ledger)

    return [step for step in manifest.steps_in(root) if is_abandoned(meta_of(root, step))]


def abandoned_copies(run_dir: RunDir) -> dict[int, set[str]]:
    """What must not be found in a store: by step the crc32c of the manifests of commits that were rolled back."""
    out: dict[int, set[str]] = {}
    for event in run_dir.read_events():
        for step, crc in event.get("abandoned", {}).items() if event["event"] == EVENT else ():
            out.setdefault(int(step), set()).add(crc)
    return out


def roll_back(
    store: "Checkpoints", run_dir: RunDir, error: DivergedError, *, config: "TrainingConfig", ledger: list[Range]
) -> EverstepError:
    """Note that the batches of a spike are left out, and move away what was committed since the first of them; what to raise then.

    `ledger` is what was rolled back before. No commit may be under way.
    """
    spike, leave_out = config.trainer.spike, joined(config.data.leave_out, ledger)
    if len(ledger) >= spike.max_rollbacks:
        found = f"{error}; the run was rolled back {len(ledger)} times for such steps, which is trainer.spike.max_rollbacks"
        return DivergedError(found, step=error.step)
    first = max(1, error.step - spike.steps_before)
    places = (place_of(first, leave_out), place_of(error.step, leave_out) + 1)
    gone = [step for step in store.steps() if step >= first]
    target = max((step for step in store.steps() if step < first), default=None)
    if target is None:
        found = (
            f"{error}; no commit from before step {first} is left to go back to: train with data.leave_out={[list(places)]} from the start"
        )
        return DivergedError(found, step=error.step)
    crcs = {str(step): manifest.own_crc(store.root / manifest.name_of(step)) for step in gone}
    digest = config.config_digest
    run_dir.event(EVENT, step=error.step, to=target, places=places, abandoned=crcs, reason=str(error), config_digest=digest)
    store.abandon(gone)
    log.warning("%s; going on from step %d without the batches at places %d to %d", error, target, places[0], places[1] - 1)
    return RolledBackError(f"rolled back from step {error.step} to {target}: {error}", step=target)
