"""Evaluation prompts for an export: the toy sets' held-out ones, or the validation split of the training data."""

from __future__ import annotations

from pathlib import Path

from distill.checkpoint import Checkpoint
from distill.data import toy
from distill.data.records import Dataset, Record
from distill.errors import InputError
from distill.tools import EvalItem

TOY_ITEMS = {"tools": 40, "8-ball": 50}
VALIDATION_ITEMS = 8


def evaluation_items(loaded: Checkpoint, *, toy_set: bool) -> list[EvalItem]:
    """Prompts that the student has not been trained on; none where nothing says what those are."""
    if toy_set:
        kind = (loaded.provenance.get("dataset") or {}).get("kind")
        if kind not in TOY_ITEMS:
            raise InputError(f"--toy: the checkpoint was not trained on a toy set (its dataset kind is {kind!r})")
        return [_item(record) for record in toy.held_out(TOY_ITEMS[kind], kind=kind)]
    data = (loaded.provenance.get("config") or {}).get("data")
    if not data or not Path(data).is_file():
        return []
    held_out = (record for record in Dataset.open(data) if record.split == "val")
    return [_item(record) for record, _ in zip(held_out, range(VALIDATION_ITEMS), strict=False)]


def _item(record: Record) -> EvalItem:
    """The record's prompt, and its last turn as what is right."""
    calls = record.messages[-1].tool_calls if record.tools else None
    return EvalItem(record.id, record.messages[:-1], tuple(record.tools), calls, record.teacher_text)
