"""YAML into frozen structs: unknown keys, wrong types and malformed files are one line that names the key."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from distill.config import as_dict, build, load, load_yaml
from distill.errors import ConfigError


class _Inner(msgspec.Struct, frozen=True):
    width: int = 1
    rate: float = 0.5


class _Outer(msgspec.Struct, frozen=True):
    name: str
    inner: _Inner = _Inner()
    maybe: _Inner | None = None
    several: list[_Inner] = []

    def __post_init__(self) -> None:
        if self.name == "bad":
            raise ValueError("name must not be bad")


def _load(tmp_path: Path, text: str) -> _Outer:
    (tmp_path / "c.yaml").write_text(text)
    return load(tmp_path / "c.yaml", _Outer)


def test_values_are_read_and_given_back(tmp_path: Path) -> None:
    found = _load(tmp_path, "name: x\ninner: {width: 3, rate: 1e-3}\nseveral: [{width: 2}]\n")
    assert found == _Outer("x", _Inner(3, 0.001), None, [_Inner(2)])
    assert build(as_dict(found), _Outer, "again") == found


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nnme: y", "unknown key 'nme'; the nearest key is 'name'"),
        ("name: x\ninner: {widht: 1}", "unknown key 'inner.widht'; the nearest key is 'inner.width'"),
        ("name: x\nmaybe: {rat: 1}", "unknown key 'maybe.rat'; the nearest key is 'maybe.rate'"),
        ("name: x\nseveral: [{width: 1}, {depth: 1}]", r"unknown key 'several\[\].depth'"),
        ("name: x\ninner: {width: wide}", "inner.width"),
        ("inner: {width: 1}", "name"),
        ("name: bad", "name must not be bad"),
        ("name: x\nname: y", "'name' is given twice"),
        ("name: [x", "not valid YAML"),
        ("- x", "expected a mapping"),
        ("", "expected a mapping"),
        ("name: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("name: x\n1: 2", "unknown key '1'"),
        ("? [1, 2]\n: 3", "a key is not a plain value"),
        ("? {a: 1}\n: 3", "a key is not a plain value"),
        ("name: 2001-99-99", "not valid YAML"),
        ("name: !!bool maybe", "not valid YAML"),
        (f"name: {'9' * 5000}", "not valid YAML"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_file_and_key(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        _load(tmp_path, text)
    assert "\n" not in str(caught.value) and "c.yaml" in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.yaml"):
        load_yaml(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"b\.yaml"):
        load_yaml(tmp_path / "b.yaml")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe\.yaml: not a regular file"):
        load_yaml(tmp_path / "pipe.yaml")
    (tmp_path / "deep.yaml").write_text("a: " + "[" * 5000)
    with pytest.raises(ConfigError, match=r"deep\.yaml"):
        load_yaml(tmp_path / "deep.yaml")


def test_numbers_are_read_as_yaml_1_2_does(tmp_path: Path) -> None:
    (tmp_path / "n.yaml").write_text("a: 1e-3\nb: 1.5e3\nc: .inf\nd: 10\ne: 1.0\nf: '1e3'\n")
    assert load_yaml(tmp_path / "n.yaml") == {"a": 0.001, "b": 1500.0, "c": float("inf"), "d": 10, "e": 1.0, "f": "1e3"}
