"""Lines of text files from outside: bounded, UTF-8, JSON objects. Errors name file and line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from distill.artifacts import require_regular
from distill.errors import DatasetError, describe_os_error

MAX_LINE = 16 << 20


def read_lines(path: str | Path, *, blank: bool = False) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line; blank ones if asked for. DatasetError where one is too long or not UTF-8."""
    require_regular(path)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                if len(line) > MAX_LINE:
                    raise DatasetError(f"{path}:{number}: the line is longer than {MAX_LINE >> 20} MiB")
                try:
                    line.decode()
                except UnicodeDecodeError as error:
                    raise DatasetError(f"{path}:{number}: not UTF-8 at byte {error.start} of the line") from error
                if blank or line.strip():
                    yield number, line
    except OSError as error:
        raise DatasetError(f"cannot read {describe_os_error(error, path)}") from error


def read_objects(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """`file:line` and the JSON object of each line; a file of one JSON list gives its items, as `file:item n`."""
    if Path(path).suffix == ".json":
        yield from _read_list(path)
        return
    for number, line in read_lines(path):
        yield f"{path}:{number}", decode_object(line, f"{path}:{number}")


def decode_object(line: bytes, where: str) -> dict[str, Any]:
    """One JSON object; `where` opens the error."""
    try:
        value = msgspec.json.decode(line)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DatasetError(f"{where}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise DatasetError(f"{where}: expected a JSON object, found {type(value).__name__}")
    return value


def _read_list(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    require_regular(path)
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_LINE + 1)
    except OSError as error:
        raise DatasetError(f"cannot read {describe_os_error(error, path)}") from error
    if len(data) > MAX_LINE:
        raise DatasetError(f"{path}: a .json file may have {MAX_LINE >> 20} MiB; write one object a line as .jsonl")
    try:
        value = msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError) as error:
        raise DatasetError(f"{path}: not JSON: {error}") from error
    for number, item in enumerate(value if isinstance(value, list) else [value], 1):
        if not isinstance(item, dict):
            raise DatasetError(f"{path}: item {number}: expected a JSON object, found {type(item).__name__}")
        yield f"{path}: item {number}", item
