"""Our judgement of calls beside that of BFCL's own checker: on right answers, and on the same with a fault."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from distill.chat import ToolCall
from distill.errors import DistillError
from distill.evaluate import bfcl_reference
from distill.evaluate.bfcl_answers import RECASED, REPUNCTUATED, RIGHT, Calls, answers, reply_of, written
from distill.evaluate.bfcl_data import TEXTS, Case
from distill.evaluate.bfcl_judge import Verdict, judge

REASONS = {
    "undeclared": "the answer has an argument that the function's document lacks: BFCL refuses every call",
    "not a list": "a field's possible answers are a bare text: BFCL takes its letters for the answers, and refuses all",
    "required": "the answer allows to leave out what the function's document requires: BFCL refuses to",
    "quotes": "BFCL keeps the quotes of texts in Java lists, and never finds the text",
    "inside": "BFCL looks for a Java map anywhere in the text, and takes one inside a list for the map itself",
    "greedy": "of calls that fit several gold calls BFCL takes the first that fits, and accepts another order",
    "number": "JSON has one type of numbers: 5.0 is 5; BFCL refuses it where an integer is declared",
    "leniency": "BFCL compares texts without case, spaces and some punctuation: our own matching does not",
    "other type": "BFCL compares texts exactly where another type is declared: its leniency, as we apply it, does not",
}
"""Why the two may disagree."""
UNEXPLAINED = "unexplained"


class Compared(NamedTuple):
    """One answer, judged twice."""

    case: Case
    kind: str
    calls: Calls
    ours: Verdict
    theirs: bool
    reason: str
    """Of REASONS, why either of our verdicts is not theirs; empty where both are."""


class Reference:
    """BFCL's own checker, in a process of its own: `with Reference(wheel_or_folder) as reference:`."""

    def __init__(self, package: Path) -> None:
        self._package = package

    def __enter__(self) -> Reference:
        command = [sys.executable, "-I", bfcl_reference.__file__, str(self._package)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.__exit__(kind, error, at)

    def check(self, case: Case, calls: Calls) -> bool:
        """Whether the checker takes the calls. DistillError where it has ended."""
        asked = {
            "functions": case.functions, "gold": case.gold, "language": case.language, "category": case.category,
            "calls": [{one.name: written(case, one)} for one in calls],
        }  # fmt: skip
        assert self._process.stdin and self._process.stdout
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
            return bool(json.loads(self._process.stdout.readline())["valid"])
        except (OSError, ValueError) as error:
            raise DistillError(f"{self._package}: BFCL's own checker ended: see its error above") from error


def compare(cases: Iterable[Case], reference: Reference, seed: int = 0) -> Iterator[Compared]:
    """Every right answer and every fault of the cases that want calls, judged by both."""
    for case in cases:
        if case.expects == "calls":
            for kind, calls in answers(case, seed):
                theirs = reference.check(case, calls)
                ours = judge(case, reply_of(case, calls))
                reason = "" if ours.exact == ours.bfcl == theirs else _reason(case, kind, calls, ours, reference)
                yield Compared(case, kind, calls, ours, theirs, reason)


def misjudged(one: Compared) -> bool:
    """Whether our own verdict is wrong: these answers were made right, or with a fault."""
    return one.ours.exact != (one.kind in RIGHT)


def _reason(case: Case, kind: str, calls: Calls, ours: Verdict, reference: Reference) -> str:
    """Each is looked for in the question and the calls, not in what the checker says."""
    if ours.bfcl and not ours.exact and reference.check(case, calls):
        return "leniency" if kind in (RECASED, REPUNCTUATED) else UNEXPLAINED
    if not ours.bfcl:  # theirs accepts a fault
        return "inside" if any(_map_inside(case, call) for call in calls) else UNEXPLAINED
    documents = {one["name"]: one["parameters"] for one in case.functions}
    golds = [(documents[name], arguments) for one in case.gold for name, arguments in one.items()]
    if any(not arguments.keys() <= document["properties"].keys() for document, arguments in golds):
        return "undeclared"
    fields = [choice for _, arguments in golds for choices in arguments.values() for choice in choices]
    if any(not isinstance(one, list) for choice in fields if isinstance(choice, dict) for one in choice.values()):
        return "not a list"
    required = {tool["name"]: tool["parameters"].get("required", ()) for tool in case.item.tools}
    if any(not set(required[call.name]) <= call.arguments.keys() for call in calls):
        return "required"
    if case.language == "java" and any(_quoted_texts(case, call) for call in calls):
        return "quotes"
    if kind == "5.0 for 5":
        return "number"
    if kind in (RECASED, REPUNCTUATED) and _other_type(case, calls):
        return "other type"
    return "greedy" if len(calls) > 1 and reference.check(case, calls[::-1]) else UNEXPLAINED


def _quoted_texts(case: Case, call: ToolCall) -> bool:
    return any(
        isinstance(value, list)
        and any(isinstance(one, str) for one in value)
        and case.types[call.name][key] != ("ArrayList", "String")
        for key, value in call.arguments.items()
    )


def _map_inside(case: Case, call: ToolCall) -> bool:
    types = case.types.get(call.name, {})
    return case.language == "java" and any(
        isinstance(value, list) and types.get(key, ("", ""))[0] == "HashMap" for key, value in call.arguments.items()
    )


def _other_type(case: Case, calls: Calls) -> bool:
    """Whether the argument that was changed is declared to be no text."""
    for call, gold in zip(calls, case.item.calls):
        for key, value in call.arguments.items():
            if value not in (gold.arguments[key].enum or ()):
                return case.types[call.name].get(key, ("any", ""))[0] not in TEXTS
    return False
