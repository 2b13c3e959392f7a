"""What an objective adds to host values."""

import math

import pytest

from trainer.objectives import LMObjectiveConfig

POST = LMObjectiveConfig().build().postprocess


def test_perplexity_stands_beside_each_loss_with_its_prefix_and_postfix():
    values = {
        "loss": 1.0,
        "loss_mean": 2.0,
        "loss_single": 3.0,
        "loss_max": 4.0,
        "loss_min": 0.5,
        "books_loss": 0.0,
        "a_z_set_loss": 1.5,
        "jazz_loss": 2.5,
    }
    found = POST({**values, "accuracy": 0.5})
    assert found.keys() == {*values, "accuracy", *(k.replace("loss", "perplexity") for k in values)}
    for key, loss in values.items():
        assert found[key] == loss and found[key.replace("loss", "perplexity")] == pytest.approx(math.e**loss)


def test_what_is_no_loss_has_no_perplexity():
    values = {"z_loss": 1.0, "z_loss_mean": 1.0, "books_z_loss": 1.0, "loss_std": 1.0, "loss_sum": 1.0, "lossy": 1.0, "closs": 1.0}
    assert POST(values) == values


def test_a_loss_beyond_all_bounds_has_an_infinite_perplexity_and_one_of_nothing_none():
    assert POST({"loss": 800.0})["perplexity"] == math.inf and POST({"loss": math.inf})["perplexity"] == math.inf
    assert math.isnan(POST({"loss": math.nan})["perplexity"])
    assert POST({"loss": -math.inf})["perplexity"] == 0.0
