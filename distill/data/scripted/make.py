"""Tool-use conversations by a scripted teacher: `distill scripted-kd --out F.jsonl --n 2000 [--tokenizer FOLDER]`.

No model answers here. The prompts are of the words of the built-in strata, the calls of a table of gold calls, the
results of the broker's simulators, and the answers of a few patterns: for where a local teacher is too weak to call
tools. Its text is learned as any teacher's; it has no distributions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from distill.artifacts import sha256_text
from distill.broker import Broker, Fault
from distill.chat import ToolCall
from distill.data import records as kd
from distill.data.prompts import tool_requests as requests
from distill.data.prompts.similarity import NearDuplicates
from distill.data.prompts.strata import Prompt, Scene, framed
from distill.data.prompts.stream import shares
from distill.data.prompts.tool_material import TOOLS
from distill.data.rules.secrets import secret_in
from distill.data.schema import Provenance, Teacher
from distill.data.scripted import several
from distill.data.scripted.gold import GOLD
from distill.data.scripted.plain import CLARIFIES, CONTROLS, DECLINES, Reply
from distill.data.scripted.play import Conversation, Failed
from distill.data.scripted.said import Said, Unclear
from distill.data.targets import lay_out
from distill.draw import Draw
from distill.errors import InputError, stage_main
from distill.tokenizer import Tokenizer

SHARES = {"tool_single": 0.45, "tool_parallel": 0.15, "tool_chain": 0.10, "tool_error": 0.10, "tool_control": 0.08,
          "tool_decline": 0.06, "tool_clarify": 0.06}  # fmt: skip
VAL_SHARE = 0.1
_ALIKE = 0.8  # prompts of both splits must not be as similar as this
_TIRED = 4000  # draws of a stratum in a row that give nothing new

PHRASES = {tool: [text for text in texts if text in GOLD] for tool, texts in requests.REQUESTS.items()}
"""The request phrases of each tool that have a gold call."""


class Scripted(NamedTuple):
    """A prompt, and what the teacher does about it: it talks until its last word, which it returns."""

    prompt: Prompt
    play: Callable[[Conversation], str]


class _Wish(NamedTuple):
    """One of the things asked for in a prompt: its call, and its answer once the result is there."""

    tool: str
    text: str
    said: Said
    template: str

    @property
    def call(self) -> ToolCall:
        return ToolCall(self.tool, GOLD[self.template].arguments(self.said))


def _wish(scene: Scene, draw: Draw, tool: str) -> _Wish:
    template = draw.choice(PHRASES[tool])
    text, values = scene.fill(template)
    return _Wish(tool, text, Said(scene.today, values), template)


def _granted(wishes: Sequence[_Wish]) -> Callable[[Conversation], str]:
    """All calls in one turn, then an answer to each."""
    calls = [wish.call for wish in wishes]

    def play(talk: Conversation) -> str:
        results = zip(wishes, talk.ask_all(calls), strict=True)
        return " ".join(str(result) if isinstance(result, Failed) else GOLD[wish.template].answer(wish.said, result)
                        for wish, result in results)  # fmt: skip

    return play


def _single(draw: Draw) -> Scripted:
    return _one("tool_single", draw, "")


def _error(draw: Draw) -> Scripted:
    return _one("tool_error", draw, draw.choice(("once", "always")))


def _one(stratum: str, draw: Draw, fault: Fault) -> Scripted:
    scene = Scene(draw)
    wish = _wish(scene, draw, draw.choice(tuple(PHRASES)))
    text = framed(draw.choice(requests.SINGLE), [wish.text])
    return Scripted(scene.prompt(stratum, (wish.tool,), text, expect="call", fault=fault), _granted([wish]))


def _parallel(draw: Draw) -> Scripted:
    scene = Scene(draw)
    if draw.chance(0.3):
        return _same(scene, draw)
    tools = draw.sample(tuple(PHRASES), draw.between(2, 3))
    wishes = [_wish(scene, draw, tool) for tool in tools]
    form = draw.choice(requests.PARALLEL if len(wishes) == 2 else requests.TRIPLE)
    text = framed(form, [wish.text for wish in wishes])
    return Scripted(scene.prompt("tool_parallel", tuple(tools), text, expect="call"), _granted(wishes))


def _same(scene: Scene, draw: Draw) -> Scripted:
    case = draw.choice([case for case in requests.SAME if case.text in several.SAME])
    text, values = scene.fill(case.text)
    said, gold = Said(scene.today, values), several.SAME[case.text]
    calls = [ToolCall(case.tools[0], arguments) for arguments in gold.arguments(said)]

    def play(talk: Conversation) -> str:
        results = talk.ask_all(calls)
        if any(isinstance(result, Failed) for result in results):
            raise Unclear("part of a comparison is missing")
        return gold.answer(said, [result for result in results if not isinstance(result, Failed)])

    return Scripted(scene.prompt("tool_parallel", case.tools, text, expect="call"), play)


def _chain(draw: Draw) -> Scripted:
    scene = Scene(draw)
    case = draw.choice([case for case in requests.CHAINS if case.text in several.CHAINS])
    opening = draw.choice(requests.OPENINGS)
    text, values = scene.fill(case.text)
    said = Said(scene.today, values)

    def play(talk: Conversation) -> str:
        try:
            return several.CHAINS[case.text](talk.ask, said)
        except Failed as failed:
            return str(failed)

    return Scripted(scene.prompt("tool_chain", case.tools, opening + text, expect="call"), play)


def _control(draw: Draw) -> Scripted:
    case = draw.choice(requests.CONTROLS)
    return _plain(draw, "tool_control", Reply(case.tools, case.text, CONTROLS[case.text]))


def _decline(draw: Draw) -> Scripted:
    return _plain(draw, "tool_decline", draw.choice(DECLINES))


def _clarify(draw: Draw) -> Scripted:
    return _plain(draw, "tool_clarify", draw.choice(CLARIFIES))


def _plain(draw: Draw, stratum: str, reply: Reply) -> Scripted:
    scene = Scene(draw)
    opening = draw.choice(requests.OPENINGS)
    text, values = scene.fill(reply.text)
    known = {f"{slot}_{n}" if n > 1 else slot: value for slot, found in values.items()
             for n, value in enumerate(found, 1)}  # fmt: skip
    if "{warmer}" in reply.answer:
        known["warmer"] = "Yes" if int(known["minutes"]) > int(known["minutes_2"]) else "No"
    answer = reply.answer.format(**known)
    prompt = scene.prompt(stratum, reply.tools, opening + text, expect="no_call")
    return Scripted(prompt, lambda talk: answer[0].upper() + answer[1:])


MAKERS: dict[str, Callable[[Draw], Scripted]] = {
    "tool_single": _single, "tool_parallel": _parallel, "tool_chain": _chain, "tool_error": _error,
    "tool_control": _control, "tool_decline": _decline, "tool_clarify": _clarify,
}  # fmt: skip


def build(n: int, seed: int = 0, tokenizer: Tokenizer | None = None) -> list[kd.Record]:
    """`n` records, the same for the same arguments, in an order of which every beginning is a fair sample."""
    broker, near = Broker(TOOLS), {"train": NearDuplicates(_ALIKE), "val": NearDuplicates(_ALIKE)}
    seen: set[str] = set()
    made = []
    for stratum, quota in quotas_of(n).items():
        count = misses = index = 0
        while count < quota:
            if misses == _TIRED:
                raise InputError(f"--n {n}: the stratum {stratum} has no more than about {count} different prompts")
            record = _record(stratum, Draw("scripted/1", seed, stratum, index), broker, tokenizer)
            index, misses = index + 1, misses + 1
            if record is None or record.prompt in seen:
                continue
            other = near["val" if record.split == "train" else "train"]
            if other.find(record.prompt) is not None:
                continue
            near[record.split].insert(record.id, record.prompt)
            seen.add(record.prompt)
            made.append(record)
            count, misses = count + 1, 0
    return sorted(made, key=lambda record: sha256_text(f"{seed}\n{record.id}"))


def _record(stratum: str, draw: Draw, broker: Broker, tokenizer: Tokenizer | None) -> kd.Record | None:
    """A record; None where what the draw says can be understood in several ways."""
    try:
        prompt, play = MAKERS[stratum](draw)
        talk = Conversation(prompt, broker, int(sha256_text(f"scripted-seed/1\n{prompt.id}")[:8], 16))
        talk.say(play(talk))
    except Unclear:
        return None
    messages, tools = tuple(talk.turns), list(prompt.tools)
    if secret_in("\n".join(turn.content for turn in messages)):
        return None  # a made-up number that looks like a key
    layout = lay_out(messages, tools, tokenizer)
    return kd.Record(
        id=prompt.id, prompt=prompt.text, teacher_text=kd.turn_text(messages[-1]), ground_truth=None,
        messages=messages, tools=tools, run_id="", split=kd.split_of(prompt.id, VAL_SHARE), stratum=stratum,
        expect=prompt.expect, render=layout.rendered, targets=layout.targets,
        provenance=Provenance(fixture_sha256=tuple(talk.fixtures)),
    )  # fmt: skip


def quotas_of(n: int) -> dict[str, int]:
    """How many records of each stratum."""
    if n < 1:
        raise InputError(f"--n {n}: at least 1")
    return shares(SHARES, {}, n)


def header_of(n: int, seed: int, tokenizer: Tokenizer | None = None, prompts_sha256: str = "") -> kd.Header:
    """The header of such a set before it is written."""
    return kd.make_header(
        config={"n": n, "seed": seed, "val_share": VAL_SHARE}, sampling={"decoding": "scripted"},
        teacher=Teacher("scripted", "scripted-tools", text_engine="table of gold calls"),
        prompts_sha256=prompts_sha256, tokenizer=tokenizer, logprobs=None, quotas=quotas_of(n),
    )  # fmt: skip


def write(path: str | Path, n: int = 2000, seed: int = 0, tokenizer: Tokenizer | None = None) -> kd.Header:
    """Write a scripted set at `path`; returns its header."""
    made = build(n, seed, tokenizer)
    header = header_of(n, seed, tokenizer, sha256_text("\n".join(record.id for record in made)))
    return kd.write_dataset(path, made, header, tokenizer=tokenizer)


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Write a scripted dataset."""
    parser = argparse.ArgumentParser(
        prog="distill scripted-kd", description="A KD dataset of tool use by a scripted teacher, which no model is."
    )
    parser.add_argument("--out", required=True, help="the dataset to write, F.jsonl")
    parser.add_argument("--n", type=int, default=2000, help="number of conversations")
    parser.add_argument("--seed", type=int, default=0, help="which conversations")
    parser.add_argument("--tokenizer", type=Path, help="the student's: a tokenizer.json, or a folder that holds one")
    args = parser.parse_args(argv)
    path = args.tokenizer / "tokenizer.json" if args.tokenizer and args.tokenizer.is_dir() else args.tokenizer
    header = write(args.out, args.n, args.seed, Tokenizer.from_file(path) if path else None)
    counts = header.counts
    print(f"{args.out}: {counts['records']} conversations of a scripted teacher ({counts['train']} train, "
          f"{counts['val']} val)")  # fmt: skip
    return 0
