"""A training run as a Prefect flow, from a config to a report. This page is the whole order of events."""

import logging
from typing import Any, cast

from prefect import flow
from prefect.context import TagsContext
from prefect.task_runners import ThreadPoolTaskRunner

from configs.run import RunConfig, chunk_ends, has_onlookers, validates
from tasks.data import prepare_data
from tasks.evaluate import test, validate
from tasks.logs import show_in_run
from tasks.refs import CheckpointRef, value_of
from tasks.report import show_tables, write_report
from tasks.summary import best_commit, has_test, result_of
from tasks.train import conclude, init_model, train_chunk
from tasks.uploads import Uploads
from tasks.writer import Writer, is_trained, writing

log = logging.getLogger(__name__)


@flow(
    name="pretrain",
    flow_run_name="{config.name}",
    # For publishing alone, one after the other: chunks are trained in the main thread, where signals arrive.
    task_runner=cast(Any, ThreadPoolTaskRunner(max_workers=1)),
    validate_parameters=True,
)
def pretrain(config: RunConfig, run_dir: str | None = None, require_exact: bool = False) -> dict[str, Any]:
    """Prepare data, initialise a model, train it in chunks, validate and publish each, test the best, write a report.

    Called again on a run directory it goes on from the newest commit, and does again only what was not finished.
    Returns what `everstep train --json` prints.
    """
    # Tasks would take over the flow run's tags; see tasks/__init__.py for why they must not.
    with (
        writing(config, run_dir, require_exact=require_exact) as writer,
        writer.stops.held(),
        TagsContext(current_tags=set()),
        Uploads(config, writer) as uploads,
    ):
        writer.entered = True
        show_in_run()
        if not is_trained(config, writer.run_dir):
            machine = writer.session.start()  # what does not fit this machine is refused before anything is done
            log.info("trains on %s", in_words(machine))
        with writer.keeper.within("prepare"):
            data = value_of(prepare_data(config))
        ref = value_of(init_model(config, data))
        uploads.begin(data, ref)
        if ref.step == 0:
            validate(config, ref)  # where learning began
        end = next_end(config, ref.step)  # what ends before was done in an earlier life
        while end is not None:
            writer.stops.check()
            if end > ref.step:
                ref = value_of(train_chunk(config, ref, end))
            if ref.step == end and validates(config, end):
                validate(config, ref)
            if ref.step == end or ref.stop:  # nothing keeps for its copy what a rollback went back to
                uploads.submit(ref)
            uploads.look()
            report_progress(writer, ref)
            if ref.stop:
                log.info("training ended at step %d: %s", ref.step, ref.stop)
                break
            end = next_end(config, ref.step + 1)  # an earlier one again where a spike was rolled back
        writer.stops.check()
        best = best_commit(config, writer.run_dir, ref)
        if has_test(config):
            test(config, best, ref.step)
        if has_onlookers(config):
            conclude(config)
        late = uploads.finish()
        write_report(config, data, best)
        if late:
            raise late
        result = result_of(config, writer.run_dir)
        writer.finish(result)
        writer.artifacts.close()
        return result


def next_end(config: RunConfig, step: int) -> int | None:
    """The first end of a chunk that is not before `step`."""
    return next((end for end in chunk_ends(config) if end >= step), None)


def in_words(machine: dict[str, Any]) -> str:
    """What of the machine is used; see trainer.run.describe_devices."""
    mesh = " x ".join(f"{axis} {n}" for axis, n in machine["mesh"].items())
    return "{devices} x {kind} ({platform}), mesh {mesh}, {parameters:,} parameters, {dtype}, attention {attention}".format(
        **{**machine, "mesh": mesh}
    )


def report_progress(writer: Writer, ref: CheckpointRef) -> None:
    """Bring the artifacts in the UI up to date; does not wait for them."""
    config = writer.config
    done = 100 * ref.step / config.num_steps
    writer.note_time(ref.step)
    writer.artifacts.progress("progress", done, description=f"{config.name}: step {ref.step} of {config.num_steps}")
    show_tables(config, writer.run_dir, writer.artifacts)
