"""How often a trainer may die: what counts is lives without a new commit, never lives.

The answer is a function of the run's events, so it is the same in whichever process it is asked for. A death at a step is
one of the batch or of the machine: three at the same step of the same cause, and it will be so for ever. Deaths elsewhere are
given ten tries. Whoever starts a run by hand starts at zero, and so does a commit.
"""

from collections.abc import Sequence
from typing import Any

SAME = 3  # deaths in a row at one step, of one cause
ELSEWHERE = 10  # deaths in other phases than the training's


def deaths_since_commit(events: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The `killed` events after the last commit and the last start by hand, oldest first."""
    found = []
    for event in reversed(events):
        if event["event"] == "committed" or (event["event"] == "started" and event.get("attempt", 1) == 1):
            break
        if event["event"] == "killed":
            found.append(event)
    return found[::-1]


def verdict(events: Sequence[dict[str, Any]]) -> str | None:
    """Why another trainer would not help after the last death; None: it may."""
    deaths = deaths_since_commit(events)
    if not deaths:
        return None
    row, last = deaths[-SAME:], deaths[-1]
    # The first step of a life is compiled and done in one go: where it was the step that killed before, it is now, too.
    at_a_step = all(d.get("phase") in ("step", "compile") for d in row) and any(d.get("phase") == "step" for d in row)
    if at_a_step and len(row) == SAME and len({(d.get("step"), d.get("cause")) for d in row}) == 1:
        return f"the trainer died {SAME} times in a row at step {last['step'] + 1} ({last.get('cause')}), always before a commit"
    elsewhere = [d for d in deaths if d.get("phase") != "step"]
    if last.get("phase") != "step" and len(elsewhere) >= ELSEWHERE:
        phases = ", ".join(sorted({str(d.get("phase")) for d in elsewhere}))
        return f"the trainer died {len(elsewhere)} times (phases: {phases}) without a new commit"
    return None
