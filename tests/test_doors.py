"""Doors: each is its home's `main`, every one is in the table of stages, and none is in the wheel."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest

from distill.cli import STAGES, load

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("conversion", "data", "evaluation", "infra", "scripts", "training")
DOORS = {stage.door: name for name, stage in STAGES.items() if stage.door}


@pytest.mark.parametrize("door", sorted(DOORS))
def test_a_door_is_its_home_s_main(door: str) -> None:
    assert importlib.import_module(door).main is load(STAGES[DOORS[door]])


def test_every_door_module_is_in_the_table_of_stages() -> None:
    found = {f"{folder}.{file.stem}" for folder in FOLDERS for file in (ROOT / folder).glob("*.py")}
    assert found - {f"{folder}.__init__" for folder in FOLDERS} == set(DOORS)


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_door_folder_is_a_package_without_logic(folder: str) -> None:
    assert (ROOT / folder / "__init__.py").is_file()  # a regular package beats a namespace of the same name
    for file in (ROOT / folder).glob("*.py"):
        code = [line for line in file.read_text().splitlines() if line and not line.startswith('"""')]
        assert len(code) <= 3 or file.name == "__init__.py", file


def test_the_wheel_holds_the_package_and_no_door() -> None:
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]
    assert build["wheel"] == {"packages": ["distill"]}
    assert not any(name.strip("/") in FOLDERS for name in build["sdist"]["include"])
