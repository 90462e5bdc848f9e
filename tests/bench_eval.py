"""Scoring speed of an evaluation: episodes of the oracle on at least 10,000 items, calls to report, on one core.

    python -m tests.bench_eval

Counts what a merge or an audit does after the files are read: episodes are played back, scored, and put into a report
with its bootstrap intervals. The self-test, which is apart from it, is not counted. Fails over 10 s. One JSON line.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import msgspec

from distill import chat
from distill.evaluate import policies, report
from distill.evaluate.contextual.make import scenarios, write
from distill.evaluate.criteria import EvaluationConfig
from distill.evaluate.episode import Limits, play
from distill.evaluate.fixtures import EpisodeBroker
from distill.evaluate.items import Item
from distill.evaluate.results import RunHeader
from distill.evaluate.sets import EvaluationSet, load
from distill.evaluate.transcripts import Reply, Transcript

LIMIT_S = 10.0


def transcript(item: Item, found: EvaluationSet) -> Transcript:
    """What the oracle says."""
    playing, replies = play(item, EpisodeBroker(item, found.fixtures), Limits()), list[Reply]()
    request = next(playing)
    try:
        while True:
            replies.append(policies.reply(policies.oracle, item, request.messages, len(replies)))
            request = playing.send(replies[-1])
    except StopIteration:
        return Transcript(item=item.id, replies=tuple(replies))


def main() -> None:
    """Measure; exit code 1 over the limit."""
    parser = argparse.ArgumentParser(prog="tests.bench_eval", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scale", type=int, default=9, help="of the contextual set; 9: 10,314 items")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "set.jsonl"
        write(path, scenarios(0, args.scale), {"seed": 0, "scale": args.scale}, {})
        found = load(path)
    said = {item.id: transcript(item, found) for item in found.items}
    header = RunHeader(model={"runner": "oracle"}, inputs={}, files=found.sha256s, broker="replay", seed=0,
                       limits=msgspec.to_builtins(Limits()))  # fmt: skip
    chat.template_sha256(), report.scorer_sha256()
    started, cpu = time.perf_counter(), time.process_time()
    played = report.play_back(found, header, said)
    between = time.perf_counter()
    made = report.build(found, header, said, played, EvaluationConfig(), [])
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    right = made["metrics"]["integration_f1_strict_micro"]["value"] == 1.0
    told = {"items": len(said), "seconds": seconds, "cpu_seconds": cpu, "played_back": between - started,
            "reported": seconds - (between - started), "of_limit": seconds / LIMIT_S, "right": right}  # fmt: skip
    print(json.dumps({name: round(one, 3) if isinstance(one, float) else one for name, one in told.items()}))
    if seconds > LIMIT_S or not right:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
