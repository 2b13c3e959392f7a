"""From a preset and overrides to a RunConfig, and from a RunConfig to text and back.

The only file that knows Hydra, and of Hydra only its compose API: it puts YAML together, and what may stand in it is
Pydantic's to say. A key that is no group is therefore always "added or changed", so that a typo reaches Pydantic too.
"""

import difflib
import glob
import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from trainer.errors import ConfigError, RunDirError

from .explain import Problem, members, problems
from .run import RunConfig, differences

PRESETS = Path(__file__).parent / "presets"
CONFIG_FILE = "config.json"
# Of files and folders, relative to the working directory or the preset.
PATH_KEYS = (("data", "path"), ("data", "tokenizer", "path"), ("publish", "url"))

Override = re.compile(r"(?P<sign>\+\+|\+|~|)(?P<key>[A-Za-z_][\w.\-]*)(=(?P<value>.*))?", re.DOTALL)


class _Source(NamedTuple):
    folder: Path  # where the preset lies
    name: str  # its name in there
    own: bool  # whether it is a file of the user's


def load(preset: str, overrides: Sequence[str] = (), *, search: Sequence[Path] = ()) -> RunConfig:
    """The run that `preset` describes, changed by `overrides` such as `model=llama-small` or `optimizer.schedule.lr=1e-3`.

    A preset is the name of a bundled one or of one in the folders `search`, or the path of a YAML file, whose folder is
    searched for groups too. Raises ConfigError with one line for each thing that is wrong.
    """
    folders = [Path(folder).absolute() for folder in search]
    source = _find(preset, [*folders, PRESETS])
    folders = list(dict.fromkeys([source.folder, *folders, PRESETS]))
    data = _compose(source, overrides, folders=folders)
    data.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", source.name).lstrip("._-") or "run")
    _make_paths_absolute(data, source, overrides)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as e:
        raise ConfigError("\n".join(_lines(problems(e, RunConfig, data), overrides, _groups(folders)))) from e


def presets() -> dict[str, str]:
    """The bundled presets by name, with what each is for."""
    return {p.stem: p.read_text().partition("\n")[0].lstrip("# ") for p in sorted(PRESETS.glob("*.yaml"))}


def preset_diff(config: RunConfig, preset: str, *, search: Sequence[Path] = ()) -> list[str]:
    """What `config` changes of `preset`, as lines "path: in the preset -> in the config"."""
    base = load(preset, search=search)
    return [f"{path}: {json.dumps(a)} -> {json.dumps(b)}" for path, a, b in differences(base, config)]


def schema() -> dict[str, Any]:
    """The JSON schema of a RunConfig."""
    return RunConfig.model_json_schema()


def dump_yaml(config: RunConfig) -> str:
    """`config` as a preset that needs no other."""
    return yaml.safe_dump(config.to_dict(), sort_keys=False, allow_unicode=True)


def to_json(config: RunConfig) -> str:
    """`config` as the text of config.json: the same text for equal configs."""
    return json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"


def read_config(path: Path, *, trust_code: bool = True) -> RunConfig:
    """The config of the run directory `path` (or of a config.json); see parse_config.

    Raises RunDirError where there is no config or it is damaged.
    """
    file = path / CONFIG_FILE if path.is_dir() else path
    try:
        return parse_config(file.read_text(encoding="utf-8"), str(file), trust_code=trust_code)
    except FileNotFoundError as e:
        raise RunDirError(f"{path} is not a run directory: there is no {file.name} in it") from e
    except (OSError, ValueError) as e:  # ValueError: not UTF-8
        raise RunDirError(f"{file} cannot be read: {e}; take it from a published copy of the run") from e


def parse_config(text: str, source: str, *, trust_code: bool = True) -> RunConfig:
    """The config that a config.json says, which was found at `source`.

    Without `trust_code` a `kind` that is an import path is refused instead of imported, by a ConfigError. Raises RunDirError
    for what is no config.
    """
    data: Any = None
    try:
        data = json.loads(text)
        return RunConfig.from_dict(RunConfig, data, strict_classname_parsing=not trust_code)
    except ValidationError as e:
        lines = "; ".join(map(str, problems(e, RunConfig, data)))
        raise RunDirError(f"{source} is not a config of this version of everstep: {lines}") from e
    except ValueError as e:  # no JSON
        raise RunDirError(f"{source} cannot be read: {e}; take it from a published copy of the run") from e


def _find(preset: str, folders: Sequence[Path]) -> _Source:
    if "/" in preset or preset.endswith((".yaml", ".yml")):
        path = Path(preset).expanduser().absolute()
        if path.suffix == ".yml":
            raise ConfigError(f"preset {preset!r} ends in .yml; rename it to {path.with_suffix('.yaml').name}")
        path = path if path.suffix == ".yaml" else path.with_name(path.name + ".yaml")
        if not path.is_file():
            raise ConfigError(f"there is no preset file {preset!r} (looked at {path}); {_choice(preset, _names(folders))}")
        return _Source(path.parent, path.stem, own=True)
    for folder in folders:
        if (folder / f"{preset}.yaml").is_file():
            return _Source(folder, preset, own=folder != PRESETS)
    here = f"; for the file write ./{preset}.yaml" if Path(f"{preset}.yaml").is_file() else ""
    raise ConfigError(f"there is no preset {preset!r}; {_choice(preset, _names(folders))}{here}")


def _names(folders: Iterable[Path]) -> list[str]:
    return sorted({p.stem for folder in folders for p in folder.glob("*.yaml")})


def _groups(folders: Iterable[Path]) -> dict[str, list[str]]:
    """The options of each group: a folder with YAML files that is named like a key of the config."""
    found: dict[str, set[str]] = {}
    for folder in folders:
        for file in folder.glob("*/*.yaml"):
            if file.parent.name in RunConfig.model_fields:
                found.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(options) for group, options in sorted(found.items())}


def _choice(word: str, options: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, options, n=1)
    return (f"did you mean `{close[0]}`? " if close else "") + f"there are {', '.join(options) or 'none'}"


def _compose(source: _Source, overrides: Sequence[str], *, folders: Sequence[Path]) -> dict[str, Any]:
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    groups = _groups(folders)
    rest = ",".join(_quote(f"file://{folder}") for folder in folders if folder != source.folder)
    lines = [f"hydra.searchpath=[{rest}]", *(_translate(o, groups) for o in overrides)]
    try:
        with initialize_config_dir(config_dir=str(source.folder), version_base="1.3"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # without _self_ the file's own keys win, which is what is wanted
            composed = None
            while composed is None:
                try:
                    composed = compose(source.name, overrides=lines)
                except HydraException as e:
                    group = re.match(r"Could not override '(\w+)'", str(e))
                    added = [f"+{line}" if group and line.startswith(f"{group[1]}=") else line for line in lines]
                    if added == lines:
                        raise
                    lines = added  # a group that the defaults do not name is added to them, not overridden
        data = OmegaConf.to_container(composed, resolve=True)
    except MissingConfigException as e:
        missing = str(e.missing_cfg_file or source.name)
        raise ConfigError(
            f"defaults of preset {source.name!r}: there is no {missing!r}; {_choice(missing, e.options or _names(folders))}"
        ) from e
    except RecursionError as e:
        raise ConfigError(
            f"the defaults of preset {source.name!r} come back to itself; give {source.folder / source.name}.yaml another name"
        ) from e
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as e:
        reason = " ".join(str(e.__cause__ or e).split()) if isinstance(e, HydraException) else " ".join(str(e).split())
        raise ConfigError(f"preset {source.name!r} with {' '.join(overrides) or 'no overrides'} cannot be composed: {reason}") from e
    return {str(k): v for k, v in data.items()} if isinstance(data, dict) else {}


def _quote(text: str) -> str:
    """`text` as a quoted value of Hydra's grammar, in which a backslash is itself unless it stands before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), text) + "'"


def _translate(override: str, groups: dict[str, list[str]]) -> str:
    """`override` in Hydra's terms. Raises ConfigError where it is none."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    match = Override.fullmatch(override)
    if not match or (match["value"] is None and match["sign"] != "~"):
        raise ConfigError(f"override {override!r} is not of the form key=value, such as optimizer.schedule.lr=1e-3")
    sign, key, value = match["sign"], match["key"], match["value"]
    if key.split(".")[0] == "hydra":
        raise ConfigError(f"override {override!r} would set Hydra itself; only the keys of a run can be set")
    if sign == "~":
        return override
    if key in groups and not value.startswith("{"):
        if value not in groups[key]:
            raise ConfigError(f"{key}={value}: there is no such option; {_choice(value, groups[key])}; one key is set by {key}.KEY=VALUE")
        return override.lstrip("+")
    parser = OverridesParser.create()
    try:
        parsed = parser.parse_override(f"++{key}={value}")
    except HydraException as e:
        if value[:1] in "[{'\"":
            raise ConfigError(f"override {override!r} cannot be read: {str(e).splitlines()[0]}") from e
        return f"++{key}={_quote(value)}"  # plain text with a character that Hydra's grammar keeps for itself
    if parsed.is_sweep_override():
        raise ConfigError(
            f"override {override!r} gives several values, and a run takes one; write {key}='[a,b]' for a list, \"{key}='a,b'\" for text"
        )
    return f"++{key}={value}"


def _part_keys(data: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Where a mixture's parts name their text."""
    found = data.get("data")
    parts = found.get("parts") if isinstance(found, dict) else None
    return [("data", "parts", i, "data", "path") for i in range(len(parts))] if isinstance(parts, list) else []


def _make_paths_absolute(data: dict[str, Any], source: _Source, overrides: Sequence[str]) -> None:
    for keys in [*PATH_KEYS, *_part_keys(data)]:
        place: Any = data
        for key in keys[:-1]:
            place = place[key] if isinstance(place, list) else place.get(key) if isinstance(place, dict) else None
        value = place.get(keys[-1]) if isinstance(place, dict) else None
        if not isinstance(value, str) or not value or re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", value):
            continue  # an address, or bundled:...
        value = os.path.expanduser(value)
        dotted = ".".join(map(str, keys))
        overridden = any((m := Override.fullmatch(o)) and (dotted == m["key"] or dotted.startswith(m["key"] + ".")) for o in overrides)
        beside = source.folder / value
        place[keys[-1]] = str(beside) if source.own and not overridden and glob.glob(str(beside)) else os.path.abspath(value)


def _lines(found: Sequence[Problem], overrides: Sequence[str], groups: dict[str, list[str]]) -> list[str]:
    """One line a problem; keys left behind by switching a kind become one line that says how to switch."""
    given = {m["key"] for o in overrides if (m := Override.fullmatch(o))}
    switched = {part for part, field in RunConfig.model_fields.items() if f"{part}.kind" in given and members(field.annotation)}
    stale: dict[str, list[str]] = {}
    lines = []
    for problem in found:
        part = ".".join(problem.path[:-1])
        if problem.unknown and part in switched and ".".join(problem.path) not in given:
            stale.setdefault(part, []).append(problem.path[-1])
        else:
            lines.append(str(problem))
    for part, keys in stale.items():
        options = f" (there are {', '.join(groups[part])})" if part in groups else ""
        lines.append(
            f"{part}.kind changes only the kind and leaves {', '.join(keys)} of the former one; use {part}=OPTION{options} instead"
        )
    return lines
