"""Damage to a package: a recipe is a list of changes, each three numbers that say what, where and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from coremltools.proto import Model_pb2
from google.protobuf.message import DecodeError

from tests.fuzz.invent import invent

INTEGERS = [0, 1, 2, 3, 7, 8, 16, 64, 100, 2**10, 2**16, 2**20, 2**24, 2**28, 2**31 - 1, 2**31, 2**32 - 1, 2**32]
INTEGERS += [2**33, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
INTEGERS += [-n for n in INTEGERS]
NUMBERS = [0.0, -0.0, 1.0, -1.0, 0.5, 1e-45, 65504.0, 65520.0, 3e38, -3e38, 1e300, float("inf"), float("nan")]
WORDS = ["", "x", "main", "CoreML8", "\0", "../..", "/etc/passwd", "x" * 100, "\N{SNOWMAN}", "fp16", "int32", "bool"]
WORDS += ["string", "same", "valid", "custom", "reflect", "constant", "add", "min", "@model_path/weights/weight.bin"]
WORDS += ["@model_path/../../../secret", "@model_path//etc/passwd", "@model_path/weights", "@model_path/"]
FILES = {
    "manifest": "Manifest.json",
    "model": "Data/com.apple.CoreML/model.mlmodel",
    "weights": "Data/com.apple.CoreML/weights/weight.bin",
}
BYTES = [0, 1, 2, 0x7F, 0x80, 0xFF]


class Change(NamedTuple):
    kind: str
    where: int
    how: int


class Recipe(NamedTuple):
    package: str
    changes: tuple[Change, ...]


class Slot(NamedTuple):
    """A field of a message in the tree; `key` is an index into a repeated field, or a map's key."""

    owner: Any
    field: Any
    key: Any


def apply(recipe: Recipe, sound: dict[str, bytes], words: list[str]) -> dict[str, bytes]:
    """The files of the package after all changes."""
    files = dict(sound)
    for change in recipe.changes:
        if change.kind in ("manifest", "model", "weights"):
            if change.kind in files:
                files[change.kind] = damage(files[change.kind], change.where, change.how)
            continue
        try:
            model = Model_pb2.Model.FromString(files["model"])
        except DecodeError:
            continue
        if change.kind == "invent":
            invent(model, change.how, change.where)
        else:
            edit(model, change, words)
        files["model"] = model.SerializeToString(deterministic=True)
    return files


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / path).read_bytes() for name, path in FILES.items() if (folder / path).exists()}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, raw in files.items():
        path = folder / FILES[name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw)


def damage(raw: bytes, where: int, how: int) -> bytes:
    """Flip a bit, set a byte, cut off, delete, insert, copy from elsewhere."""
    if not raw:
        return bytes(how % 64)
    at, kind, how = where % len(raw), how % 7, how // 7
    size = 1 + how % 64
    if kind == 0:
        return raw[:at] + bytes([raw[at] ^ (1 << how % 8)]) + raw[at + 1 :]
    if kind == 1:
        return raw[:at] + bytes([BYTES[how % len(BYTES)]]) + raw[at + 1 :]
    if kind == 2:
        return raw[:at]
    if kind == 3:
        return raw[:at] + raw[at + size :]
    if kind == 4:
        return raw[:at] + bytes([BYTES[how % len(BYTES)]]) * size + raw[at:]
    source = how % len(raw)
    piece = raw[source : source + size]
    return raw[:at] + piece + raw[at + (len(piece) if kind == 5 else 0) :]


def slots(message: Any) -> list[Slot]:
    """Every field that is set, in a fixed order."""
    found = []
    stack = [message]
    while stack:
        owner = stack.pop()
        for field, value in owner.ListFields():
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                for key in sorted(value):
                    found.append(Slot(owner, field, key))
                    if field.message_type.fields_by_name["value"].message_type is not None:
                        stack.append(value[key])
            elif field.is_repeated:
                for index in range(len(value)):
                    found.append(Slot(owner, field, index))
                    if field.message_type is not None:
                        stack.append(value[index])
            else:
                found.append(Slot(owner, field, None))
                if field.message_type is not None:
                    stack.append(value)
    return found


def edit(model: Any, change: Change, words: list[str]) -> None:
    """One change to one field; `kind` narrows where."""
    every = slots(model)
    wanted = [s for s in every if KINDS[change.kind](s)]
    if not wanted:
        return
    slot = wanted[change.where % len(wanted)]
    how = change.how
    try:
        if slot.field.message_type is None or not is_message(slot):
            set_scalar(slot, how, words)
        else:
            change_message(slot, how, every)
    except (ValueError, TypeError, OverflowError):
        return  # a value that this field cannot hold


def is_map(slot: Slot) -> bool:
    return slot.field.message_type is not None and slot.field.message_type.GetOptions().map_entry


def is_message(slot: Slot) -> bool:
    if is_map(slot):
        return slot.field.message_type.fields_by_name["value"].message_type is not None
    return slot.field.message_type is not None


def value_of(slot: Slot) -> Any:
    value = getattr(slot.owner, slot.field.name)
    return value if slot.key is None else value[slot.key]


def set_scalar(slot: Slot, how: int, words: list[str]) -> None:
    container = getattr(slot.owner, slot.field.name)
    old = value_of(slot)
    if slot.key is not None and not is_map(slot) and how % 8 == 0:
        del container[slot.key]
        return
    if slot.key is not None and not is_map(slot) and how % 8 == 1:
        container.extend([old] * (1 + how // 8 % 4))
        return
    how //= 8
    if isinstance(old, bool):
        new: Any = not old
    elif isinstance(old, int):
        new = [old + 1, old - 1, -old, old * 2, *INTEGERS][how % (len(INTEGERS) + 4)]
    elif isinstance(old, float):
        new = NUMBERS[how % len(NUMBERS)]
    elif isinstance(old, bytes):
        new = damage(old, how // 7, how)
    else:
        new = words[how % len(words)]
    if slot.key is None:
        setattr(slot.owner, slot.field.name, new)
    else:
        container[slot.key] = new


def change_message(slot: Slot, how: int, every: list[Slot]) -> None:
    """Remove, empty, repeat, move, or replace by another of its kind."""
    container = getattr(slot.owner, slot.field.name)
    message = value_of(slot)
    alike = [value_of(s) for s in every if is_message(s) and value_of(s).DESCRIPTOR is message.DESCRIPTOR]
    other = alike[how // 6 % len(alike)]
    copy = type(other).FromString(other.SerializeToString())  # `other` may hold the place that it is copied into
    kind = how % 6
    if kind == 0:
        message.Clear()
    elif kind == 1 and slot.key is None:
        slot.owner.ClearField(slot.field.name)
    elif kind == 1:
        del container[slot.key]
    elif kind == 2 and slot.key is not None and not is_map(slot):
        container.add().CopyFrom(copy)
    elif kind == 3 and slot.key is not None and not is_map(slot):
        neighbour = container[how // 6 % len(container)]
        mine, other = message.SerializeToString(), neighbour.SerializeToString()
        message.ParseFromString(other)
        neighbour.ParseFromString(mine)
    else:
        message.CopyFrom(copy)


def below(*names: str) -> Any:
    return lambda slot: slot.owner.DESCRIPTOR.name in names


# What a change to the protobuf may touch.
KINDS: dict[str, Any] = {
    "field": lambda slot: True,
    "operation": lambda slot: slot.field.name == "operations" or below("Operation", "Block")(slot),
    "type": below("TensorType", "ConstantDimension", "Dimension", "ValueType", "ListType", "StateType"),
    "constant": below("RepeatedInts", "RepeatedFloats", "RepeatedBytes", "RepeatedBools", "RepeatedStrings"),
    "number": below("RepeatedInts", "RepeatedBytes"),
    "size": below("ConstantDimension"),
    "input": below("Argument", "Binding", "ArgumentsEntry"),
    "blob": below("BlobFileValue"),
    "interface": below("ModelDescription", "FunctionDescription", "FeatureDescription", "ArrayFeatureType"),
}
CHANGES = ("manifest", "model", "weights", "invent", *KINDS)
