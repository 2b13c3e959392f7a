"""What is wrong with a config, told to the person who wrote it: one line each, with the path as it is written in YAML.

Pydantic's locations also hold the tags of unions. They are walked along the classes here, so that paths come out without
them and an unknown key can be compared with the keys of its own place.
"""

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel, Tag, ValidationError

from trainer.config import load_object

CUSTOM = "import path"  # the tag of a part of the user's own


class Problem(NamedTuple):
    """One thing that is wrong at `path`; `unknown` where the key itself is."""

    path: tuple[str, ...]
    message: str
    unknown: bool = False

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}{self.message}"


def problems(error: ValidationError, cls: type[BaseModel], data: Any) -> list[Problem]:
    """What `error`, from validating `data` as a `cls`, says."""
    return list(_problems(error, cls, data, root=cls, at=()))


def _problems(error: ValidationError, cls: type[BaseModel], data: Any, *, root: type[BaseModel], at: tuple[str, ...]) -> Iterator[Problem]:
    for record in error.errors(include_url=False):
        path, place = _walk(cls, record["loc"], data)
        inner = record.get("ctx", {}).get("error")
        if isinstance(inner, ValidationError) and place is not None:  # a part of the user's own validates itself
            yield from _problems(inner, place, _value_at(data, path), root=root, at=at + path)
        else:
            yield _problem(dict(record), (*at, *path), place, root)


def _problem(record: dict[str, Any], path: tuple[str, ...], place: type[BaseModel] | None, root: type[BaseModel]) -> Problem:
    kind, value, ctx = record["type"], record["input"], record.get("ctx", {})
    shown = "" if isinstance(value, dict | BaseModel) or not path else f"={_short(value)}"
    if kind == "extra_forbidden":
        return Problem(path, f"{shown}: there is no such key; {_meant(path, place, root)}", unknown=True)
    if kind == "missing":
        return Problem(path, ": this key is required")
    if kind == "value_error":
        message = str(ctx["error"])
        return Problem(path, f": {message}" if path else message)
    if kind == "union_tag_invalid":
        kinds = [k for k in _quoted(ctx["expected_tags"]) if k != CUSTOM]
        own = "an import path of your own (package.module:ClassName)"
        return Problem((*path, "kind"), f"={_short(ctx['tag'])}: expected {', '.join(kinds)} or {own}{_closest(ctx['tag'], kinds)}")
    if kind == "union_tag_not_found":
        return Problem(path, f"{shown}: expected keys and values, among them kind")
    if kind == "model_type":
        return Problem(path, f"{shown}: expected keys and values, of {', '.join(place.model_fields) if place else 'its own'}")
    if kind == "string_pattern_mismatch":
        return Problem(path, f"{shown}: expected text that matches {ctx['pattern']}")
    expected = re.sub(r"^Input should (be )?", "", record["msg"])
    return Problem(path, f"{shown}: expected {expected}{_closest(value, _quoted(ctx.get('expected', '')))}")


def _meant(path: tuple[str, ...], place: type[BaseModel] | None, root: type[BaseModel]) -> str:
    key, parents = path[-1], path[:-1]
    here = list(place.model_fields) if place is not None else []
    elsewhere = list(dict.fromkeys(p for p in _all_paths(root) if p[-1] == key and p != path))
    near = [p for p in elsewhere if p[: len(parents)] == parents] or elsewhere
    if close := difflib.get_close_matches(key, here, n=1, cutoff=0.6):
        best = [(*parents, close[0])]
        if near and difflib.SequenceMatcher(None, key, close[0]).ratio() < 0.8:
            best = near  # the very word elsewhere is likelier than one that only looks like it
    else:
        best = near or [(*parents, k) for k in here if len(key) > 3 and key in k]
    if best and key != "kind":
        return "did you mean " + " or ".join(f"`{'.'.join(p)}`" for p in best[:3]) + "?"
    return f"expected one of {', '.join(here)}" if here else "remove it"


def _closest(value: Any, options: list[str]) -> str:
    close = difflib.get_close_matches(value, options, n=1) if isinstance(value, str) else []
    return f"; did you mean `{close[0]}`?" if close else ""


def _quoted(text: str) -> list[str]:
    return re.findall(r"'([^']*)'", text)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _walk(cls: type[BaseModel], loc: tuple[int | str, ...], data: Any) -> tuple[tuple[str, ...], type[BaseModel] | None]:
    """The path that `loc` means, and the class whose field its last key is or would be; for a whole part the part's class."""
    path: list[str] = []
    annotation: Any = cls
    owner: type[BaseModel] | None = cls
    for item in loc:
        tagged = members(annotation)
        if item in tagged:
            annotation = owner = tagged[item] if item != CUSTOM else _custom(_value_at(data, path))
            continue
        path.append(str(item))
        if isinstance(item, int):
            annotation = next(iter(get_args(annotation)), None)
            continue
        owner = _config_class(annotation)
        field = owner.model_fields.get(item) if owner else None
        annotation = field.annotation if field else None
    return tuple(path), owner if annotation is None else (_config_class(annotation) or owner)


def members(annotation: Any) -> dict[Any, type[BaseModel]]:
    """The classes of a union of parts by their tags; empty for anything else."""
    found = {}
    for arg in get_args(annotation):
        if get_origin(arg) is Annotated:
            member, *metadata = get_args(arg)
            found.update({m.tag: member for m in metadata if isinstance(m, Tag)})
    return found


def _custom(data: Any) -> type[BaseModel] | None:
    cls = load_object(data["kind"])  # it was loaded a moment ago
    return cls if isinstance(cls, type) and issubclass(cls, BaseModel) else None


def _config_class(annotation: Any) -> type[BaseModel] | None:
    """The config class in `X`, `X | None` or `Annotated[X, ...]`, if there is exactly one."""
    if get_origin(annotation) is None:
        return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    found = [c for a in get_args(annotation) if (c := _config_class(a))]
    return found[0] if len(found) == 1 else None


def _all_paths(cls: type[BaseModel], parents: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of every field of `cls`, with those of all built-in parts."""
    for name, field in cls.model_fields.items():
        yield (*parents, name)
        own = _config_class(field.annotation)
        for part in [c for tag, c in members(field.annotation).items() if tag != CUSTOM] or ([own] if own else []):
            yield from _all_paths(part, (*parents, name))


def _value_at(data: Any, path: Any) -> Any:
    for key in path:
        data = data[int(key)] if isinstance(data, list | tuple) else data.get(key) if isinstance(data, dict) else getattr(data, key, None)
    return data
