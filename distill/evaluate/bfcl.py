"""BFCL v4, single turn, offline: the functions that a model calls on public questions, judged by category.

make bfcl-data                     the package bfcl-eval as PyPI has it, neither unpacked nor installed
distill bfcl --model M [--category simple_python ...] [--limit 20] [--report eval/reports/bfcl.json]
distill bfcl --self-check          our judgement beside BFCL's own checker, on answers of known worth
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from distill.artifacts import atomic_file, code_version, require_replaceable_file, sha256_file, write_json
from distill.errors import GO_ON, InputError, Paused, stage_main
from distill.evaluate.bfcl_answers import RIGHT
from distill.evaluate.bfcl_check import REASONS, UNEXPLAINED, Compared, Reference, compare, misjudged
from distill.evaluate.bfcl_data import CATEGORIES, OUT_OF_SCOPE, Case, Source
from distill.evaluate.bfcl_judge import Verdict, judge, wilson
from distill.evaluate.episode import Request
from distill.evaluate.results import Journal, RunHeader
from distill.evaluate.runners import BatchModel
from distill.evaluate.transcripts import ProviderFault, Transcript

DATA = Path("data/bfcl")
REPORT, CHECK_REPORT = Path("eval/reports/bfcl.json"), Path("eval/reports/bfcl_check.json")
_FAULTS_IN_A_ROW = 5
"""Then it is not the question that cannot be answered."""


def ask(cases: Sequence[Case], model: BatchModel, journal: Journal) -> dict[str, str]:
    """Ask what the journal does not hold yet. Returns why items stayed without an answer; Paused where none comes."""
    waiting = [case.item for case in cases if case.item.id not in journal.transcripts]
    faults: dict[str, str] = {}
    in_a_row = 0
    for start in range(0, len(waiting), model.together):
        items = waiting[start : start + model.together]
        replies = model.replies([Request(item, item.messages, ()) for item in items])
        for item, reply in zip(items, replies, strict=True):
            if isinstance(reply, ProviderFault):
                faults[item.id] = str(reply)
                in_a_row += 1
            else:
                in_a_row = 0
                journal.add(Transcript(item=item.id, replies=(reply,)))
        if in_a_row >= _FAULTS_IN_A_ROW:
            raise Paused(f"the model gives no answers ({replies[-1]}); {GO_ON}")
    return faults


def run(source: Source, model: BatchModel, categories: Sequence[str], report: Path, limit: int | None = None,
        restart: bool = False) -> dict[str, Any]:  # fmt: skip
    """Ask every question, judge, and write the report and, beside it as .jsonl, what was said."""
    out = report.with_suffix(".jsonl")
    for path in (report, out):
        require_replaceable_file(path)
    cases = [case for name in categories for case in source.cases(name)[:limit]]
    package = {"package": f"bfcl-eval {source.version}", "licence": "Apache-2.0"}
    if source.path.is_file():
        package["sha256"] = sha256_file(source.path)
    header = RunHeader(
        schema="bfcl-run/1", model=model.identity(), inputs=package | {"categories": list(categories)},
        files=source.sha256s, broker="none", limits={}, seed=0, items=limit,
    )  # fmt: skip
    journal = Journal(out, header, restart=restart)
    finished = False
    try:
        faults = ask(cases, model, journal)
        judged = {
            case.item.id: judge(case, journal.transcripts[case.item.id].replies[0])
            for case in cases if case.item.id in journal.transcripts
        }  # fmt: skip
        with atomic_file(out) as temporary:
            temporary.write_bytes(b"".join(_line(case, journal, judged) for case in cases if case.item.id in judged))
        found = {
            "schema": "bfcl-report/1",
            "header": msgspec.to_builtins(header) | {"code": code_version()},
            "categories": {name: _row([c for c in cases if c.category == name], judged) for name in categories},
            "failures": [{"item": name, "why": one.why} for name, one in judged.items() if not one.exact],
            "unanswered": faults,
        }
        write_json(report, found)
        finished = not faults
    finally:
        journal.close(written=finished)
    return found


def _line(case: Case, journal: Journal, judged: Mapping[str, Verdict]) -> bytes:
    row = {"item": case.item.id, "category": case.category, **judged[case.item.id]._asdict()}
    return msgspec.json.encode(row | {"transcript": journal.transcripts[case.item.id]}) + b"\n"


def _row(cases: Sequence[Case], judged: Mapping[str, Verdict]) -> dict[str, Any]:
    """Counts and rates of a category, by both matchings."""
    verdicts = [judged[case.item.id] for case in cases if case.item.id in judged]
    row: dict[str, Any] = {"n": len(verdicts), "unanswered": len(cases) - len(verdicts)}
    for name in ("exact", "bfcl"):
        hits = sum(getattr(one, name) for one in verdicts)
        value = hits / len(verdicts) if verdicts else None
        row[name] = {"right": hits, "value": value, "ci95": list(wilson(hits, len(verdicts)))}
    return row


def self_check(source: Source, categories: Sequence[str], limit: int | None, seed: int = 0) -> dict[str, Any]:
    """Judge answers of known worth beside BFCL's own checker, and count where the two part, and why."""
    rows: dict[str, Counter[str]] = {name: Counter() for name in categories if CATEGORIES[name][1] == "calls"}
    disagreements: dict[tuple[str, str, str], list[str]] = {}
    wrong: list[dict[str, str]] = []
    with Reference(source.path) as reference:
        for name, row in rows.items():
            cases = source.cases(name)[:limit]
            row["items"] = len(cases)
            for one in compare(cases, reference, seed):
                _count(one, row)
                if misjudged(one):
                    wrong.append({"item": one.case.item.id, "kind": one.kind})
                for matching in ("exact", "bfcl"):
                    if getattr(one.ours, matching) != one.theirs:
                        disagreements.setdefault((matching, one.reason, one.kind), []).append(one.case.item.id)
    return {
        "schema": "bfcl-self-check/1",
        "header": {"package": f"bfcl-eval {source.version}", "files": source.sha256s, "seed": seed,
                   "items": limit, "code": code_version()},
        "categories": {name: dict(row) for name, row in rows.items()},
        "misjudged": wrong,
        "disagreements": [
            {"matching": matching, "reason": reason, "answers": kind, "count": len(ids), "items": len(set(ids)),
             "example": ids[0]}
            for (matching, reason, kind), ids in sorted(disagreements.items())
        ],
    }  # fmt: skip


def _count(one: Compared, row: Counter[str]) -> None:
    side = "right" if one.kind in RIGHT else "faults"
    row[side] += 1
    row[f"{side}, accepted by us"] += one.ours.exact
    row[f"{side}, accepted by us as BFCL compares"] += one.ours.bfcl
    row[f"{side}, accepted by BFCL"] += one.theirs


def sound(found: Mapping[str, Any]) -> bool:
    """Whether a self-check judged every answer as it was made, and can explain where BFCL does not."""
    return not found["misjudged"] and all(one["reason"] != UNEXPLAINED for one in found["disagreements"])


def table(found: Mapping[str, Any]) -> str:
    """A report's categories as text."""
    lines = [f"{'category':24s} {'n':>5s}  {'exact':>6s}  95% interval    {'as BFCL':>7s}  95% interval"]
    for name, row in found["categories"].items():
        parts = [f"{name:24s} {row['n']:5d}"]
        for matching, width in (("exact", 6), ("bfcl", 7)):
            one = row[matching]
            value = "-" if one["value"] is None else f"{one['value']:.3f}"
            parts.append(f"{value:>{width}s}  [{one['ci95'][0]:.3f}, {one['ci95'][1]:.3f}]")
        lines.append("  ".join(parts))
    return "\n".join(lines)


def check_table(found: Mapping[str, Any]) -> str:
    """A self-check as text."""
    lines = [f"{'category':24s} items   right, by us, by BFCL  faults, by us, by BFCL"]
    for name, row in found["categories"].items():
        counts = [row.get(f"{side}{what}", 0) for side in ("right", "faults")
                  for what in ("", ", accepted by us", ", accepted by BFCL")]  # fmt: skip
        lines.append("{:24s} {:5d}  {:6d} {:6d} {:7d}  {:6d} {:6d} {:7d}".format(name, row["items"], *counts))
    lines += [
        f"{one['matching']}: {one['count']} {one['answers']!r} in {one['items']} items, as {one['example']}: "
        f"{REASONS.get(one['reason'], one['reason'])}"
        for one in found["disagreements"]
    ]
    return "\n".join(lines + [f"misjudged by us: {one['kind']!r} of {one['item']}" for one in found["misjudged"]])


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Parse, ask or check, print the table."""
    parser = argparse.ArgumentParser(prog="distill bfcl", description=(__doc__ or "").splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="checkpoint, Hugging Face folder, .mlpackage, or http(s)://host/v1")
    what.add_argument("--self-check", action="store_true", help="our judgement beside BFCL's own checker")
    parser.add_argument("--category", nargs="+", default=list(CATEGORIES), metavar="NAME", help="default: all of them")
    parser.add_argument("--data", type=Path, default=DATA, help=f"wheel or folder of bfcl-eval (default: {DATA})")
    parser.add_argument("--report", type=Path, help=f"default: {REPORT}, or {CHECK_REPORT}")
    parser.add_argument("--limit", type=int, help="the first so many of each category")
    parser.add_argument("--restart", action="store_true", help="ask anew what an unfinished run has asked")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="of a reply (default: 512)")
    parser.add_argument("--constrained", action="store_true", help="decode calls within the schemas (extra `evaluate`)")
    parser.add_argument("--formats", help="weights as deployed in this format: int8, or blocks=int4/32,embedding=int8")
    parser.add_argument("--backend", choices=["executor", "coreml"], default="executor", help="what runs a package")
    parser.add_argument("--model-id", default="", help="an endpoint's model (default: the only one that it lists)")
    args = parser.parse_args(argv)
    _require_known(args.category)
    if args.limit is not None and args.limit < 1:
        raise InputError("--limit: at least 1")
    source = Source(args.data)
    args.report = args.report or (CHECK_REPORT if args.self_check else REPORT)
    if args.self_check:
        found = self_check(source, args.category, args.limit)
        write_json(args.report, found)
        print(check_table(found))
        print(f"bfcl: self-check {'pass' if sound(found) else 'FAIL'}; report: {args.report}")
        return 0 if sound(found) else 1
    from distill.evaluate.runners import Settings, open_model

    try:
        settings = Settings(max_new_tokens=args.max_new_tokens, constrained=args.constrained, formats=args.formats,
                            backend=args.backend, model_id=args.model_id)  # fmt: skip
    except ValueError as error:
        raise InputError(str(error)) from error
    report = run(source, open_model(args.model, settings), args.category, args.report, args.limit, args.restart)
    print(table(report))
    unanswered = len(report["unanswered"])
    print(f"bfcl: {sum(row['n'] for row in report['categories'].values())} judged, {unanswered} unanswered; "
          f"report: {args.report}")  # fmt: skip
    return 3 if unanswered else 0


def _require_known(categories: Iterable[str]) -> None:
    for name in categories:
        if name not in CATEGORIES:
            reason = f": {OUT_OF_SCOPE[name]}" if name in OUT_OF_SCOPE else ""
            raise InputError(f"--category {name}: not judged here{reason}; there are {', '.join(CATEGORIES)}")


if __name__ == "__main__":
    raise SystemExit(main())
