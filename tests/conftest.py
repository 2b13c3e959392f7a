"""One Prefect server and one compilation cache for all tests of a session, and a run small enough to be trained in seconds."""

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("everstep", deadline=None)  # the machine is shared, and the first example compiles
settings.load_profile("everstep")

ROOT = Path(__file__).resolve().parent.parent
SERVER = "EVERSTEP_TEST_API_URL"

# Compiled programs are kept between sessions; what a test writes into the user's own cache would be a fault.
os.environ["EVERSTEP_CACHE"] = str(ROOT / ".pytest_cache" / "everstep")
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.environ["EVERSTEP_CACHE"] + "/xla"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ.setdefault("DO_NOT_TRACK", "1")
for name in ("PREFECT_API_URL", "PREFECT_PROFILE"):
    os.environ.pop(name, None)


def pytest_configure(config):
    """Start the server beside the first tests: in the process that starts the workers, which dies last."""
    if hasattr(config, "workerinput") or config.option.collectonly:
        return
    import tempfile

    from tasks.server import OwnedServer

    home = tempfile.TemporaryDirectory(prefix="everstep-prefect-")
    os.environ["PREFECT_HOME"] = home.name
    server = OwnedServer(Path(home.name) / "server.log", hung_after=60)
    server.start()
    os.environ[SERVER] = server.api_url
    config.add_cleanup(home.cleanup)
    config.add_cleanup(server.close)


@pytest.fixture(scope="session")
def api_url():
    """The session's Prefect server, answering, as this process's API."""
    import time
    import urllib.request

    url, deadline = os.environ[SERVER], time.monotonic() + 180
    while True:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=2).close()
            break
        except OSError:
            assert time.monotonic() < deadline, f"no server at {url}"
            time.sleep(0.2)
    from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

    with temporary_settings({PREFECT_API_URL: url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}):
        yield url


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder of counting language: enough documents for three splits, easy to learn."""
    folder = tmp_path_factory.mktemp("texts")
    for i in range(120):
        (folder / f"{i:03}.txt").write_text(" ".join(str((i * 7 + k) % 50) for k in range(40 + i)))
    return folder


@pytest.fixture
def micro(texts):
    """`micro(*overrides)`: the config of a run of 6 steps in chunks of 2, trained inline."""
    from configs.load import load

    def make(*overrides):
        base = [
            "num_steps=6",
            "chunk_steps=2",
            "model.vocab_size=257",
            "model.width=16",
            "model.num_layers=1",
            "model.num_heads=2",
            "model.num_kv_heads=1",
            f"data.path={texts}",
            "data.tokenizer.kind=byte",
            "data.tokenizer.vocab_size=null",
            "data.seq_len=32",
            "data.batch_size=4",
            "data.val_fraction=0.1",
            "data.test_fraction=0.1",
            "optimizer.schedule.warmup_steps=2",
            "trainer.logger.log_every_n_steps=3",
            "execution.mode=inline",
        ]
        return load("tiny", [*base, *overrides])

    return make


@pytest.fixture(autouse=True)
def signals_as_before():
    """A test that changes a signal's handler puts it back, or is named here."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(n) for n in numbers]
    yield
    assert [signal.getsignal(n) for n in numbers] == before


@pytest.fixture(scope="session")
def fake_gcs():
    """A server that speaks Google's JSON API, for this process and its children."""
    from tests.faults.gcs import FakeGcs

    server = FakeGcs("bucket")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STORAGE_EMULATOR_HOST", server.url)
        patch.setenv("FSSPEC_GCS_TOKEN", "anon")
        yield server
    server.close()


@pytest.fixture
def gcs(fake_gcs, monkeypatch):
    """The server with an empty bucket `bucket` and no faults; gcsfs makes no pause before it tries again."""
    import asyncio
    from types import SimpleNamespace

    async def at_once(seconds):
        await asyncio.sleep(0.001)

    monkeypatch.setattr("gcsfs.retry.asyncio", SimpleNamespace(sleep=at_once))
    fake_gcs.reset()
    yield fake_gcs
    fake_gcs.reset()
