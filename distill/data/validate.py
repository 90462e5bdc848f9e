"""`python -m scripts.validate_kd_data --in F`: every rule that a dataset must keep, over its records in a stream.

A rule of one record is a function in RECORD_RULES that yields what is wrong; rules over the whole are in `Whole`.
Exit 0: all rules hold; 1: findings; 2: not a dataset (no header, broken JSON). Secrets are never echoed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from distill import chat
from distill.artifacts import require_regular, sha256_file, write_json
from distill.data import records as kd
from distill.data.distributions import SUM_TOLERANCE, TopK, same_tokens
from distill.data.targets import targets_of
from distill.data.teachers import KEY_VARIABLES
from distill.errors import DatasetError, InputError, stage_main
from distill.gates import Gate, exit_code, holds, skipped, summary, table, to_json
from distill.tokenizer import Tokenizer
from distill.tools import arguments_problem

MAX_FINDINGS = 1000  # kept in the report; all are counted

SECRETS = {
    "API key": re.compile(r"\b(?:sk|pk|rk)-[A-Za-z0-9_-]{20,}"),
    "AWS key id": re.compile(r"\bAKIA[0-9A-Z]{16}\b"),
    "GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,}\b"),
    "Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "Slack token": re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}"),
    "private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "bearer token": re.compile(r"\bBearer [A-Za-z0-9._~+/-]{20,}"),
}


class Finding(NamedTuple):
    """A rule broken at a place."""

    rule: str
    place: str
    what: str


class Context(NamedTuple):
    """What a rule of one record may look at."""

    header: kd.Header
    tokenizer: Tokenizer | None
    store: TopK | None


def _run_id(record: kd.Record, context: Context) -> Iterator[str]:
    if record.run_id != context.header.run_id:
        yield f"run_id {record.run_id!r} is not the header's"


def _roles(record: kd.Record, context: Context) -> Iterator[str]:
    before = "start"
    follows = {"start": {"system", "user"}, "system": {"user"}, "user": {"assistant"},
               "assistant": {"user"}, "call": {"tool"}, "tool": {"tool", "assistant"}}  # fmt: skip
    for index, message in enumerate(record.messages):
        if message.role not in follows[before]:
            yield f"messages[{index}]: {message.role} cannot follow {before}"
            return
        before = "call" if message.tool_calls else message.role
    users = [message.content for message in record.messages if message.role == "user"]
    if users and record.prompt != users[-1]:
        yield "prompt is not the last user turn"


def _calls(record: kd.Record, context: Context) -> Iterator[str]:
    parsed = chat.parse(record.teacher_text)
    if parsed.malformed:
        yield "teacher_text holds a malformed call"
    if tuple(parsed.calls) != record.gold_calls:
        yield "the calls in teacher_text are not those of the last turn"


def _offered(record: kd.Record, context: Context) -> Iterator[str]:
    functions = [tool.get("function", tool) for tool in record.tools]
    if not all(isinstance(function, dict) and isinstance(function.get("name"), str) for function in functions):
        yield "tools holds something that is not a function with a name"
        return
    offered = {function["name"]: function for function in functions}
    for index, message in enumerate(record.messages):
        for call in message.tool_calls:
            if call.name not in offered:
                yield f"messages[{index}] calls {call.name}, which is not offered"
            elif problem := arguments_problem(call, offered[call.name]):
                yield f"messages[{index}] calls {call.name}: {problem}"


def _targets(record: kd.Record, context: Context) -> Iterator[str]:
    try:
        expected = targets_of(record.messages, record.tools)
    except InputError as error:
        yield str(error)
        return
    if record.targets != expected:
        yield "targets are not the spans of the last turn in the rendered text"


def _distributions(record: kd.Record, context: Context) -> Iterator[str]:
    if record.logprobs is None or context.store is None or context.tokenizer is None:
        if record.logprobs is not None:
            yield "logprobs is set, but the dataset has no distributions"
        return
    try:
        item = context.store[record.logprobs.row]
        ids = kd.completion_ids(record, context.tokenizer)
    except InputError as error:
        yield str(error)
        return
    if (len(item.token_ids), item.topk_ids.shape[1]) != (record.logprobs.n, record.logprobs.k):
        yield f"logprobs says n={record.logprobs.n}, k={record.logprobs.k}; its row has other sizes"
    elif not same_tokens(item, ids):
        yield "the tokens of its distributions are not those of its last turn"


def _secrets(record: kd.Record, context: Context) -> Iterator[str]:
    text = msgspec.json.encode(record).decode()
    for kind, pattern in SECRETS.items():
        if pattern.search(text):
            yield f"holds what looks like a secret ({kind})"
    for name in KEY_VARIABLES:
        if (key := os.environ.get(name)) and len(key) >= 8 and key in text:
            yield f"holds the value of {name}"


RECORD_RULES: dict[str, Callable[[kd.Record, Context], Iterator[str]]] = {
    "run_id": _run_id,
    "roles": _roles,
    "calls_parse": _calls,
    "calls_offered": _offered,
    "targets": _targets,
    "distributions": _distributions,
    "no_secrets": _secrets,
}


class Whole:
    """Rules over the dataset: ids, duplicates, rows and splits, from digests kept as the records go by."""

    RULES = ("unique_ids", "no_duplicates", "no_split_leak", "rows_used_once")

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._conversations: dict[bytes, int] = {}
        self._prompts: dict[bytes, tuple[int, str]] = {}
        self._rows: dict[int, int] = {}
        self.counts = {"records": 0, "train": 0, "val": 0}

    def see(self, record: kd.Record, line: int) -> Iterator[tuple[str, str]]:
        """Rule and problem of each clash with an earlier record."""
        self.counts["records"] += 1
        self.counts[record.split] += 1
        if (first := self._ids.setdefault(record.id, line)) != line:
            yield "unique_ids", f"id {record.id} is that of line {first}"
        asked = _digest([record.context, record.tools])
        if (first := self._conversations.setdefault(asked + _digest(record.teacher_text), line)) != line:
            yield "no_duplicates", f"the same conversation as line {first}"
        first, split = self._prompts.setdefault(asked, (line, record.split))
        if split != record.split:
            yield "no_split_leak", f"its question is in {record.split}, that of line {first} in {split}"
        if record.logprobs and (first := self._rows.setdefault(record.logprobs.row, line)) != line:
            yield "rows_used_once", f"row {record.logprobs.row} is that of line {first}"


def validate(path: str | Path) -> tuple[dict[str, Gate], list[Finding], dict[str, int]]:
    """All rules over a dataset: a gate each, what was found, and how often each was broken."""
    path = Path(path)
    if not path.is_file():
        require_regular(path)
        raise DatasetError(f"{path}: no such dataset")
    header = kd.read_header(path)
    found: list[Finding] = []
    broken: dict[str, int] = {}

    def note(rule: str, place: str, what: str) -> None:
        broken[rule] = broken.get(rule, 0) + 1
        if len(found) < MAX_FINDINGS:
            found.append(Finding(rule, place, what))

    for what in _header_problems(path, header):
        note("header", "header.json", what)
    context = Context(header, _load(path, header, "tokenizer.json", Tokenizer.from_file, note),
                      _load(path, header, "logprobs.safetensors", TopK, note))  # fmt: skip
    if context.store:
        for what in _store_problems(context.store, header):
            note("distributions", "logprobs.safetensors", what)
    whole = Whole()
    for line, raw in kd.read_lines(path):
        record = _decode(raw, path, line, note)
        if record is None:
            continue
        for rule, check in RECORD_RULES.items():
            for what in check(record, context):
                note(rule, f"{path.name}:{line}", what)
        for rule, what in whole.see(record, line):
            note(rule, f"{path.name}:{line}", what)
    wrong = {name: n for name, n in whole.counts.items() if header.counts.get(name) != n}
    if wrong and not broken.get("schema"):  # a record that cannot be read cannot be counted
        note("header", "header.json", f"counts differ from the file's: {wrong}")
    for what in _reject_problems(kd.sidecar(path) / "rejects.jsonl"):
        note("rejects", "rejects.jsonl", what)
    return _gates(header, found, broken), found, whole.counts


def _gates(header: kd.Header, found: list[Finding], broken: dict[str, int]) -> dict[str, Gate]:
    gates = {}
    for rule in ("header", "schema", *RECORD_RULES, *Whole.RULES, "rejects"):
        first = next((f for f in found if f.rule == rule), None)
        reason = f"{first.place}: {first.what}" if first else None
        gates[rule] = holds(not broken.get(rule), observed=broken.get(rule, 0), threshold=0, reason=reason)
    if header.logprobs is None and gates["distributions"].status == "pass":
        gates["distributions"] = skipped("a text-only dataset")
    return gates


def _decode(raw: bytes, path: Path, line: int, note: Callable[[str, str, str], None]) -> kd.Record | None:
    """A record, or None after noting how it breaks the schema. Broken JSON is a DatasetError."""
    try:
        return kd.decode_record(raw, path, line)
    except DatasetError as error:
        try:
            msgspec.json.decode(raw)
        except (msgspec.DecodeError, RecursionError):
            raise error from None
        note("schema", f"{path.name}:{line}", str(error).removeprefix(f"{path}:{line}: "))
        return None


def _load(path: Path, header: kd.Header, name: str, opener: Callable[[Path], Any],
          note: Callable[[str, str, str], None]) -> Any:  # fmt: skip
    if name not in header.files:
        return None
    try:
        return opener(kd.sidecar(path) / name)
    except InputError as error:
        note("header" if name == "tokenizer.json" else "distributions", name, str(error))
        return None


def _header_problems(path: Path, header: kd.Header) -> Iterator[str]:
    if header.template_sha256 != chat.template_sha256():
        yield "template_sha256 is not that of this version's chat template"
    if header.logprobs is not None and "logprobs.safetensors" not in header.files:
        yield "describes distributions, but lists no logprobs.safetensors"
    for name, digest in header.files.items():
        file = path if name == "records" else kd.sidecar(path) / Path(name).name
        if not file.is_file():
            yield f"{file.name} is missing"
        elif sha256_file(file) != digest:
            yield f"the sha256 of {file.name} is not the one listed"


def _store_problems(store: TopK, header: kd.Header) -> Iterator[str]:
    for name in ("run_id", "tokenizer_sha256", "template_sha256"):
        if store.metadata.get(name) != getattr(header, name):
            yield f"its {name} is not the header's"
    if header.logprobs and (store.k != header.logprobs.k or store.dtype != header.logprobs.dtype):
        yield f"k {store.k} and {store.dtype} are not the header's {header.logprobs.k} and {header.logprobs.dtype}"
    assert store.dtype in SUM_TOLERANCE


def _reject_problems(path: Path) -> Iterator[str]:
    if not path.is_file() or not path.stat().st_size:
        return
    for line, raw in kd.read_lines(path):
        try:
            value = msgspec.json.decode(raw, type=dict[str, Any])
        except (msgspec.DecodeError, RecursionError):
            yield f"line {line} is not a JSON object"
            continue
        if not value.get("reason") or not value.get("id"):
            yield f"line {line} lacks an id or a reason"


def _digest(value: Any) -> bytes:
    return hashlib.sha256(msgspec.json.encode(value)).digest()[:16]


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Check a KD dataset; print a table and write validation.json beside it."""
    parser = argparse.ArgumentParser(prog="distill validate-kd", description="Check every rule of a KD dataset.")
    parser.add_argument("--in", dest="path", required=True, help="the dataset, F.jsonl")
    parser.add_argument("--report", type=Path, help="where to write the report (default: F.jsonl.d/validation.json)")
    args = parser.parse_args(argv)
    gates, found, counts = validate(args.path)
    print(table(gates))
    print(f"{args.path}: {counts['records']} records ({counts['train']} train, {counts['val']} val); {summary(gates)}")
    write_json(args.report or kd.sidecar(args.path) / "validation.json", {
        "dataset": str(args.path), "counts": counts, "gates": to_json(gates),
        "findings": [finding._asdict() for finding in found],
    })  # fmt: skip
    return exit_code(gates)
