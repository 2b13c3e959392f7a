"""A flow whose training meets spikes: it goes back and ends as if it had been told of them."""

import pytest

from tests.trainer.lives import digests, stable_rows
from tests.trainer.test_ledger import LONG, SOON, poison
from trainer import manifest

pytestmark = pytest.mark.usefixtures("api_url")


def run(config, path):
    from flows.pretrain import pretrain
    from tasks.preparation import prepare

    poison(config, prepare(config.data).path)
    return pretrain(config, str(path))


def test_a_flow_goes_back_over_ends_of_chunks_and_ends_as_one_that_was_told(micro, tmp_path):
    from flows.show import facts

    settings = (*LONG, *SOON, "chunk_steps=2", "trainer.spike.steps_before=2", "checkpoint.keep_latest=3")
    rolled, told = tmp_path / "rolled", tmp_path / "told"
    results = [
        run(micro("name=rolled", *settings), rolled),
        run(micro("name=told", *settings, "data.leave_out=[[1,7]]"), told),
    ]
    assert facts(rolled)["rollbacks"] == 2 and facts(told)["rollbacks"] == 0
    assert digests(rolled) == digests(told)
    assert stable_rows(rolled) == stable_rows(told) and {("val", 4), ("val", 8)} < stable_rows(rolled).keys()
    assert results[0]["test"]["loss"] == results[1]["test"]["loss"]
    for step in manifest.steps_in(rolled / "published" / "checkpoints"):
        here, copy = (manifest.own_crc(root / "checkpoints" / manifest.name_of(step)) for root in (rolled, rolled / "published"))
        assert here == copy, "no copy is of a commit that was rolled back"
