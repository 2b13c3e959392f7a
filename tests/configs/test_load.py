"""Loading: presets, the user's own files, overrides; whatever is wrong is answered in a line, fast, with what was meant."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from configs.load import PRESETS, _quote, dump_yaml, load, preset_diff, presets, read_config, schema, to_json
from configs.run import RunConfig
from trainer.errors import ConfigError, RunDirError


def error(preset="tiny", *overrides, **kwargs) -> str:
    with pytest.raises(ConfigError) as caught:
        load(preset, overrides, **kwargs)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.fixture
def own(tmp_path):
    """Writes a preset of the user's and gives its path."""

    def write(text: str, name: str = "mine.yaml") -> str:
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        return str(file)

    return write


@pytest.mark.parametrize("name", [p.stem for p in PRESETS.glob("*.yaml")])
def test_every_preset_loads_says_what_it_is_for_and_survives_json_and_yaml(name, own):
    config = load(name)
    assert config.name == name and len(presets()[name]) > 20
    assert RunConfig.model_validate(json.loads(to_json(config))) == config
    assert load(own(dump_yaml(config))) == config
    assert preset_diff(config, name) == []


def test_tiny_is_whole_and_short_enough_to_be_changed_by_a_word():
    config = load("tiny")
    schedule = config.optimizer.schedule
    assert schedule.decay_steps == config.num_steps and isinstance(schedule.lr, float)  # YAML 1.1 reads 4e-3 as text
    assert config.chunk_steps < config.num_steps and schedule.warmup_steps < 120
    assert load("tiny", ["num_steps=60"]).num_steps == 60


@pytest.mark.parametrize("kind", ["adam", "sgd", "nadam", "radam", "adamax", "lion", "adafactor", "lamb", "muon", "schedule_free_adamw"])
def test_the_optimizer_is_changed_by_a_word_and_keeps_the_presets_schedule(kind):
    config = load("tiny", [f"optimizer.kind={kind}"])
    assert config.optimizer.kind == kind and config.optimizer.schedule == load("tiny").optimizer.schedule


TYPOS = [
    ("num_step=5", "num_steps"),
    ("num-steps=5", "num_steps"),
    ("checkpoints.every=5", "checkpoint"),
    ("model.widht=5", "model.width"),
    ("model.num_kv_head=2", "model.num_kv_heads"),
    ("objective.zloss=0", "objective.z_loss"),
    ("data.batchsize=2", "data.batch_size"),
    ("data.tokenizer.vocabsize=300", "data.tokenizer.vocab_size"),
    ("optimizer.schedule.warmup=3", "optimizer.schedule.warmup_steps"),
    ("optimizer.weight_decy=0", "optimizer.weight_decay"),
    ("trainer.gradient_accumulation_steps=2", "trainer.gradient_accumulate_steps"),
    ("trainer.logger.log_every=2", "trainer.logger.log_every_n_steps"),
    ("mesh.fdsp=2", "mesh.fsdp"),
    ("checkpoint.keep_last=2", "checkpoint.keep_latest"),
    ("publish.knd=local", "publish.kind"),
    ("execution.grace=3", "execution.grace_seconds"),
    ("lr=1e-3", "optimizer.schedule.lr"),  # right, but in the wrong place
    ("optimizer.lr=1e-3", "optimizer.schedule.lr"),
    ("batch_size=4", "data.batch_size"),
    ("data.vocab_size=4", "data.tokenizer.vocab_size"),
]


@pytest.mark.fault(35)
@pytest.mark.parametrize("override, meant", TYPOS)
def test_a_misspelt_key_at_any_depth_is_answered_with_the_right_one(override, meant):
    lines = error("tiny", override).splitlines()
    assert len(lines) == 1 and f"did you mean `{meant}`" in lines[0], lines
    assert lines[0].startswith(override.partition("=")[0].split(".")[0]) and "llama" not in lines[0] and "adamw" not in lines[0]


def test_the_signs_of_hydra_change_nothing_about_a_typo():
    assert error("tiny", "model.widht=3") == error("tiny", "+model.widht=3") == error("tiny", "++model.widht=3")
    assert load("tiny", ["+model=llama-small", "+seed=3", "++num_steps=200"]) == load(
        "tiny", ["model=llama-small", "seed=3", "num_steps=200"]
    )


def test_a_misspelt_key_in_the_users_file_is_answered_too(own):
    assert "did you mean `optimizer.schedule.warmup_steps`" in error(own("defaults: [tiny, _self_]\noptimizer: {schedule: {warm_up: 3}}\n"))


@pytest.mark.parametrize(
    "override, expected",
    [
        ("num_steps=0", "num_steps=0: expected greater than or equal to 1"),
        ("num_steps=ten", "num_steps='ten': expected a valid integer"),
        (
            "optimizer.schedule.kind=cosin",
            "optimizer.schedule.kind='cosin': expected 'constant', 'linear', 'cosine', 'exponential', 'inverse_sqrt' or 'wsd'; "
            "did you mean `cosine`?",
        ),
        ("model.kind=lama", "model.kind='lama': expected llama or an import path"),
        ("model.num_heads=3", "model: width 128 is not a multiple of num_heads 3"),
        ("mesh=3", "mesh=3: expected keys and values, of data, fsdp, pipeline"),
        ("objective=lm", "objective='lm': expected keys and values"),
        ("model=llama-smal", "model=llama-smal: there is no such option; did you mean `llama-small`?"),
        ("name=../up", "name='../up': expected text that matches"),
        ("trainer.seed=1", ""),
    ],
)
def test_a_wrong_value_is_answered_with_its_path_and_what_was_expected(override, expected):
    if not expected:  # alone it is right; with another seed it is not
        assert load("tiny", [override]).seed == 1
        assert error("tiny", override, "seed=2").startswith("seed 2 and trainer.seed 1 differ")
        return
    message = error("tiny", override)
    assert message.startswith(expected) and "pydantic" not in message and "\n" not in message


def test_all_problems_are_told_at_once_one_line_each():
    assert len(error("tiny", "num_steps=0", "model.widht=3", "mesh.data=-2").splitlines()) == 3


@pytest.mark.parametrize(
    "override",
    ["num_steps", "=3", "a b=3", "data.path=[1", "num_steps=1,2", "~nothing", "seed=${nowhere}", "", "hydra.run.dir=x", "model@a=b"],
)
def test_what_is_no_override_is_quoted_back(override):
    assert override in error("tiny", override)


def test_an_unknown_preset_is_answered_with_those_there_are(own, tmp_path):
    assert "did you mean `tiny`?" in error("tinny") and "accelerator" in error("nothing-like-it")
    assert str(tmp_path / "no.yaml") in error(str(tmp_path / "no.yaml"))
    assert "rename it to mine.yaml" in error(own("", "mine.yml"))
    message = error(own("defaults: [tinny, _self_]"))
    assert "'tinny'" in message and "did you mean `tiny`?" in message
    assert "did you mean `llama-small`?" in error(own("defaults: [tiny, override model: llama-smal, _self_]"))


@pytest.mark.parametrize("text", ["a: [1", "- 1\n- 2\n", "num_steps: 3\nnum_steps: 4\n"])
def test_a_file_that_is_no_preset_is_named(own, text):
    assert "mine" in error(own(text))


def test_a_preset_that_comes_back_to_itself_is_told_to_take_another_name(own):
    assert "another name" in error(own("defaults: [tiny, _self_]", "tiny.yaml"))


def test_a_users_file_builds_on_a_preset_and_wins(own, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    monkeypatch.chdir("/")
    for defaults in ("[tiny, _self_]", "[tiny]"):
        config = load(own(f"defaults: {defaults}\nnum_steps: 300\ndata: {{path: texts/}}\n", "my run.yaml"))
        assert (config.num_steps, config.model.width, config.name) == (300, 128, "my-run")
        assert config.data.path == str(tmp_path / "texts")


def test_paths_of_files_become_absolute_and_addresses_stay(own, tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    (tmp_path / "here").mkdir()
    file = own("defaults: [tiny, _self_]\ndata: {path: here}\n")
    assert load(file).data.path == str(tmp_path / "here")
    assert load(file, ["data.path=here"]).data.path == str(work / "here")  # an override is relative to where it is typed
    assert load(own("defaults: [tiny, _self_]\ndata: {path: there/*.txt}\n")).data.path == str(work / "there/*.txt")
    for path in ("gs://bucket/x.jsonl", "hf://datasets/a/b", "bundled:python-docs"):
        assert load("tiny", [f"data.path={path}"]).data.path == path
    assert load("tiny", ["data.path=~/x"]).data.path == str(Path("~/x").expanduser())
    tokenizer = load("tiny", ["data.tokenizer={kind: file, path: t.json}"]).data.tokenizer
    assert tokenizer.path == str(work / "t.json")


def test_a_group_option_takes_the_place_of_the_presets(own, tmp_path):
    assert load("tiny", ["model=llama-small"]).model == load("small").model
    assert load("tiny", ["model=llama-small", "model.width=64"]).model.width == 64
    own("kind: llama\nwidth: 32\n", "model/narrow.yaml")
    bare = own("num_steps: 5\n")
    for preset, search in [(own("defaults: [tiny, _self_]\n", "b.yaml"), ()), ("tiny", [tmp_path]), ("b", [tmp_path]), (bare, ())]:
        assert load(preset, ["model=narrow"], search=search).model.width == 32
    own("seq_len: 64\n", "data/short.yaml")
    config = load(bare, ["model=narrow", "data=short", "data.batch_size=4"])
    assert (config.model.width, config.data.seq_len, config.data.batch_size, config.num_steps) == (32, 64, 4, 5)
    assert load(own("defaults: [tiny, override model: narrow, _self_]\n")).model.width == 32
    assert load("tiny", ["model={width: 32}"]).model.width == 32


def test_switching_a_kind_alone_says_how_to_switch(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_models.py").write_text(
        "from trainer.models import ModelConfig\n\nclass OwnConfig(ModelConfig):\n"
        "    kind: str = 'own_models:OwnConfig'\n    depth: int = 1\n"
    )
    message = error("tiny", "model.kind=own_models:OwnConfig")
    assert "use model=OPTION" in message and "num_layers" in message and "\n" not in message
    assert "did you mean `model.depth`" in error("tiny", "~model", "model.kind=own_models:OwnConfig", "model.dpth=2")
    config = load("tiny", ["~model", "model.kind=own_models:OwnConfig", "model.depth=2"])
    assert config.model.depth == 2 and RunConfig.model_validate(json.loads(to_json(config))) == config
    (tmp_path / "config.json").write_text(to_json(config))
    assert read_config(tmp_path) == config
    with pytest.raises(ConfigError, match="own_models:OwnConfig"):
        read_config(tmp_path, trust_code=False)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\n\r$"), min_size=1))
@example("it's \\'a\\' \\")
def test_quoted_text_reaches_the_config_as_it_is(text):
    from hydra.core.override_parser.overrides_parser import OverridesParser

    assert OverridesParser.create().parse_override(f"a={_quote(text)}").value() == text


def test_a_path_with_characters_of_hydras_grammar_needs_no_quotes():
    assert load("tiny", ["data.path=/my texts (1)/x~#'.txt"]).data.path == "/my texts (1)/x~#'.txt"


def test_the_difference_to_a_preset_is_what_was_overridden():
    assert preset_diff(load("tiny", ["model.width=64", "seed=1"]), "tiny") == [
        "seed: 0 -> 1",
        "model.width: 128 -> 64",
        "trainer.seed: 0 -> 1",
    ]


def test_a_run_directorys_config_is_read_back_or_the_damage_named(tmp_path):
    with pytest.raises(RunDirError, match="not a run directory"):
        read_config(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(to_json(load("tiny")))
    assert read_config(tmp_path) == read_config(file) == load("tiny")
    text = file.read_text()
    for damaged, named in [
        (text[:-9], "cannot be read"),
        ("[]", "not a config"),
        (text.replace('"width"', '"breadth"'), r"model\.breadth"),
    ]:
        file.write_text(damaged)
        with pytest.raises(RunDirError, match=named):
            read_config(tmp_path)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(RunDirError, match="cannot be read"):
        read_config(tmp_path)


def test_the_schema_names_every_top_level_key_in_the_designs_order():
    keys = "name seed num_steps chunk_steps validate_every model objective data optimizer trainer mesh checkpoint publish execution init"
    assert list(schema()["properties"]) == keys.split()
    json.dumps(schema())


def test_a_config_error_is_answered_without_jax_prefect_or_pyarrow():
    code = """
import sys, time
start = time.perf_counter()
import configs.load
from trainer.errors import ConfigError
assert "hydra" not in sys.modules
try:
    configs.load.load("tiny", ["model.widht=3"])
except ConfigError:
    configs.load.load("tiny"), configs.load.schema()
    heavy = {"jax", "prefect", "pyarrow", "flax", "optax", "grain"} & set(sys.modules)
    sys.exit(f"{heavy}" if heavy or time.perf_counter() - start > 10 else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_presets_are_plain_yaml_without_a_name_of_their_own():
    for file in PRESETS.rglob("*.yaml"):
        assert file.read_text().startswith("# ") and "name" not in yaml.safe_load(file.read_text())
