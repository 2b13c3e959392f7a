"""`everstep doctor --storage`: a place that can be used is left as it was, and each refusal has its reason and its cure."""

import os

import pytest

from flows import use
from tasks.stores.probe import Unusable, probe


def only(method):
    return lambda asked, path: "403" if asked == method else None


REFUSALS = {
    "no credentials": (lambda method, path: "401", "gs://bucket/x", "no credentials", "application-default login"),
    "no right to write": (only("POST"), "gs://bucket/x", "cannot be written to: the account may not", "roles/storage.objectAdmin"),
    "no right to list or read": (only("GET"), "gs://bucket/x", "cannot be listed: the account may not", "roles/storage.objectAdmin"),
    "no right to delete": (
        only("DELETE"),
        "gs://bucket/x",
        r"cannot be deleted from \(retention needs that\)",
        "roles/storage.objectAdmin",
    ),
    "no such bucket": (lambda method, path: None, "gs://bukcet/x", "no bucket 'bukcet'", "gs://bukcet"),
    "a name that is none": (lambda method, path: None, "gs://My Bucket", "does not name a bucket", "lower-case"),
    "down": (lambda method, path: "503", "gs://bucket/x", "503", "try again"),
    "no such folder": (lambda method, path: None, "/nowhere/at/all", "there is no /nowhere/at/all", "make it"),
    "an unknown protocol": (lambda method, path: None, "nonsense://x", "nonsense", "gs://BUCKET"),
}


@pytest.mark.parametrize("what", REFUSALS)
def test_a_refusal_says_what_failed_why_and_what_to_do(gcs, what):
    gcs.fault, address, found, cure = REFUSALS[what]
    with pytest.raises(Unusable, match=found) as refused:
        probe(address)
    assert cure in refused.value.args[1]


def test_a_place_that_can_be_used_is_left_as_it_was(gcs, tmp_path):
    gcs.buckets["bucket"]["x/mine"] = b"1"
    for address in ("gs://bucket/x", str(tmp_path), f"file://{tmp_path}", "memory://probe"):
        assert "wrote, listed, read and deleted" in probe(address)
    assert gcs.buckets["bucket"] == {"x/mine": b"1"} and not list(tmp_path.iterdir())


def test_the_doctor_shows_both(gcs, monkeypatch):
    monkeypatch.setattr(use, "CHECKS", {})
    assert use.doctor() == []
    (good,), (bad,) = use.doctor("gs://bucket"), use.doctor("gs://other")
    assert good["ok"] and not bad["ok"] and "other" in bad["found"] and bad["cure"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_rights_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(Unusable, match="may not"):
        probe(str(tmp_path))
