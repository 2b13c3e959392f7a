"""Reading a config back from plain data, with the leniencies that `Config.from_dict` offers."""

from typing import Any, get_args, get_origin

from pydantic import BaseModel, TypeAdapter

from .errors import ConfigError


def parse(config_class: type, data: Any, *, allow_import_paths: bool, drop_unknown: bool, none_is_zero: bool) -> Any:
    """`data` as a `config_class`; see `Config.from_dict` for the switches."""
    if not allow_import_paths:
        _refuse_import_paths(data)
    if isinstance(config_class, type) and issubclass(config_class, BaseModel):
        data = _lenient(config_class, data, drop_unknown=drop_unknown, none_is_zero=none_is_zero)
    return TypeAdapter(config_class).validate_python(data)


def _refuse_import_paths(data: Any) -> None:
    if isinstance(data, dict):
        if isinstance(kind := data.get("kind"), str) and ":" in kind:
            raise ConfigError(f"kind {kind!r} is an import path, and only built-in kinds are allowed here")
        for value in data.values():
            _refuse_import_paths(value)
    elif isinstance(data, list | tuple):
        for value in data:
            _refuse_import_paths(value)


def _lenient(cls: type[BaseModel], data: Any, *, drop_unknown: bool, none_is_zero: bool) -> Any:
    if not isinstance(data, dict):
        return data
    out = {}
    for key, value in data.items():
        field = cls.model_fields.get(key)
        if field is None:
            if not drop_unknown:
                out[key] = value
            continue
        if value is None and none_is_zero and field.annotation is int:
            value = 0
        inner = _config_class(field.annotation)
        out[key] = _lenient(inner, value, drop_unknown=drop_unknown, none_is_zero=none_is_zero) if inner else value
    return out


def _config_class(annotation: Any) -> type[BaseModel] | None:
    """The config class in `X`, `X | None` or `Annotated[X, ...]`, if there is exactly one."""
    if get_origin(annotation) is None:
        return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    found = [c for a in get_args(annotation) if (c := _config_class(a))]
    return found[0] if len(found) == 1 else None
