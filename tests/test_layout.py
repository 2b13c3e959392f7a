"""The house: imports point one way, reading a config or asking for help is quick, and what is shipped is ours alone."""

import ast
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["trainer", "configs", "tasks", "flows"]  # each may import itself and what stands before it


def sources(room):
    return sorted((ROOT / room).rglob("*.py"))


def imports(path):
    """(absolute module names, names of modules imported with leading dots and how many) of a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, 0) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or "", node.level


@pytest.mark.parametrize("room", ORDER)
def test_a_room_imports_only_itself_and_what_stands_before_it(room):
    later = set(ORDER[ORDER.index(room) + 1 :]) | {"tests"}
    foreign = {"trainer": {"prefect", "hydra", "omegaconf", "cyclopts"}, "configs": {"prefect", "jax"}}.get(room, set())
    for path in sources(room):
        heads = {name.split(".")[0] for name, level in imports(path) if not level}
        assert not heads & later, f"{path} imports {heads & later}"
        assert not heads & foreign, f"{path} imports {heads & foreign}"
        assert room not in heads or path.name == "__main__.py", f"{path} imports its own room by its full name; use a leading dot"


def test_only_the_models_know_how_models_are_written():
    for path in sources("trainer"):
        if path.parent.name != "models":
            assert not [n for n, _ in imports(path) if n.startswith("flax")], path


@pytest.mark.parametrize("room", ORDER)
def test_every_module_says_what_it_is_and_is_one_thing(room):
    for path in sources(room):
        text = path.read_text()
        assert ast.get_docstring(ast.parse(text)), f"{path} has no docstring"
        assert len(text.splitlines()) <= 420, f"{path} is long: is it one thing?"


def loaded(code, *names):
    """Which of `names` a fresh interpreter has imported after `code`."""
    tail = f"\nimport sys\nprint([n for n in {names!r} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code + tail], capture_output=True, text=True, check=False)
    return run.stdout.strip().splitlines()[-1:], run.stderr


HELP = """
import sys
from flows.cli import app
try:
    app(["--help"])
except SystemExit:
    pass
"""
MISTAKE = """
from flows.cli import app
from trainer.errors import ConfigError
try:
    app(["train", "tiny", "modle.width=3"], exit_on_error=False)
except ConfigError as e:
    assert "did you mean `model`" in str(e)
"""


@pytest.mark.parametrize("code", [HELP, MISTAKE], ids=["help", "a config error"])
def test_help_and_a_config_error_need_neither_jax_nor_prefect(code):
    assert loaded(code, "jax", "prefect", "pyarrow", "flax") == (["[]"], "")


def test_the_flow_starts_no_jax_backend():
    code = "import flows.pretrain, sys\nb = sys.modules.get('jax._src.xla_bridge')\nassert not (b and b._backends)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_wheel_holds_the_four_rooms_with_their_presets_and_no_tests(tmp_path):
    code = f"from hatchling.build import build_wheel; print(build_wheel({str(tmp_path)!r}))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    names = zipfile.ZipFile(tmp_path / run.stdout.split()[-1]).namelist()
    assert {n.split("/")[0] for n in names if ".dist-info" not in n} == set(ORDER)
    assert {"configs/presets/tiny.yaml", "tasks/corpus/python-docs.jsonl.xz", "tasks/corpus/NOTICE"} <= set(names)


def test_no_committed_file_names_a_registry_or_a_path_of_a_machine():
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    assert "uv.lock" not in files
    for name in ("requirements.lock", "Makefile", "pyproject.toml"):
        text = (ROOT / name).read_text()
        assert "://" not in text.replace("http://127.0.0.1", ""), name


def test_every_known_fault_of_another_implementation_has_a_test_that_says_what_holds_here():
    import re

    marks = {int(n) for path in (ROOT / "tests").rglob("test_*.py") for n in re.findall(r"mark\.fault\((\d+)\)", path.read_text())}
    assert marks == set(range(1, 39))
