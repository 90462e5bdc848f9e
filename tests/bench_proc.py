"""What process supervision does to tool calls: `python -m tests.bench_proc [--set calls|episodes] [--seeds 20]`.

For each seed (of the toy set, the first weights and the order) a toy worker is stopped early, while many of its calls
are still wrong, and then trained on for equally many steps over the same sequences: with all spans alike, with the
weights of configs/process_supervision.yaml, and with the name and the arguments of a call at ten. Judged by greedy
answers to held-out prompts: a call is right if name and arguments are, exactly, and nothing else is called.

Two sets: `calls`, the toy set as it is, where a conversation ends with the call; `episodes`, the same with the call's
result and a wordy answer after it, from text alone: most tokens to learn are then words that nothing foretells.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from rich.console import Console

from distill import chat, checkpoint
from distill.config import build, load_yaml
from distill.data import toy
from distill.data.schema import Record, Turn, turn_text
from distill.model import Student
from distill.tokenizer import toy_tokenizer
from distill.tools import same_call
from distill.train import loop
from distill.train.config import InitSection, SpanWeights, TrainConfig
from distill.train.toy import PRESETS, toy_config, toy_model
from tests.unit.kd_sets import words
from tests.unit.train_sets import write_records

CONFIG = Path(__file__).resolve().parent.parent / "configs/process_supervision.yaml"
BASELINE = "all alike"
RECORDS, HELD_OUT, WORDS = 128, 320, 24
LR = 1e-3
"""A fifth of the toy worker's, as the configuration's is of its worker's."""


class Score(NamedTuple):
    """Shares of the held-out prompts, in percent."""

    call: float
    """Of those that need a call: name and arguments right."""
    name: float
    """Of those that need a call: one call, of the right function."""
    plain: float
    """Of those that need none: the right text and no call."""


def score(student: Student, records: Sequence[Record]) -> Score:
    """Greedy answers, judged."""
    tokenizer = toy_tokenizer()
    calls, names, plain = [], [], []
    for record in records:
        prompt = chat.encode(tokenizer, record.context, record.tools, add_generation_prompt=True).ids
        answer = chat.parse(tokenizer.decode(student.generate(prompt, 48, tokenizer.stop_ids)))
        one = len(answer.calls) == 1 and not answer.malformed
        if record.gold_calls:
            (gold,) = record.gold_calls
            names.append(one and answer.calls[0].name == gold.name)
            calls.append(one and same_call(answer.calls[0], gold))
        else:
            plain.append(not answer.calls and not answer.malformed and answer.content == record.teacher_text)
    return Score(*(100 * statistics.mean(right) for right in (calls, names, plain)))


def train(config: TrainConfig, folder: Path) -> Path:
    """Run the loop quietly; returns the checkpoint."""
    config = msgspec.structs.replace(config, runs=str(folder / "runs"))
    return loop.run(config, restart=True, console=Console(quiet=True)).checkpoint


def episode(record: Record) -> Record:
    """A toy record with the call's result and an answer of some 90 tokens after it; one without a call as it is."""
    if not record.gold_calls:
        return record
    draw = random.Random(record.id)
    count = draw.randint(100, 999)
    result = Turn("tool", f'{{"ok": true, "count": {count}}}', origin="broker", tool_call_id="call_0")
    answer = Turn("assistant", f"Done, {count} times. {words(draw, WORDS).capitalize()}.", origin="teacher")
    messages = (*record.messages, result, answer)
    return msgspec.structs.replace(record, messages=messages, teacher_text=turn_text(answer), ground_truth=None,
                                   logprobs=None, render=None, targets=())  # fmt: skip


def one_seed(
    seed: int, episodes: bool, lengths: tuple[int, int], variants: dict[str, SpanWeights], records: Sequence[Record]
) -> dict[str, Score]:
    """The worker, and each way of training it on; `lengths` are the steps of each."""
    worker_steps, steps = lengths
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if episodes:
            given = toy.build("tools", RECORDS, seed).records
            write_records(folder / "kd.jsonl", [episode(record) for record in given], None)
        else:
            toy.write(folder / "kd.jsonl", "tools", RECORDS, seed)
        preset = PRESETS["tools"]._replace(epochs=100)
        worker = toy_config(str(folder / "kd.jsonl"), str(folder / "worker.pt"), preset=preset, model=toy_model(),
                            device="cpu", seed=seed)  # fmt: skip
        start = train(msgspec.structs.replace(worker, max_steps=worker_steps), folder)
        found = {"the worker": score(checkpoint.load(start).student.eval(), records)}
        for label, weights in variants.items():
            proc = msgspec.structs.replace(
                worker, model=None, tokenizer=None, init=InitSection(checkpoint=str(start)), stage="proc", lr=LR,
                max_steps=steps, span_weights=weights, out=str(folder / "proc.pt"), seed=seed + 1000,
            )  # fmt: skip
            found[label] = score(checkpoint.load(train(proc, folder)).student.eval(), records)
    return found


def table(found: Sequence[dict[str, Score]]) -> str:
    """Mean, standard deviation and range over the seeds; the difference to the baseline, seed by seed."""
    lines = [
        f"{'':24s} {'call exact, %':>22s} {'name right':>12s} {'plain right':>12s}  {'call, minus ' + BASELINE:>24s}"
    ]
    for label in found[0]:
        calls, names, plain = zip(*(seed[label] for seed in found))
        spread = f"{statistics.mean(calls):5.1f} +- {statistics.stdev(calls):4.1f} [{min(calls):.0f}, {max(calls):.0f}]"
        gains = [seed[label].call - seed[BASELINE].call for seed in found]
        error = statistics.stdev(gains) / len(gains) ** 0.5
        beside = f"{statistics.mean(gains):+5.1f} +- {error:.1f} (s.e.), {sum(g > 0 for g in gains)} up, " \
                 f"{sum(g < 0 for g in gains)} down"  # fmt: skip
        lines.append(f"{label:24s} {spread:>22s} {statistics.mean(names):12.1f} {statistics.mean(plain):12.1f}  "
                     + ("" if label == BASELINE else beside))  # fmt: skip
    return "\n".join(lines)


def main() -> None:
    """Train, judge, print."""
    parser = argparse.ArgumentParser(prog="bench_proc")
    parser.add_argument("--set", choices=("calls", "episodes"), default="calls")
    parser.add_argument("--seeds", type=int, default=20, help="at least 2")
    parser.add_argument("--worker-steps", type=int, help="of set calls 60, of episodes 100")
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    episodes = args.set == "episodes"
    lengths = (args.worker_steps or (100 if episodes else 60), args.steps)
    shipped = build(load_yaml(CONFIG), TrainConfig, str(CONFIG)).span_weights
    variants = {BASELINE: SpanWeights(), "as configured": shipped,
                "name, arguments at 10": SpanWeights(tool_name=10, tool_args=10)}  # fmt: skip
    records = toy.held_out(HELD_OUT)
    print(f"set {args.set}, {args.seeds} seeds; worker {lengths[0]} steps, then {lengths[1]}; {HELD_OUT} held-out "
          f"prompts, {sum(bool(r.gold_calls) for r in records)} need a call; as configured: {shipped}")  # fmt: skip
    found = []
    for seed in range(args.seeds):
        found.append(one_seed(seed, episodes, lengths, variants, records))
        print(f"seed {seed}: " + "  ".join(f"{label} {s.call:.1f}" for label, s in found[-1].items()), flush=True)
    print(table(found))


if __name__ == "__main__":
    main()
