"""The scrub as a Prefect flow, to be run on a schedule: one task for each run; it fails where something stays damaged.

`python -m flows.scrub --cron "0 3 * * *"` serves it to the Prefect server of this environment, for the runs below runs/.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.context import TagsContext

from tasks import scrub as work
from tasks.logs import show_in_run
from trainer.errors import CheckpointError

log = logging.getLogger(__name__)


@task(task_run_name="scrub[{run}]", cache_policy=NO_CACHE)
def scrub_run(run: str) -> dict[str, Any]:
    """Read a run's checkpoints and copies again, and repair one from the other; what was found."""
    return work.scrub(Path(run)).to_dict()


@flow(name="scrub", validate_parameters=True)
def scrub(root: str = "runs", runs: list[str] | None = None) -> list[dict[str, Any]]:
    """Scrub `runs`, or all below `root`. Raises CheckpointError that names what stays damaged, after all were looked at."""
    with TagsContext(current_tags=set()):  # see tasks/__init__.py for why there are no tags
        show_in_run()
        found = [scrub_run(str(run)) for run in runs or work.runs_under(Path(root))]
    for run in found:
        for row in run["steps"]:
            if row["problems"]:
                log.warning("%s step %d: %s; %s", run["run_dir"], row["step"], "; ".join(row["problems"][:3]), row["done"])
    if bad := [run["run_dir"] for run in found if not run["ok"]]:
        raise CheckpointError(
            f"something stays damaged in {', '.join(bad)}; `everstep verify --all` shows what, `everstep resume` mends a run"
        )
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cron", default="0 3 * * *")
    parser.add_argument("--root", default="runs")
    args = parser.parse_args()
    scrub.serve(name="scheduled", cron=args.cron, parameters={"root": str(Path(args.root).absolute())})
