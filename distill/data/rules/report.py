"""Rules about report.json and report.html: what they say of the set is made again from it."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from distill.artifacts import require_regular
from distill.data import records as kd
from distill.data.build import STOPPED, cost_per_record, why_short
from distill.data.page import page
from distill.data.prompts.stream import Dropped
from distill.data.rules import secrets
from distill.data.rules.files import STORE, Rejects
from distill.data.rules.view import repeated_key, strings
from distill.data.rules.whole import Whole, is_cost
from distill.data.schema import Header
from distill.data.tally import stored_facts

REPORT, PAGE = "report.json", "report.html"
_JSON = msgspec.json.Encoder(decimal_format="number")
_OF_RECORDS = ("lengths", "tool_turns", "usage")


class Prompts(NamedTuple):
    """What report.json says of prompts that were not asked, and of strata that are short."""

    left_out: dict[str, str]
    prompts_dropped: dict[str, int]
    dropped_examples: list[dict[str, str]]
    short: dict[str, str]

    @property
    def stopped(self) -> set[str]:
        """Strata whose prompts were not all asked."""
        return {name for name, why in self.short.items() if why == STOPPED}


class Report(NamedTuple):
    """report.json as it was read; `problems` are rules and what breaks them."""

    facts: dict[str, Any]
    problems: list[tuple[str, str]]
    prompts: Prompts | None = None


def read_report(path: Path) -> Report:
    """What report.json says; empty where it is none."""
    if not path.is_file():
        return Report({}, [])  # `files` says so
    raw = _start_of(path)
    try:
        facts = msgspec.json.decode(raw, type=dict[str, Any])
        text = raw.decode()
    except (msgspec.DecodeError, RecursionError, ValueError) as error:
        return Report({}, [("header", f"not a report: {error}")])
    problems: list[tuple[str, str]] = []
    if kind := secrets.secret_in(text) or secrets.secret_in("\n".join(strings(facts))):
        problems.append(("secrets", f"holds what looks like a secret ({kind})"))
    if repeated_key(raw):
        problems.append(("header", "gives a key twice"))
    return Report(facts, problems, _prompts(facts))


def _start_of(path: Path) -> bytes:
    require_regular(path)
    with open(path, "rb") as file:
        return file.read(kd.MAX_LINE + 1)


class _Said(msgspec.Struct):
    left_out: dict[str, str]
    prompts_dropped: dict[str, int]
    dropped_examples: list[dict[str, str]]
    strata: dict[str, dict[str, str | int]]


def _prompts(facts: Mapping[str, Any]) -> Prompts | None:
    try:
        said = msgspec.convert(facts, _Said)
    except (msgspec.ValidationError, ValueError):
        return None
    if any(set(example) != set(Dropped._fields) for example in said.dropped_examples):
        return None
    short = {name: str(row["short"]) for name, row in said.strata.items() if "short" in row}
    return Prompts(said.left_out, said.prompts_dropped, said.dropped_examples, short)


def report_problems(
    path: Path, report: Report, header: Header, whole: Whole, rejects: Rejects
) -> Iterator[tuple[str, str]]:
    """What report.json says of the set is what the set is. Rule and problem."""
    yield from report.problems
    if not report.facts:
        return
    try:
        made = msgspec.json.decode(_JSON.encode(_facts(path, header, whole, rejects)))
    except (ValueError, OverflowError) as error:
        yield "header", f"cannot be made again: {error}"
        return
    generated = header.teacher.asked
    free = set(Prompts._fields) - {"short"} if generated else set()
    for name in sorted((set(report.facts) | set(made)) - free):
        if name == "strata" and generated:
            yield from _strata_problems(report.facts.get(name), made[name], header, rejects)
        elif name not in made and name not in _OF_RECORDS:
            yield "header", f"holds {name[:40]!r}, which no report has"
        elif name in made and (name not in report.facts or report.facts[name] != made[name]):
            yield "header", f"its {name} is not that of the set"
    if generated and report.prompts is None:
        yield "header", "does not say which prompts were left out and dropped"


def _facts(path: Path, header: Header, whole: Whole, rejects: Rejects) -> dict[str, Any]:
    """report.json, made again; what counts the prompts that were not asked is left out."""
    facts: dict[str, Any] = {"run_id": header.run_id, "counts": header.counts}
    facts["strata"] = {name: {"records": n} for name, n in whole.strata.items()}
    if whole.facts is not None:
        facts |= {name: value for name, value in whole.facts.facts().items() if name in _OF_RECORDS}
    store = kd.sidecar(path) / STORE
    stored = header.logprobs is not None and store.is_file()
    facts["distributions"] = None
    if header.logprobs is not None and stored:
        tokens = header.counts.get("completion_tokens", 0)
        facts["distributions"] = stored_facts(header.logprobs, tokens, store.stat().st_size)
    if not header.teacher.asked:
        return facts
    return facts | _costs(header, whole) | {
        "rejected": dict(sorted(rejects.reasons.items())),
        "strata": {name: {"quota": quota, "records": whole.strata[name], "rejected": rejects.of(name).total()}
                   for name, quota in header.quotas.items()},
        "unaligned_logprobs": whole.without_rows if header.logprobs else 0,
    }  # fmt: skip


def _costs(header: Header, whole: Whole) -> dict[str, Decimal | None]:
    cost, records = header.cost_usd, sum(whole.strata.values())
    each = cost_per_record(cost, records) if cost is not None and is_cost(cost) and records else None
    return {"cost_usd": cost, "cost_usd_per_record": each}


def _strata_problems(
    stated: Any, made: Mapping[str, dict[str, Any]], header: Header, rejects: Rejects
) -> Iterator[tuple[str, str]]:
    """Of a stratum that is short, whether its prompts are used up is for the rule `order` to say."""
    if not isinstance(stated, dict) or set(stated) != set(made):
        yield "header", "its strata are not those of the set"
        return
    for name, row in made.items():
        reasons = rejects.of(name)
        whys: list[dict[str, Any]] = [{}]
        if row["records"] < row["quota"]:
            whys = [{"short": why_short(row["quota"], row["records"], reasons, exhausted=exhausted)}
                    for exhausted in (True, False)]  # fmt: skip
        if stated[name] not in [row | why for why in whys]:
            yield "header", f"its stratum {name[:40]!r} is not that of the set"


def page_problems(path: Path, report: Report, header: Header, whole: Whole, *, same: bool) -> Iterator[tuple[str, str]]:
    """report.html holds no secret, and is the page of report.json and the records, where the code is the `same`."""
    if not path.is_file():
        return
    raw = _start_of(path)
    text = raw.decode(errors="replace")
    if kind := secrets.secret_in(text) or secrets.secret_in(html.unescape(text)):
        yield "secrets", f"holds what looks like a secret ({kind})"
    if not same or whole.facts is None or (header.teacher.asked and report.prompts is None):
        return
    facts = report.facts | {name: value for name, value in _costs(header, whole).items() if name in report.facts}
    if page(header, facts, whole.facts.samples).encode() != raw:
        yield "header", "is not the page of report.json and the records"
