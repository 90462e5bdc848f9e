"""`python -m scripts.validate_kd_data --in F`: every rule that a dataset must keep, over its records in a stream.

The rules are in distill/data/rules/: of one record in record.py, of the whole in whole.py, of the files in files.py;
how records are read, in block.py. Exit 0: all hold; 1: findings; 2: not a dataset (no header, broken JSON). Secrets and
personal data are never echoed.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from distill.artifacts import code_version, require_regular, sha256_file, write_json
from distill.data import records as kd
from distill.data.rules import files as rules_files
from distill.data.rules.answers import heard_problems, journal_problems
from distill.data.rules.block import BLOCK, MAX_FINDINGS, Checker, Done, Options, stream, withheld
from distill.data.rules.header import header_problems, total_problems
from distill.data.rules.order import Unknown, order_problems
from distill.data.rules.record import RULES
from distill.data.rules.report import PAGE, REPORT, page_problems, read_report, report_problems
from distill.data.rules.report import Report as Stated
from distill.data.rules.secrets import secret_in
from distill.data.rules.view import repeated_key, strings
from distill.data.rules.whole import Whole
from distill.errors import InputError, stage_main
from distill.gates import Gate, exit_code, holds, skipped, summary, table, to_json

TABLE: dict[str, str] = {
    "files": "every file listed is one of a dataset's and there, under its sha256",
    "header": "the header is complete; what is made again is equal, in report.json and report.html too",
    "schema": "every line is a record that gives no key twice",
    "run_id": "records are of the header's run",
    "ids": "ids are unique, none is also a reject's, and each is the hash of what was asked",
    "split": "the split is what the id gives",
    "roles": "turns follow legally, none is empty; tool results answer the open calls in order",
    "calls": "calls are values, none is written in a text; there are some where expected",
    "offered": "called tools are offered, arguments fit their JSON schema",
    "spans": "targets are the rendered text's, in characters, bytes and tokens",
    "loss": "only the teacher's words are learned",
    "distributions": "the store is sound; rows fit their tokens, in order; an endpoint's are the journal's",
    "bytes": "no lost bytes; carriage returns are flagged",
    "secrets": "no keys, tokens or passwords, in the files beside it either",
    "personal_data": "personal data, by the policy of --pii",
    "duplicates": "no conversation twice",
    "near_duplicates": "no prompt, or one 0.8 alike (MinHash), in both splits",
    "contamination": "no 13 words (8 of short texts) of an evaluation set",
    "quotas": "each stratum has its quota, and there is no other",
    "provenance": "hashes of requests, answers and tool results; those made again are equal",
    "journal": "each record is what the journal's answers make of its prompt",
    "order": "records and rejects stand in the order of the mix's prompts; none that was asked is missing",
    "costs": "costs are those of usage and prices; they sum to the header's, which the ledger has paid",
    "finish": "turns end for an allowed reason",
    "rejects": "every reject has an id of its own and a known reason",
    "outliers": "unusual lengths and scripts, reported only",
    "render": "rendering again gives the stated text",
    "licence": "reasoning is learned only where that is allowed",
    "leak": "no markup of another template in the teacher's words",
}
"""Every rule, in the order of the report."""
HEADER = "header.json"
_ALWAYS_REPORTED = {"outliers"}


class Finding(NamedTuple):
    """A rule broken at a place."""

    rule: str
    place: str
    what: str


class Report(NamedTuple):
    """A gate for each rule, what was found, and how many records there are."""

    gates: dict[str, Gate]
    findings: list[Finding]
    counts: dict[str, int]


def validate(path: str | Path, options: Options | None = None) -> Report:
    """All rules over a dataset."""
    path, options = Path(path), options or Options()
    if not path.is_file():
        require_regular(path)
        raise kd.absent(path)
    header = kd.read_header(path)
    options = options._replace(eval_sets=(*options.eval_sets, *_named_sets(header, options.eval_sets)))
    checker = Checker(path, header, options)
    notes = _Notes()
    for rule, place, what in checker.problems:
        notes.add(rule, place, what)
    whole, digest = Whole(header), hashlib.sha256()
    line = 0
    for done in stream(path, header, options, checker, digest):
        notes.take(done, path.name, line)
        done.tally.shift(line)
        for clash in whole.add(done.tally):
            notes.add(clash.rule, f"{path.name}:{clash.line}", clash.what)
        line += done.lines
    _finish(path, header, checker, whole, notes, digest.hexdigest())
    notes.unknown |= _without_journal(path, header)
    return Report(_gates(header, options, notes), notes.found, whole.counts)


def _without_journal(path: Path, header: kd.Header) -> dict[str, str]:
    """Rules that need the journal, and why there is none."""
    if not header.teacher.asked:
        absent = f"a {header.teacher.kind} set: nothing was asked"
    elif not (kd.sidecar(path) / rules_files.LEDGER).exists():
        absent = f"{rules_files.LEDGER} is not beside the dataset"
    else:
        return {}
    return {"journal": absent} | ({} if header.cost_usd is None else {"costs": absent})


def _named_sets(header: kd.Header, given: tuple[Path, ...]) -> Iterator[Path]:
    """Evaluation sets that the configuration names, where they are still what they were."""
    named = header.config.get("decontaminate")
    for name in named if isinstance(named, list) else ():
        path = Path(str(name))
        if path not in given and path.is_file() and sha256_file(path) in header.decontamination.values():
            yield path


def _changed_sets(header: kd.Header) -> Iterator[str]:
    """Evaluation sets that the configuration names, where they are something else now."""
    named = header.config.get("decontaminate")
    for name in named if isinstance(named, list) else ():
        path = Path(str(name))
        if path.is_file() and sha256_file(path) not in header.decontamination.values():
            yield path.name


class _Notes:
    """What was found, and how often each rule was broken."""

    def __init__(self) -> None:
        self.found: list[Finding] = []
        self.broken: Counter[str] = Counter()
        self.first: dict[str, Finding] = {}
        self.unknown: dict[str, str] = {}
        """Rules that could not be checked, and why."""

    def add(self, rule: str, place: str, what: str, *, count: int = 1) -> None:
        self.broken[rule] += count
        if len(self.found) >= MAX_FINDINGS and rule in self.first:
            return
        finding = Finding(rule, place, withheld(what))
        self.first.setdefault(rule, finding)
        if len(self.found) < MAX_FINDINGS:
            self.found.append(finding)

    def take(self, done: Done, name: str, before: int) -> None:
        """A block's findings; `before` lines stand before it."""
        for rule, line, what in done.found:
            self.add(rule, f"{name}:{before + line}", what, count=0)
        self.broken += done.broken


def _finish(path: Path, header: kd.Header, checker: Checker, whole: Whole, notes: _Notes, digest: str) -> None:
    """The rules that need the whole file."""
    for clash in (*whole.finish(), *whole.outliers()):
        notes.add(clash.rule, f"{path.name}:{clash.line}", clash.what)
    _header_problems(path, header, checker, notes)
    for what in rules_files.file_problems(path, header, digest):
        notes.add("files", HEADER, what)
    rejects = rules_files.read_rejects(kd.sidecar(path) / rules_files.REJECTED, header)
    report = read_report(kd.sidecar(path) / REPORT)
    for rule, line, what in rejects.problems:
        notes.add(rule, f"{rules_files.REJECTED}:{line}", what)
    if checker.store is not None:
        for what in rules_files.store_problems(checker.store, header):
            notes.add("distributions", rules_files.STORE, what)
    if checker.context.evaluation is not None:
        for name, sha256 in checker.context.evaluation.sha256s.items():
            if header.decontamination.get(name, sha256) != sha256:
                notes.add("contamination", name, "is not the evaluation set that the header names: other bytes")
    for name in _changed_sets(header) if checker.deep else ():
        notes.add("contamination", name, "is not the evaluation set that the header names: other bytes")
    if not notes.broken["schema"]:  # a record that cannot be read cannot be counted
        _totals(path, header, checker, whole, rejects, report, notes)
    _order(header, checker, whole, rejects, report, notes, path.name)
    same = header.created_by.get("code") == code_version() and not notes.broken.keys() - _ALWAYS_REPORTED
    for rule, what in page_problems(kd.sidecar(path) / PAGE, report, header, whole, same=same):
        notes.add(rule, PAGE, what)


def _header_problems(path: Path, header: kd.Header, checker: Checker, notes: _Notes) -> None:
    """What header.json says by itself."""
    for what in header_problems(header, checker.context.tokenizer):
        notes.add("header", HEADER, what)
    raw = (kd.sidecar(path) / HEADER).read_bytes().decode(errors="replace")
    if repeated_key(raw.encode()):
        notes.add("header", HEADER, "gives a key twice")
    if kind := secret_in(raw) or secret_in("\n".join(strings(msgspec.to_builtins(header)))):
        notes.add("secrets", HEADER, f"holds what looks like a secret ({kind})")
    if checker.answers is not None:
        for what in journal_problems(header, checker.answers):
            notes.add("journal", HEADER, what)


def _totals(
    path: Path, header: kd.Header, checker: Checker, whole: Whole, rejects: rules_files.Rejects, report: Stated,
    notes: _Notes,
) -> None:  # fmt: skip
    """What the files beside the records say of them all."""
    deep = checker.deep
    for clash in whole.among({reject.id for reject in rejects.rows}):
        notes.add(clash.rule, f"{path.name}:{clash.line}", clash.what)
    for what in whole.quota_problems():
        notes.add("quotas", HEADER, what)
    for what in rules_files.cost_problems(path, header, whole.cost, rejects.cost):
        notes.add("costs", HEADER, what)
    for what in total_problems(header, whole, rejects.lines, deep=deep):
        notes.add("header", HEADER, what)
    for rule, what in report_problems(path, report, header, whole, rejects):
        notes.add(rule, REPORT, what)
    for what in whole.unused(len(checker.store)) if checker.store is not None else ():
        notes.add("distributions", rules_files.STORE, what)
    if checker.answers is not None and not notes.broken["journal"] and not notes.broken["ids"]:
        for what in heard_problems(header, whole):
            notes.add("journal", HEADER, what)


def _order(
    header: kd.Header, checker: Checker, whole: Whole, rejects: rules_files.Rejects, report: Stated, notes: _Notes,
    name: str,
) -> None:  # fmt: skip
    """The order of the prompts, where they can be made again."""
    if not checker.deep:
        return
    try:
        for found in order_problems(header, whole, rejects.rows, checker.answers, report.prompts):
            notes.add("order", f"{name}:{found.line}" if found.line else HEADER, found.what)
    except Unknown as error:
        notes.unknown["order"] = str(error)
    except InputError as error:
        notes.add("journal", rules_files.LEDGER, str(error))


def _gates(header: kd.Header, options: Options, notes: _Notes) -> dict[str, Gate]:
    skips = _skips(header, options) | notes.unknown
    gates: dict[str, Gate] = {}
    for rule in TABLE:
        n, first = notes.broken[rule], notes.first.get(rule)
        reason = f"{first.place}: {first.what}" if first else None
        if rule in skips and not n:
            gates[rule] = skipped(skips[rule])
        elif rule in _ALWAYS_REPORTED or (rule == "personal_data" and options.pii == "report"):
            gates[rule] = holds(True, observed=n, reason=reason and f"reported only; {reason}")
        else:
            gates[rule] = holds(not n, observed=n, threshold=0, reason=reason)
    return gates


def _skips(header: kd.Header, options: Options) -> dict[str, str]:
    """Rules that this run cannot check, and why."""
    skips: dict[str, str] = {}
    if header.logprobs is None:
        skips["distributions"] = "a text-only dataset"
    if not header.quotas:
        skips["quotas"] = "the header has none"
    if header.cost_usd is None:
        skips["costs"] = "no prices are known"
    if not isinstance(header.config.get("val_share"), (int, float)):
        skips["split"] = "the header names no val_share"
    given = {path.name for path in options.eval_sets} | {str(path) for path in options.eval_sets}
    missing = sorted(set(header.decontamination) - given)
    if not options.eval_sets or missing:
        skips["contamination"] = f"give --eval-set {' '.join(missing) or 'FILE...'}"
    if options.pii == "allow":
        skips["personal_data"] = "--pii allow"
    if options.rules == "structural":
        unseen = [name for name, rule in RULES.items() if not rule.structural]
        skips |= dict.fromkeys([*unseen, "order"], "--rules structural")
    return skips


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Check a KD dataset; print a table and write validation.json beside it."""
    parser = argparse.ArgumentParser(prog="distill validate-kd", description="Check every rule of a KD dataset.")
    parser.add_argument("--in", dest="path", required=True, type=Path, help="the dataset, F.jsonl")
    parser.add_argument("--report", type=Path, help="where to write the report (default: F.jsonl.d/validation.json)")
    parser.add_argument("--rules", choices=("structural", "all"), default="all", help="structural: the quick ones only")
    parser.add_argument("--pii", choices=("allow", "report", "refuse"), default="report",
                        help="personal data: not looked for, reported, or an error")  # fmt: skip
    parser.add_argument("--eval-set", nargs="+", type=Path, default=[], metavar="FILE", help="must not be in it")
    parser.add_argument("--jobs", type=int, help="processes (default: one a core, for what is worth it)")
    args = parser.parse_args(argv)
    size = args.path.stat().st_size if args.path.is_file() else 0
    jobs = args.jobs or min(os.cpu_count() or 1, 1 + size // (8 * BLOCK))
    options = Options(args.rules, args.pii, tuple(args.eval_set), jobs)
    begin = time.perf_counter()
    try:
        gates, found, counts = validate(args.path, options)
    except InputError as error:
        raise type(error)(withheld(str(error))) from None
    seconds = time.perf_counter() - begin
    print(table(gates))
    print(f"{args.path}: {counts['records']} records ({counts['train']} train, {counts['val']} val); {summary(gates)}; "
          f"{size / 1e6 / seconds:.1f} MB/s with {jobs} process{'es' * (jobs > 1)}")  # fmt: skip
    write_json(args.report or kd.sidecar(args.path) / "validation.json", {
        "dataset": str(args.path), "rules": args.rules, "counts": counts, "gates": to_json(gates),
        "findings": [finding._asdict() for finding in found],
    })  # fmt: skip
    return exit_code(gates)
