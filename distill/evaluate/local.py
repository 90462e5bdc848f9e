"""Evaluate a model on an evaluation set: real episodes, exact scores, gates that only `pass` passes.

    distill eval --model models/student/checkpoints/latest.pt --in data/contextual_final.jsonl \\
      --out eval/results/local.jsonl --report eval/reports/local.json

First the self-test: the set's own right answers must be right and every cheating policy must fail at its gate. A run
that was stopped goes on with the same command. Exit code 0: every gate passed; 1: one failed; 3: none failed, and one
is inconclusive; 2: an error, of input or of the self-test, or the model could not be asked.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from distill.artifacts import canonical_json, write_json, write_text
from distill.errors import InputError, stage_main
from distill.evaluate import page, report, results
from distill.evaluate.criteria import EXIT_CODES, EvalGate, EvaluationConfig, overall, read_config
from distill.evaluate.drive import Driver
from distill.evaluate.items import Item
from distill.evaluate.results import RunHeader
from distill.evaluate.selftest import Check, passed, self_test
from distill.evaluate.sets import EvaluationSet, fixture_lines, load, shard_of
from distill.evaluate.transcripts import Transcript

MODEL, DATA = "models/student/checkpoints/latest.pt", "data/contextual_final.jsonl"
OUT, REPORT = "eval/results/local.jsonl", "eval/reports/local.json"


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Evaluate a model, or merge the shards of an evaluation."""
    args = _parser().parse_args(argv)
    config = read_config(args.config, args.tier)
    found = load(args.data, args.fixtures)
    print(f"{args.data}: {len(found.items)} items, {found.fixtures.rows} fixtures", flush=True)
    checks = self_test(found, config)
    _tell_self_test(checks)
    if args.self_test:
        return 0 if passed(checks) else EXIT_CODES["error"]
    if args.merge:
        header, transcripts = merged(args.merge, found)
        played = _write(args.out, found, header, transcripts)
    elif not passed(checks):
        raise InputError(f"{args.data}: the self-test failed, so no verdict on a model would mean anything (see above)")
    else:
        header, transcripts, played = _run(args, config, found)
    made = report.build(found, header, transcripts, played, config, checks)
    write_json(args.report, made)
    html = args.report.with_suffix(".html")
    write_text(html, page.page(made, found, played))
    gates = msgspec.convert(made["gates"], dict[str, EvalGate])
    print(gate_table(gates))
    print(f"{args.report}, {html.name}, {args.out}: {overall(gates)}")
    return EXIT_CODES[overall(gates)]


def _run(
    args: argparse.Namespace, config: EvaluationConfig, found: EvaluationSet
) -> tuple[RunHeader, dict[str, Transcript], report.Played]:
    from distill.evaluate.runners import Settings, open_model

    offered = {tool["name"]: tool for item in found.items for tool in item.tools} if args.constrained else {}
    settings = Settings(max_new_tokens=config.limits.max_new_tokens, constrained=args.constrained, formats=args.formats,
                        model_id=args.model_id, backend=args.backend, tools=tuple(offered.values()),
                        form=args.form, together=args.together)  # fmt: skip
    model = open_model(args.model, settings)
    identity = model.identity()
    header = RunHeader(
        model=identity, inputs=inputs_of(identity, found), files=found.sha256s, broker=args.broker, seed=args.seed,
        limits=msgspec.to_builtins(config.limits), items=args.items, shard=args.shard,
    )  # fmt: skip
    number, shards = args.shard
    wanted = [item for item in report.expected_items(found, header) if shard_of(item.id, shards) == number - 1]
    journal = results.Journal(args.out, header, restart=args.restart)
    written = False
    try:
        Driver(found, header, config.limits, journal).run(model, wanted)
        played = _write(args.out, found, header, journal.transcripts)
        written = True
    finally:
        journal.close(written=written)
    if args.broker == "record":
        write_text(args.record_to, fixture_lines(played.recorded))
        print(f"{args.record_to}: {len(played.recorded)} recorded results")
    return header, journal.transcripts, played


def _write(out: Path, found: EvaluationSet, header: RunHeader, transcripts: dict[str, Transcript]) -> report.Played:
    """Play the transcripts back and write the results."""
    played = report.play_back(found, header, transcripts)
    results.write(out, header, [(transcripts[name], episode, played.scores.get(name))
                                for name, episode in played.episodes.items()])  # fmt: skip
    return played


def inputs_of(identity: Mapping[str, Any], found: EvaluationSet) -> dict[str, dict[str, str]]:
    """The files that were read, as artifacts.provenance names them: the model's and the set's."""
    files = dict(identity.get("files") or {}) | {f"set/{name}": sha256 for name, sha256 in found.sha256s.items()}
    return {name: {"file": name, "sha256": sha256} for name, sha256 in files.items()}


def merged(paths: Sequence[Path], found: EvaluationSet) -> tuple[RunHeader, dict[str, Transcript]]:
    """The run that shards are parts of; InputError where they are not shards of one run."""
    items: dict[str, Item] = {item.id: item for item in found.items}
    transcripts: dict[str, Transcript] = {}
    first: RunHeader | None = None
    for path in paths:
        header, part = results.read(path, items)
        if header.files != found.sha256s:
            raise InputError(f"{path}: is of another set than {found.path}")
        if first is not None and canonical_json(first.whole()) != canonical_json(header.whole()):
            raise InputError(f"{path}: is no shard of the same run as {paths[0]}")
        if twice := transcripts.keys() & part.keys():
            raise InputError(f"{path}: item {min(twice)} is in another shard, too")
        transcripts |= part
        first = first or header
    assert first is not None
    return msgspec.structs.replace(first, shard=(1, 1)), transcripts


def gate_table(gates: dict[str, EvalGate]) -> str:
    """A line a gate, those that did not pass last."""
    order = {"pass": 0, "skipped": 1, "inconclusive": 2, "fail": 3, "error": 4}
    width = max(map(len, gates))
    rows = []
    for name, gate in sorted(gates.items(), key=lambda pair: order[pair[1].status]):
        observed = f"{gate.observed:.4f}" if isinstance(gate.observed, float) else str(gate.observed or "-")
        samples = f"n {gate.n} of {gate.n_min}" if gate.n_min else ""
        rows.append(f"{gate.status.upper():12} {name:{width}} {observed:>8} {gate.threshold or '':8} {samples:16} "
                    f"{gate.reason or ''}".rstrip())  # fmt: skip
    return "\n".join(rows)


def _tell_self_test(checks: Sequence[Check]) -> None:
    oracle, *cheats = checks
    caught = sum(check.status == "pass" for check in cheats)
    print(f"self-test: oracle right on {oracle.n} items, {caught} of {len(cheats)} cheats caught" if passed(checks)
          else "self-test FAILED", flush=True)  # fmt: skip
    for check in checks:
        if check.status != "pass":
            print(f"  {check.status}: {check.policy} at {check.gate}: {check.reason}", file=sys.stderr)


def _shard(text: str) -> tuple[int, int]:
    try:
        number, _, shards = text.partition("/")
        if not 1 <= int(number) <= int(shards):
            raise ValueError
        return int(number), int(shards)
    except ValueError:
        raise InputError(f"--shard {text}: such as 2/8, the second of eight") from None


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise InputError(f"{text}: not a whole number of at least 1 (--items, --together)")
    return int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="distill eval", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=__doc__)  # fmt: skip
    add = parser.add_argument
    add("--model", default=MODEL, help="checkpoint .pt, Hugging Face folder, .mlpackage or http(s)://endpoint/v1")
    add("--in", dest="data", type=Path, default=Path(DATA), help="the evaluation set, F.jsonl with F.jsonl.d beside it")
    add("--out", type=Path, default=Path(OUT), help="results, an episode a line")
    add("--report", type=Path, default=Path(REPORT), help="the report; a page of the same name, .html, beside it")
    add("--config", type=Path, help="default: configs/evaluation.yaml")
    add("--tier", choices=["tier_1", "tier_2", "tier_3"], help="risk tier; default: the configuration's")
    add("--constrained", action="store_true", help="decode calls within the tools' schemas (extra `evaluate`)")
    add("--formats", help="weights as deployed in this format: int8, or blocks=int4/32,embedding=int8")
    add("--backend", choices=["executor", "coreml"], default="executor", help="what runs a package")
    add("--model-id", default="", help="an endpoint's model; default: the only one that it lists")
    add("--form", choices=["chat", "completions"], default="chat",
        help="an endpoint: its own chat template and tools, or our rendering sent to /completions")  # fmt: skip
    add("--together", type=_count, default=8, metavar="N", help="conversations at a time")
    add("--broker", choices=["replay", "record", "simulate"], default="replay", help="where tools' results come from")
    add("--fixtures", type=Path, help="recorded results in place of the set's own")
    add("--record-to", type=Path, default=Path("eval/results/recorded.jsonl"), help="with --broker record: results to")
    add("--seed", type=int, default=0, help="of simulated results")
    add("--items", type=_count, metavar="N", help="so many items, as many of each kind as of any other")
    add("--shard", type=_shard, default=(1, 1), metavar="I/N", help="only this part of the items")
    add("--merge", type=Path, nargs="+", metavar="RESULTS", help="no model: the report of these shards together")
    add("--self-test", action="store_true", help="no model: only try the set and the gates")
    add("--restart", action="store_true", help="forget what an unfinished evaluation has")
    return parser
