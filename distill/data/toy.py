"""Toy datasets with a real teacher: `python -m data.make_toy_kd --out F --n 128 [--kind tools|8-ball]`.

The teacher is a weighted list of answers for each prompt, read as a next-token distribution: a trie over their
tokens, mixed with a little uniform noise over the whole vocabulary so that the tail is real. What it would say
most often is its text; its distributions are stored like any other teacher's.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distill import chat
from distill.artifacts import sha256_text
from distill.data import records as kd
from distill.data.schema import Call, Turn
from distill.data.store.distributions import Distribution, capture
from distill.data.targets import lay_out
from distill.data.toy_material import ANSWERS, INTENTS, LEADS, OPENINGS, TIMES, TOOLS, TOPICS, TRAILS
from distill.errors import InputError, stage_main
from distill.tokenizer import TURN_END, Tokenizer, toy_tokenizer

KINDS = ("tools", "8-ball")
TOP_K = 24
FAVOURITE = 0.9
"""The teacher's weight on the answer it favours; the rest share what remains."""
NOISE = 0.01
"""Probability that the teacher spreads evenly over the whole vocabulary."""
_HELD_OUT = 5  # one prompt in five is never in a training set, whatever its size and seed


class Sample(NamedTuple):
    """A prompt of a toy set: its messages, the tools offered, and the index of the right answer."""

    prompt: str
    answer: int
    tools: list[dict[str, Any]]


class ToySet(NamedTuple):
    """A toy set before it is written."""

    records: list[kd.Record]
    distributions: list[Distribution]
    header: kd.Header


def build(kind: str = "tools", n: int = 128, seed: int = 0) -> ToySet:
    """`n` samples of a toy set, the same for the same arguments. InputError if there are not so many."""
    tokenizer = toy_tokenizer()
    samples = _pick(kind, n, seed, held_out=False)
    turns = _answers(kind)
    paths = [tokenizer.encode(kd.turn_text(turn) + TURN_END) for turn in turns]
    made = [_record(kind, sample, turns) for sample in samples]
    distributions = [_teach(paths, sample.answer, tokenizer) for sample in samples]
    return ToySet(made, distributions, header_of(kind, n, seed, sha256_text("\n".join(record.id for record in made))))


def header_of(kind: str, n: int, seed: int, prompts_sha256: str = "") -> kd.Header:
    """The header of such a set before it is written."""
    return kd.make_header(
        config={"kind": kind, "n": n, "seed": seed},
        sampling={"decoding": "argmax", "favourite": FAVOURITE, "noise": NOISE},
        teacher=kd.Teacher("toy", f"toy-{kind}", text_engine="answer trie", logits_engine="answer trie"),
        prompts_sha256=prompts_sha256,
        tokenizer=toy_tokenizer(),
        logprobs=kd.LogprobInfo(k=TOP_K, temperature=1.0, kind="raw", tail="logsumexp", codec="exact"),
    )


def write(path: str | Path, kind: str = "tools", n: int = 128, seed: int = 0) -> kd.Header:
    """Write a toy set at `path`; returns its header."""
    made = build(kind, n, seed)
    return kd.write_dataset(
        path, made.records, made.header, distributions=made.distributions, tokenizer=toy_tokenizer()
    )


def held_out(n: int = 48, seed: int = 0, kind: str = "tools") -> list[kd.Record]:
    """Records whose prompts are in no training set of `kind`; the right calls are in their last turn."""
    turns = _answers(kind)
    return [_record(kind, sample, turns) for sample in _pick(kind, n, seed, held_out=True)]


def held_out_questions(n: int = 50, seed: int = 0) -> list[str]:
    """Questions for the 8-ball that are in none of its training sets."""
    return [sample.prompt for sample in _pick("8-ball", n, seed, held_out=True)]


def _answers(kind: str) -> list[Turn]:
    return [_turn(answer) for answer in (ANSWERS if kind == "8-ball" else [intent.answer for intent in INTENTS])]


def _turn(answer: str | chat.ToolCall) -> Turn:
    if isinstance(answer, str):
        return Turn("assistant", answer, origin="teacher", finish_reason="stop")
    call = Call(answer.name, answer.arguments, "call_0")
    return Turn("assistant", tool_calls=(call,), origin="teacher", finish_reason="tool_calls")


def _universe(kind: str) -> Iterable[tuple[str, int]]:
    """Every prompt with the index of its answer."""
    if kind == "8-ball":
        for answer, clauses in enumerate(TOPICS):
            for clause, opening, time in itertools.product(clauses, OPENINGS, TIMES):
                yield f"{opening} {clause} {time}".strip() + "?", answer
    elif kind == "tools":
        for answer, intent in enumerate(INTENTS):
            for words, lead, trail in itertools.product(itertools.permutations(intent.words), LEADS, TRAILS):
                text = f"{lead}{' '.join(words)}{trail}."
                yield text[0].upper() + text[1:], answer
    else:
        raise InputError(f"--kind {kind!r} is not one of {', '.join(KINDS)}")


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def _pick(kind: str, n: int, seed: int, *, held_out: bool) -> list[Sample]:
    """`n` prompts in a shuffled order that gives every answer its turn."""
    by_answer: dict[int, list[tuple[int, str]]] = {}
    for prompt, answer in _universe(kind):
        if (_hash(f"held-out\n{prompt}") % _HELD_OUT == 0) == held_out:
            by_answer.setdefault(answer, []).append((_hash(f"{seed}\n{prompt}"), prompt))
    limit = sum(len(found) for found in by_answer.values())
    if not 1 <= n <= limit:
        raise InputError(f"--n {n}: the {kind} set can give 1 to {limit} different samples")
    queues = {answer: sorted(found, reverse=True) for answer, found in by_answer.items()}
    out: list[Sample] = []
    turn = 0
    while len(out) < n:
        for answer in sorted(queues, key=lambda a: _hash(f"{seed}/{turn}/{a}")):
            if queues[answer] and len(out) < n:
                prompt = queues[answer].pop()[1]
                out.append(Sample(prompt, answer, _offer(kind, prompt, answer)))
        turn += 1
    return out


def _offer(kind: str, prompt: str, answer: int) -> list[dict[str, Any]]:
    """The right tool and one other, in either order; for a plain answer, two that tempt."""
    if kind != "tools":
        return []
    gold = INTENTS[answer].answer
    names = sorted(TOOLS, key=lambda name: _hash(f"offer\n{prompt}\n{name}"))
    if not isinstance(gold, str):
        names = sorted([gold.name, next(name for name in names if name != gold.name)], key=names.index)
    return [TOOLS[name] for name in names[:2]]


def _record(kind: str, sample: Sample, turns: Sequence[Turn]) -> kd.Record:
    messages = (Turn("user", sample.prompt), turns[sample.answer])
    text = kd.turn_text(messages[-1])
    layout = lay_out(messages, sample.tools, toy_tokenizer())
    return kd.Record(
        id=f"{kind}-{_hash(sample.prompt):016x}",
        prompt=sample.prompt,
        teacher_text=text,
        ground_truth=text,
        messages=messages,
        tools=sample.tools,
        run_id="",
        split="train",
        stratum="plain" if kind == "tools" and not messages[-1].tool_calls else kind,
        render=layout.rendered,
        targets=layout.targets,
    )


def _teach(paths: Sequence[Sequence[int]], favourite: int, tokenizer: Tokenizer) -> Distribution:
    """The teacher's distribution at each token of its favourite answer."""
    weights = np.full(len(paths), (1 - FAVOURITE) / (len(paths) - 1))
    weights[favourite] = FAVOURITE
    probabilities = _trie_rows(paths, weights, paths[favourite], tokenizer.vocab_size)
    kept = capture(np.log(probabilities), TOP_K)
    return Distribution(np.asarray(paths[favourite], np.int32), kept.ids, kept.logprobs, kept.tail)


def _trie_rows(
    paths: Sequence[Sequence[int]], weights: NDArray[np.float64], path: Sequence[int], vocab_size: int
) -> NDArray[np.float64]:
    """[n, V]: at each step along `path`, the share of each next token among the answers that begin alike."""
    rows = np.full((len(path), vocab_size), NOISE / vocab_size)
    for step in range(len(path)):
        alive = [i for i, other in enumerate(paths) if len(other) > step and list(other[:step]) == list(path[:step])]
        total = weights[alive].sum()
        for i in alive:
            rows[step, paths[i][step]] += (1 - NOISE) * weights[i] / total
    return rows


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Write a toy dataset."""
    parser = argparse.ArgumentParser(
        prog="distill toy-kd", description="A toy KD dataset with its teacher's distributions."
    )
    parser.add_argument("--out", required=True, help="the dataset to write, F.jsonl")
    parser.add_argument("--n", type=int, default=128, help="number of samples")
    parser.add_argument("--kind", choices=KINDS, default="tools", help="tool calls, or the 8-ball's answers")
    parser.add_argument("--seed", type=int, default=0, help="which samples, in which order")
    args = parser.parse_args(argv)
    header = write(args.out, args.kind, args.n, args.seed)
    print(f"{args.out}: {header.counts['records']} {args.kind} samples, {header.counts['completion_tokens']} "
          f"teacher tokens with top-{TOP_K} distributions")  # fmt: skip
    return 0
