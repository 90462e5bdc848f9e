"""Rules about the files of a dataset: the header and what it says of the others, the store, rejects, costs."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import msgspec

from distill import chat
from distill.artifacts import canonical_json, sha256_file
from distill.data import records as kd
from distill.data.budget import UNIT
from distill.data.episodes import REJECTS
from distill.data.journal import damage, read_ledger, totals
from distill.data.rules.whole import Whole, is_cost
from distill.data.schema import run_id_of
from distill.data.store.store import TopK
from distill.errors import InputError
from distill.tokenizer import Tokenizer

STORE, REJECTED, LEDGER = "logprobs.safetensors", "rejects.jsonl", "journal.sqlite"
_SHA256 = re.compile(r"[0-9a-f]{64}")


def file_problems(path: Path, header: kd.Header, records_sha256: str) -> Iterator[str]:
    """Every file listed is there, under its own hash; what must be listed is."""
    for name, digest in header.files.items():
        file = path if name == "records" else kd.sidecar(path) / Path(name).name
        if not file.is_file():
            yield f"{file.name} is missing"
        elif (records_sha256 if name == "records" else sha256_file(file)) != digest:
            yield f"the sha256 of {file.name} is not the one listed"
    wanted = ["records", REJECTED] + [STORE] * (header.logprobs is not None)
    wanted += ["tokenizer.json"] * (header.tokenizer_sha256 is not None)
    for name in wanted:
        if name not in header.files:
            yield f"{name} is not listed"


def header_problems(header: kd.Header, tokenizer: Tokenizer | None) -> Iterator[str]:
    """Everything that must be known is stated, and what can be made again is equal."""
    hashes = {name: getattr(header, name) for name in header.__struct_fields__ if name.endswith("_sha256")}
    hashes |= {f"files.{name}": digest for name, digest in header.files.items()}
    hashes |= {f"decontamination.{name}": digest for name, digest in header.decontamination.items()}
    hashes["teacher.weights_sha256"] = header.teacher.weights_sha256
    for name, digest in hashes.items():
        if digest is not None and not _SHA256.fullmatch(digest):
            yield f"{name} is not a sha256"
    for name in ("package", "version", "code"):
        if not header.created_by.get(name):
            yield f"created_by lacks {name}"
    if header.run_id != run_id_of(header):
        yield "run_id is not that of configuration, sampling, teacher, tokenizer and template"
    teacher = header.teacher
    wanted = {
        "host": teacher.kind == "endpoint", "weights_sha256": teacher.kind in ("gguf", "hf"), "model": True,
        "logits_engine": header.logprobs is not None and teacher.kind != "endpoint", "text_engine": True,
    }  # fmt: skip
    for name, needed in wanted.items():
        if needed and not getattr(teacher, name):
            yield f"teacher lacks {name}"
    if header.template_sha256 != chat.template_sha256():
        yield "template_sha256 is not that of this version's chat template"
    if header.logprobs is not None and header.tokenizer_sha256 is None:
        yield "tokenizer_sha256 is null, though there are distributions"
    if tokenizer is not None and header.tokenizer_sha256 != tokenizer.sha256:
        yield "tokenizer_sha256 is not that of tokenizer.json"
    if header.text_only != (header.logprobs is None):
        yield "text_only is not what logprobs says"


def total_problems(header: kd.Header, whole: Whole, rejected: int) -> Iterator[str]:
    """The header's counts, and the hash of the ids, are those of the records."""
    counts = whole.counts | {"rejected": rejected}
    wrong = {name: n for name, n in counts.items() if header.counts.get(name) != n}
    if wrong:
        yield f"counts differ from the files': {wrong}"
    if header.prompts_sha256 != whole.prompts_sha256:
        yield "prompts_sha256 is not that of the records' ids"


def store_problems(store: TopK, header: kd.Header) -> Iterator[str]:
    """The store is this dataset's and what the header describes."""
    for name in ("run_id", "tokenizer_sha256", "template_sha256"):
        if store.metadata.get(name) != getattr(header, name):
            yield f"its {name} is not the header's"
    info = header.logprobs
    if info is None:
        yield "the header describes no distributions"
        return
    described = {"k": str(info.k), "codec": info.codec, "kind": info.kind, "tail": info.tail,
                 "temperature": repr(info.temperature)}  # fmt: skip
    for name, value in described.items():
        if store.metadata.get(name) != value:
            yield f"its {name} {str(store.metadata.get(name))[:40]} is not the header's {value}"
    if store.metadata.get("kl_to_exact") != canonical_json(info.kl_to_exact):
        yield "its kl_to_exact is not the header's"
    if header.counts.get("completion_tokens", store.tokens) != store.tokens:
        yield f"it holds {store.tokens} tokens, the header says {header.counts['completion_tokens']}"


class Rejects(NamedTuple):
    """What the list of rejects holds, and what is wrong with it."""

    lines: int
    cost: Decimal | None
    problems: list[tuple[int, str]]
    """Line and problem."""


class _Reject(msgspec.Struct):
    id: str = ""
    reason: str = ""
    cost_usd: Decimal | None = None


def read_rejects(path: Path) -> Rejects:
    """Every reject has an id and a reason of the list."""
    problems: list[tuple[int, str]] = []
    lines, cost = 0, None
    if not path.is_file() or not path.stat().st_size:
        return Rejects(0, None, [])
    for line, raw in kd.read_lines(path):
        lines += 1
        try:
            reject = msgspec.json.decode(raw, type=_Reject)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            problems.append((line, f"not a reject: {error}"))
            continue
        if not reject.id:
            problems.append((line, "lacks an id"))
        if reject.reason not in REJECTS:
            problems.append(
                (line, f"reason {reject.reason[:40]!r} is not one of the list" if reject.reason else "lacks a reason")
            )
        if reject.cost_usd is not None and not is_cost(reject.cost_usd):
            problems.append((line, "its cost is not an amount"))
        elif reject.cost_usd is not None:
            cost = (cost or Decimal()) + reject.cost_usd
    return Rejects(lines, cost, problems)


def cost_problems(path: Path, header: kd.Header, accepted: Decimal | None, rejected: Decimal | None) -> Iterator[str]:
    """Costs are exact: the records' and the rejects' sum to the header's, and the ledger has paid as much."""
    parts = [cost for cost in (accepted, rejected) if cost is not None]
    if header.cost_usd is None:
        if parts:
            yield "records or rejects have costs, the header has none"
        return
    if not is_cost(header.cost_usd):
        yield "the header's cost is not an amount"
    elif sum(parts, Decimal()) != header.cost_usd:
        yield f"records and rejects cost {sum(parts, Decimal())} USD, the header says {header.cost_usd}"
    ledger = kd.sidecar(path) / LEDGER
    if not ledger.is_file() or not is_cost(header.cost_usd):
        return
    try:
        with contextlib.closing(read_ledger(ledger)) as db, damage(ledger):
            settled = totals(db).get("settled")
    except InputError as error:
        yield f"the ledger cannot be read: {error}"
        return
    if (paid := (settled.cost if settled else 0) * UNIT) < header.cost_usd:
        yield f"the ledger settled {paid} USD, less than the header's {header.cost_usd}"
