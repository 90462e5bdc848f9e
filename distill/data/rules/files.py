"""Rules about the files beside a dataset: that they are there, the store, rejects, the report, costs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Container, Iterator
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import msgspec

from distill.artifacts import canonical_json, require_regular, sha256_file
from distill.data import records as kd
from distill.data.budget import UNIT
from distill.data.episodes import REJECTS
from distill.data.journal import JOURNAL, damage, read_ledger, totals
from distill.data.rules import secrets
from distill.data.rules.header import prices_of
from distill.data.rules.view import repeated_key
from distill.data.rules.whole import is_cost
from distill.data.store.store import TopK
from distill.errors import InputError

STORE, REJECTED, LEDGER = "logprobs.safetensors", "rejects.jsonl", JOURNAL


def file_problems(path: Path, header: kd.Header, records_sha256: str) -> Iterator[str]:
    """Every file listed is one of a dataset's and there, under its own hash; what must be listed is."""
    for name, digest in header.files.items():
        if name not in ("records", *kd.SIDECAR_FILES):
            yield f"{name[:80]!r} is no file of a dataset"
            continue
        file = path if name == "records" else kd.sidecar(path) / name
        if not file.is_file():
            yield f"{file.name} is missing"
        elif (records_sha256 if name == "records" else sha256_file(file)) != digest:
            yield f"the sha256 of {file.name} is not the one listed"
    absent = {"header.json"}  # it cannot hold its own
    absent |= {STORE} if header.logprobs is None else set()
    absent |= {"tokenizer.json"} if header.tokenizer_sha256 is None else set()
    for name in ("records", *kd.SIDECAR_FILES):
        if (name in header.files) == (name in absent):
            yield f"{name} is {'' if name in absent else 'not '}listed"


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
    rows: list[Reject]
    problems: list[tuple[str, int, str]]
    """Rule, line and problem."""

    @property
    def reasons(self) -> Counter[str]:
        """How often each reason occurs."""
        return Counter(row.reason for row in self.rows)

    def of(self, stratum: str) -> Counter[str]:
        """How often each reason occurs in a stratum."""
        return Counter(row.reason for row in self.rows if row.stratum == stratum)


class Reject(msgspec.Struct, forbid_unknown_fields=True):
    """A line of rejects.jsonl."""

    id: str = ""
    stratum: str = ""
    reason: str = ""
    detail: str = ""
    cost_usd: Decimal | None = None


_REJECT = msgspec.json.Decoder(Reject)


def read_rejects(path: Path, header: kd.Header) -> Rejects:
    """Every reject has an id of its own, a stratum that has a quota, a reason of the list, and what it cost."""
    priced, generated = prices_of(header) is not None, header.teacher.asked
    found = Rejects(0, None, [], [])
    seen: set[str] = set()
    if not path.is_file():
        return found
    for line, raw in enumerate(_lines(path), 1):
        found = found._replace(lines=line)
        try:
            if not raw.endswith(b"\n"):
                raise ValueError("the line is cut off" if len(raw) <= kd.MAX_LINE else "the line is too long")
            reject = _REJECT.decode(raw)
        except (msgspec.DecodeError, RecursionError, ValueError) as error:
            found.problems.append(("rejects", line, f"not a reject: {error}"))
            continue
        found.rows.append(reject)
        found.problems.extend(("rejects", line, what) for what in _reject_problems(reject, seen, header.quotas))
        if generated and reject.id.rpartition("-")[0] != reject.stratum:
            found.problems.append(("rejects", line, "its id does not begin with its stratum"))
        if generated and priced != (reject.cost_usd is not None):
            what = "what it cost is not stated" if priced else "has a cost, and the configuration no prices"
            found.problems.append(("costs", line, what))
        if repeated_key(raw):
            found.problems.append(("rejects", line, "gives a key twice"))
        if kind := secrets.secret_in(raw.decode()) or secrets.secret_in("\n".join((reject.id, reject.detail))):
            found.problems.append(("secrets", line, f"holds what looks like a secret ({kind})"))
        seen.add(reject.id)
        if reject.cost_usd is not None and is_cost(reject.cost_usd):
            found = found._replace(cost=(found.cost or Decimal()) + reject.cost_usd)
    return found


def _lines(path: Path) -> Iterator[bytes]:
    """Lines with their ends, each no longer than one may be; of a longer one its beginning."""
    require_regular(path)
    with open(path, "rb") as file:
        while line := file.readline(kd.MAX_LINE + 1):
            yield line
            while line and not line.endswith(b"\n"):
                line = file.readline(kd.MAX_LINE + 1)


def _reject_problems(reject: Reject, seen: Container[str], strata: Container[str]) -> Iterator[str]:
    if not reject.id:
        yield "lacks an id"
    elif reject.id in seen:
        yield "its id is that of an earlier reject"
    if reject.reason not in REJECTS:
        yield f"reason {reject.reason[:40]!r} is not one of the list" if reject.reason else "lacks a reason"
    if strata and reject.stratum not in strata:
        yield f"stratum {reject.stratum[:40]!r} has no quota"
    if reject.cost_usd is not None and not is_cost(reject.cost_usd):
        yield "its cost is not an amount"


def cost_problems(path: Path, header: kd.Header, accepted: Decimal | None, rejected: Decimal | None) -> Iterator[str]:
    """Costs are exact: the records' and the rejects' sum to the header's, and the ledger has paid as much."""
    parts = [cost for cost in (accepted, rejected) if cost is not None]
    if header.teacher.asked and (prices_of(header) is not None) != (header.cost_usd is not None):
        yield "the configuration has prices and the header no cost, or the other way round"
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
