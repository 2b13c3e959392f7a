"""The Prefect server a command owns, as real processes: killed, stopped, orphaned, started twice at once, killed in its first migration."""

import contextlib
import http.client
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tasks.server import OwnedServer, configured_api_url, server

QUICK = {"poll_interval": 0.2, "answer_timeout": 0.5, "hung_after": 2.0}


def eventually(what: Callable[[], object], *, timeout: float) -> bool:
    deadline = time.monotonic() + timeout
    while not what():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def get(owned: OwnedServer, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(owned.host, owned.port, timeout=1)
    with contextlib.closing(connection):
        connection.request("GET", path, headers={"Accept": "text/html"})
        response = connection.getresponse()
        return response.status, response.read().decode()


def healthy(owned: OwnedServer) -> bool:
    try:
        return get(owned, "/api/health") == (200, "true")
    except (OSError, http.client.HTTPException):
        return False


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def schema(database: Path) -> tuple[str, set[tuple]]:
    """Revision and the names of all tables and indexes of a database that SQLite finds sound."""
    with contextlib.closing(sqlite3.connect(database)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        (revision,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return revision, set(connection.execute("SELECT type, name FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'"))


@pytest.fixture(scope="module")
def owned(tmp_path_factory) -> Iterator[OwnedServer]:
    """One of two servers that were started at once in a fresh PREFECT_HOME."""
    home = tmp_path_factory.mktemp("prefect")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        for name in ("PREFECT_API_URL", "PREFECT_PROFILE", "PREFECT_PROFILES_PATH", "PREFECT_API_DATABASE_CONNECTION_URL"):
            patch.delenv(name, raising=False)
        with OwnedServer(**QUICK) as one:
            with OwnedServer(**QUICK) as two:
                one.wait_ready()
                two.wait_ready()
                assert one.port != two.port and healthy(one) and healthy(two)
            yield one


@pytest.fixture(scope="module")
def home(owned: OwnedServer) -> Path:
    """A PREFECT_HOME with a whole database."""
    return owned.log_path.parent


def test_two_servers_that_start_at_once_in_a_fresh_home_share_one_whole_database(home: Path):
    assert [p.name for p in home.glob("prefect.db.new-*")] == []
    assert schema(home / "prefect.db")[0]
    assert "Traceback" not in (home / "everstep-server.log").read_text()  # neither had to be started again


def test_the_server_answers_and_its_ui_finds_the_api_on_its_own_port(owned: OwnedServer):
    assert get(owned, "/api/health") == (200, "true")
    status, _ = get(owned, "/")
    assert status in (200, 307)
    status, page = get(owned, "/v2/")
    assert status == 200 and "<html" in page
    assert json.loads(get(owned, "/ui-settings")[1])["api_url"] == owned.api_url


def test_a_signal_meant_for_the_whole_group_leaves_the_server_alone(owned: OwnedServer):
    before = owned.pid
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(owned.pid, number)
    time.sleep(0.5)
    assert owned.pid == before and healthy(owned)


def test_a_killed_server_answers_again_on_the_same_port(owned: OwnedServer):
    before, port = owned.pid, owned.port
    os.kill(before, signal.SIGKILL)
    assert eventually(lambda: owned.pid != before and healthy(owned), timeout=30)
    assert owned.port == port


def test_a_stopped_server_is_replaced_on_the_same_port(owned: OwnedServer):
    before, port = owned.pid, owned.port
    os.kill(before, signal.SIGSTOP)
    assert eventually(lambda: owned.pid != before and healthy(owned), timeout=30)
    assert owned.port == port and not alive(before)


def test_close_ends_the_server_even_a_stopped_one_within_its_limit(home: Path):
    owned = OwnedServer(**QUICK, stop_timeout=1.0)
    owned.start()
    pid = owned.pid
    os.kill(pid, signal.SIGSTOP)
    began = time.monotonic()
    owned.close()
    assert time.monotonic() - began < 3 and not alive(pid)
    owned.close()  # twice is once


def test_the_server_dies_with_its_killed_parent(home: Path):
    code = (
        "import sys, time; from tasks.server import OwnedServer; o = OwnedServer(); o.start(); o.wait_ready();"
        "print(o.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    pid = int(parent.stdout.readline())
    assert alive(pid)
    parent.kill()
    parent.communicate()  # also shows that the server does not hold the parent's stdout open
    assert eventually(lambda: not alive(pid), timeout=5)


def test_kills_and_stops_amid_the_first_migration_leave_no_half_database(home: Path, tmp_path: Path, monkeypatch):
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    with OwnedServer(**QUICK) as owned:
        for grown, number in ((1, signal.SIGKILL), (100_000, signal.SIGSTOP)):  # bytes: as it begins, and some migrations later
            victim = owned.pid
            new = tmp_path / f"prefect.db.new-{victim}"
            assert eventually(lambda new=new, grown=grown: written(new) >= grown, timeout=60)
            os.kill(victim, number)
            assert not (tmp_path / "prefect.db").exists()
            assert eventually(lambda victim=victim: owned.pid != victim, timeout=10)
        assert eventually((tmp_path / "prefect.db").exists, timeout=60)
    assert schema(tmp_path / "prefect.db") == schema(home / "prefect.db")
    assert [p.name for p in tmp_path.glob("prefect.db.new-*")] == []


def written(database: Path) -> int:
    return sum(p.stat().st_size for p in (database, database.with_name(database.name + "-wal")) if p.exists())


def test_a_flow_reports_every_state_before_its_server_ends(home: Path, tmp_path: Path):
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys\n"
        "from tasks.server import server\n"
        "assert 'prefect' not in sys.modules\n"
        "with server() as url:\n"
        "    assert os.environ['PREFECT_API_URL'] == url\n"
        "    from prefect import flow, task\n"
        "    @task\n"
        "    def unit(i): return i\n"
        "    @flow(name='whole')\n"
        "    def run(): return [unit(i) for i in range(3)]\n"
        "    run()\n"
        "assert 'PREFECT_API_URL' not in os.environ\n"
    )
    subprocess.run([sys.executable, str(script)], check=True, timeout=120, cwd=tmp_path, capture_output=True)
    with contextlib.closing(sqlite3.connect(home / "prefect.db")) as connection:
        ((flow_run, state),) = connection.execute(
            "SELECT r.id, r.state_type FROM flow_run r JOIN flow f ON f.id = r.flow_id WHERE f.name = 'whole'"
        ).fetchall()
        assert state == "COMPLETED"
        states = connection.execute("SELECT state_type FROM task_run WHERE flow_run_id = ?", (flow_run,)).fetchall()
    assert states == [("COMPLETED",)] * 3


def test_a_configured_server_is_used_and_none_is_started(home: Path, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path))
    assert configured_api_url() is None
    (tmp_path / "profiles.toml").write_text('active = "mine"\n[profiles.mine]\nPREFECT_API_URL = "http://profile/api"\n')
    assert configured_api_url() == "http://profile/api"
    (tmp_path / "pyproject.toml").write_text('[tool.prefect.api]\nurl = "http://pyproject/api"\n')
    assert configured_api_url() == "http://pyproject/api"
    asked = [sys.executable, "-c", "from prefect.settings import get_current_settings as s; print(s().api.url)"]
    assert subprocess.check_output(asked, text=True).strip() == configured_api_url()  # Prefect's own order of precedence
    monkeypatch.setenv("PREFECT_API_URL", "http://environment/api")
    with server() as url:
        assert url == "http://environment/api"


def test_importing_the_module_imports_no_prefect():
    code = "import sys, tasks.server; assert not [m for m in sys.modules if m.split('.')[0] in ('prefect', 'uvicorn')]"
    subprocess.run([sys.executable, "-c", code], check=True)
