"""Greedy decoding through a package, against PyTorch's tokens and against the tool calls that were asked for."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from distill import chat, gates
from distill.chat import ToolCall
from distill.errors import PackageError
from distill.gates import Gate
from distill.tools import call_f1
from distill.verify.runner import PackageRunner

MAX_TIES = 0.1
"""Share of steps that may be ties: with more, agreement says little."""


class _Greedy(msgspec.Struct, frozen=True):
    tokens: list[int]
    margins: list[float]
    tolerance: list[float]


class _Item(msgspec.Struct, frozen=True):
    id: str
    prompt_ids: list[int]
    max_new_tokens: int
    gold_calls: list[ToolCall] | None
    gold_text: str | None
    greedy: _Greedy


class _Evaluation(msgspec.Struct, frozen=True):
    schema: str
    items: list[_Item]
    too_long: int = 0


class Decoded(NamedTuple):
    """One prompt, answered by the package."""

    item: _Item
    text: str
    tokens: list[int]
    """Freely generated, the stop token not among them."""
    mismatches: list[int]
    """Steps at which, fed PyTorch's own tokens, the package prefers another one."""
    ties: list[int]
    """Those of them that lie within the derived fp16 error of a tie."""


def decode_all(runner: PackageRunner, evaluation: Any, largest_tolerance: float) -> list[Decoded]:
    """Generate for every evaluation item and compare step by step with PyTorch's tokens.

    Fed PyTorch's own tokens, a package that prefers the same token at every step generates exactly them; where it
    prefers another, PyTorch's margin decides whether that is a tie. A derived error beyond `largest_tolerance`, or
    an answer that breaks off, is no reference: PackageError.
    """
    try:
        parsed = msgspec.convert(evaluation, _Evaluation)
    except msgspec.ValidationError as error:
        raise PackageError(f"{runner.sidecar('evaluation')}: {error}") from error
    tokenizer = runner.tokenizer()
    out = []
    for item in parsed.items:
        reference = item.greedy
        if wrong := _wrong_reference(item, tokenizer.stop_ids, largest_tolerance):
            raise PackageError(f"{runner.sidecar('evaluation')}: item {item.id}: {wrong}")
        fed = item.prompt_ids + reference.tokens[:-1]
        chosen = runner.logits(fed)[len(item.prompt_ids) - 1 :].argmax(-1).tolist()
        mismatches = [i for i, (a, b) in enumerate(zip(chosen, reference.tokens, strict=True)) if a != b]
        ties = [i for i in mismatches if reference.margins[i] < reference.tolerance[i]]
        if item.gold_calls is None and not mismatches:
            # greedy decoding is a function of the tokens before: it would repeat these very steps
            tokens = [token for token in reference.tokens if token not in tokenizer.stop_ids]
        else:
            tokens = list(runner.generate(item.prompt_ids, item.max_new_tokens, tokenizer.stop_ids))
        out.append(Decoded(item, tokenizer.decode(tokens), tokens, mismatches, ties))
    return out


def _wrong_reference(item: _Item, stop_ids: set[int], largest_tolerance: float) -> str | None:
    tokens, margins, tolerance = item.greedy.tokens, item.greedy.margins, item.greedy.tolerance
    if not 0 < len(tokens) == len(margins) == len(tolerance):
        return "greedy lists empty or of unequal length"
    if tokens[-1] not in stop_ids and len(tokens) < item.max_new_tokens:
        return "the greedy answer breaks off before its end"
    if not all(0 < value <= largest_tolerance for value in tolerance):
        return f"a derived error is not between 0 and {largest_tolerance:.3g}"
    return None


def greedy_gate(results: list[Decoded]) -> tuple[Gate, dict[str, Any]]:
    """Pass iff every step's token is PyTorch's, but for ties within the derived error, which are reported."""
    steps = sum(len(r.item.greedy.tokens) for r in results)
    differing = [(r.item.id, i) for r in results for i in r.mismatches if i not in r.ties]
    ties = [(r.item.id, i) for r in results for i in r.ties]
    detail = {"prompts": len(results), "steps": steps, "differing": differing, "ties": ties}
    if not results:
        return gates.skipped("the export has no evaluation prompts"), detail
    reason = f"{steps} steps over {len(results)} prompts, {len(ties)} ties within the derived error"
    if differing:
        reason += f"; first at prompt {differing[0][0]}, step {differing[0][1]}"
    if not differing and len(ties) > MAX_TIES * steps:
        return Gate("inconclusive", len(ties), int(MAX_TIES * steps), "distill.mil ieee16", reason), detail
    return gates.at_most(len(differing), 0, backend="distill.mil ieee16", reason=reason), detail


def f1_gate(results: list[Decoded], threshold: float) -> tuple[Gate, dict[str, Any]]:
    """Micro-F1 over calls in the generated text: whole calls, equal in name and arguments; no partial credit."""
    judged = [r for r in results if r.item.gold_calls is not None]
    if not any(r.item.gold_calls for r in judged):
        return gates.skipped("the evaluation prompts ask for no tool calls"), {"prompts": len(judged)}
    parsed = [chat.parse(r.text) for r in judged]
    score = call_f1((p.calls, r.item.gold_calls or [], len(p.malformed)) for p, r in zip(parsed, judged, strict=True))
    wrong = [
        {"id": r.item.id, "text": r.text}
        for p, r in zip(parsed, judged, strict=True)
        if call_f1([(p.calls, r.item.gold_calls or [], len(p.malformed))]).value < 1 and (r.item.gold_calls or p.calls)
    ]
    detail = {"prompts": len(judged), **score._asdict(), "f1": score.value, "wrong": wrong}
    gate = gates.at_least(
        score.value,
        threshold,
        n=len(judged),
        n_min=10,
        backend="distill.mil ieee16",
        reason=f"{score.true_positive} right, {score.false_positive} wrong, "
        f"{score.false_negative} missing calls over {len(judged)} prompts",
    )
    return gate, detail
