"""Configuration: frozen structs from YAML. An unknown key is an error that names the nearest key."""

from __future__ import annotations

import difflib
import os
import re
import types
from collections.abc import Hashable
from typing import Any, TypeVar, Union, get_args, get_origin

import msgspec
import yaml

from distill.artifacts import read_text
from distill.errors import ConfigError, InputError

T = TypeVar("T", bound=msgspec.Struct)


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads 1e-3 as a number (YAML 1.2) and refuses a key given twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise yaml.constructor.ConstructorError(None, None, "a key is not a plain value", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*)(?:\.\d*)?(?:[eE][-+]?\d+)$|^[-+]?\d[\d_]*\.\d*$|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$"
    ),
    list("-+0123456789."),
)


def load_yaml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a YAML mapping; a missing or malformed file is a ConfigError that names it."""
    try:
        text = read_text(path)
    except InputError as error:
        raise ConfigError(f"configuration: {error}") from error
    try:
        data = yaml.load(text, Loader=_Loader)  # a SafeLoader: builds plain values only
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, LookupError, AttributeError) as error:
        # PyYAML's constructors raise the last four on scalars such as `2001-99-99` and `!!bool maybe`
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(data).__name__}")
    return data


def load(path: str | os.PathLike[str], kind: type[T]) -> T:
    """Read `path` as a `kind` (a msgspec Struct).

    Raises ConfigError on an unknown key (nearest named), a wrong type or a rule of the struct's
    __post_init__ (ValueError).
    """
    return build(load_yaml(path), kind, source=str(path))


def build(data: dict[str, Any], kind: type[T], source: str) -> T:
    """Convert a plain mapping to a struct; `source` opens every error message."""
    _refuse_unknown(data, kind, source, "")
    try:
        return msgspec.convert(data, kind)
    except (msgspec.ValidationError, ValueError, OverflowError, RecursionError) as error:
        raise ConfigError(f"{source}: {_in_words(str(error))}") from error


_MISMATCH = re.compile(r"Expected `([^`]+)`, got `([^`]+)` - at `\$\.([^`]+)`")
_KINDS = {"int": "a whole number", "float": "a number", "str": "a string", "bool": "true or false", "array": "a list",
          "object": "a mapping"}  # fmt: skip


def _in_words(problem: str) -> str:
    """msgspec's words for a value of a wrong type, in those of YAML."""
    if (found := _MISMATCH.fullmatch(problem)) is None:
        return problem
    wanted, given, key = found.groups()
    kinds = " or ".join(_KINDS.get(kind, kind) for kind in wanted.split(" | "))
    return f"{key} must be {kinds}, not {_KINDS.get(given, given)}"


def as_dict(config: msgspec.Struct) -> dict[str, Any]:
    """A struct as plain JSON-able values, nested structs included."""
    return msgspec.to_builtins(config)


def _refuse_unknown(data: dict[str, Any], kind: type[msgspec.Struct], source: str, where: str) -> None:
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for key, value in data.items():
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.0)
            raise ConfigError(f"{source}: unknown key '{where}{key}'; the nearest key is '{where}{near[0]}'")
        for nested in _structs_in(fields[key]):
            if isinstance(value, dict):
                _refuse_unknown(value, nested, source, f"{where}{key}.")
            for item in value if isinstance(value, list) else []:
                if isinstance(item, dict):
                    _refuse_unknown(item, nested, source, f"{where}{key}[].")


def _structs_in(annotation: Any) -> list[type[msgspec.Struct]]:
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, list, tuple):
        return [found for part in get_args(annotation) for found in _structs_in(part)]
    return []
