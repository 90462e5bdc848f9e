"""`python -m scripts.make_kd_mix_hardened --out F --teacher SPEC --total N`: a teacher's answers as a KD dataset.

What comes back is in the journal, on disk, before it counts; a run that was killed goes on where it stopped, and the
dataset is built from the journal alone (distill/data/build.py).
"""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from distill.artifacts import canonical_json, require_replaceable_file, sweep
from distill.config import as_dict, build, load
from distill.data import records as kd
from distill.data.budget import Budget, OutOfBudget, usd
from distill.data.build import Built, write
from distill.data.episodes import Protocol
from distill.data.generation import Generation, Interrupts, Plan
from distill.data.journal import JOURNAL, Journal, Totals
from distill.data.mix_config import MixConfig
from distill.data.prompts.stream import describe, open_prompts
from distill.data.sender import Sender
from distill.data.status import Status
from distill.data.teacher.admission import WINDOW, Admission
from distill.data.teacher.opening import (
    LOCAL_TOKENS,
    Opened,
    capabilities_of,
    depends_on,
    open_teacher,
    protocol_of,
    room,
    server_name,
    streams,
)
from distill.data.teacher.spec import Spec, parse_spec
from distill.errors import InputError, Paused, stage_main

DEFAULT_CONFIG = Path("configs/kd_mix.yaml")


class Job(NamedTuple):
    """What a run is asked to do."""

    out: Path
    spec: Spec
    total: int
    config: MixConfig
    seed: int
    fork: bool = False


class Made(NamedTuple):
    """What came of it."""

    header: kd.Header
    short: dict[str, int]
    """Records missing of each stratum."""
    spent: str


def make(
    out: str | Path, teacher: str, total: int, config: MixConfig, *, seed: int = 0, fork: bool = False,
    quiet: bool = False,
) -> Made:  # fmt: skip
    """Generate a dataset at `out`, going on where an earlier run stopped.

    Paused: stopped early, and the same command goes on. Where only the budget stopped it, a dataset of what was
    accepted is written first.
    """
    if total < 1:
        raise InputError(f"--total {total} must be at least 1")
    job = Job(Path(out), parse_spec(teacher), total, config, seed, fork)
    _require_ours(job.out)
    with Journal(kd.sidecar(out) / JOURNAL) as journal, Status(total, quiet=quiet) as status:
        _sweep(job.out)
        budget = Budget(config.budget, _spent(journal))
        status.spending(budget, priced=config.prices is not None)
        try:
            built, stopped = asyncio.run(_generate(job, journal, budget, status))
            status.phase("writing the dataset")
            header, short = write(job.out, built, journal, status)
        except KeyboardInterrupt:
            raise Paused("interrupted; run the same command again to go on") from None
    if stopped:
        raise Paused(f"{stopped}; {header.counts['records']:,} of {total:,} records are in {out}; raise the budget and "
                     "run the same command again to go on")  # fmt: skip
    money = f", {usd(budget.spent.cost)} USD" if config.prices else ""
    return Made(header, short, f"{budget.spent.tokens:,} tokens{money} spent")


def _require_ours(out: Path) -> None:
    """InputError if something is there that no run of ours has written, before anything is asked and paid."""
    require_replaceable_file(out)
    folder = kd.sidecar(out)
    if out.exists() and not any((folder / name).is_file() for name in ("header.json", JOURNAL)):
        raise InputError(f"--out {out}: a file that is no dataset of ours (no {folder.name} beside it) is in the way")


def _sweep(out: Path) -> None:
    """Remove what killed runs left half-written; the journal's lock is held."""
    sweep(out)
    for name in ("header.json", "logprobs.safetensors", "tokenizer.json", "rejects.jsonl", "report.json"):
        sweep(kd.sidecar(out) / name)


async def _generate(job: Job, journal: Journal, budget: Budget, status: Status) -> tuple[Built, OutOfBudget | None]:
    """Open the teacher and ask it until every quota is full; what the dataset is built from, and whether the budget
    ended it early."""
    with Interrupts(status) as interrupts:
        status.phase("opening the teacher")
        opened = await open_teacher(job.spec, job.config)
        try:
            return await _ask(job, opened, journal, budget, status, interrupts)
        finally:
            await opened.transport.close()


async def _ask(
    job: Job, opened: Opened, journal: Journal, budget: Budget, status: Status, interrupts: Interrupts
) -> tuple[Built, OutOfBudget | None]:
    config = job.config
    admission = Admission(opened.most, rpm=config.rpm, tpm=config.tpm, start=opened.most if opened.here else None)
    admission.remember(journal.recent(2 * WINDOW))
    sender = Sender(opened.transport, journal, admission, budget, config.prices, status, attempts=config.attempts)
    can = await capabilities_of(opened, config, sender, journal, anew=job.fork)
    server = await server_name(opened, journal)
    protocol = protocol_of(opened, can, config, job.seed)
    _require_same_run(job, protocol, journal)
    for line in can.lines():
        status.say(f"  {line}")
    sender.unique_ids = can.unique_ids
    sender.stream = streams(protocol, can, config)
    prompts = open_prompts(config, job.seed, tools=can.tools, room=room(opened, config, protocol))
    for name, reason in prompts.left_out.items():
        status.say(f"  stratum {name} is left out: {reason}")
    plan = Plan(prompts, prompts.quotas(job.total))
    status.phase(f"asking {opened.identity.model}", job.total)
    generation = Generation(plan, protocol, prompts.broker, sender, journal, status, attempts=config.attempts)
    stopped: OutOfBudget | None = None
    try:
        await generation.run(opened.most, interrupts)
    except OutOfBudget as error:
        if not plan.accepted:
            raise
        stopped = error
    await journal.flush()
    return Built(plan, prompts, protocol, can, server, job.spec, opened.tokenizer, config, job.seed), stopped


def _spent(journal: Journal) -> Totals:
    """What the journal's ledger counts as spent: settled, or perhaps served."""
    found = journal.totals()
    return found.get("settled", Totals()) + found.get("uncertain", Totals())


def _require_same_run(job: Job, protocol: Protocol, journal: Journal) -> None:
    """InputError if the journal's answers were given by another teacher or under other settings: none would be used."""
    now = depends_on(protocol)
    kept = journal.meta("depends_on")
    if kept is not None and not job.fork:
        before = msgspec.json.decode(kept)
        changed = [f"{name} was {before.get(name)}, is {now.get(name)}" for name in sorted({*before, *now})
                   if before.get(name) != now.get(name)]  # fmt: skip
        if changed:
            raise InputError(f"{journal.path} is of another run: {'; '.join(changed)}. --fork asks everything anew and "
                             "keeps what it has; another --out leaves it alone")  # fmt: skip
    journal.keep("depends_on", canonical_json(now))


def _config(args: argparse.Namespace) -> MixConfig:
    """The mix, with what the command line says in its place."""
    if args.config is None and not DEFAULT_CONFIG.is_file():
        config = MixConfig()
    else:
        config = load(args.config or DEFAULT_CONFIG, MixConfig)
    given: dict[str, Any] = {"model": args.model or config.model}
    if args.budget_usd is not None or args.budget_tokens is not None:
        given["budget"] = {
            "usd": config.budget.usd if args.budget_usd is None else args.budget_usd,
            "tokens": config.budget.tokens if args.budget_tokens is None else args.budget_tokens,
        }
    return build(as_dict(config) | given, MixConfig, "the mix")


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Generate a KD dataset from a teacher."""
    parser = argparse.ArgumentParser(
        prog="distill kd-dataset",
        description="A teacher's answers as a KD dataset. Run it again to go on after a stop.",
        epilog="Exit code 75: stopped early (Ctrl-C, budget, quota, teacher away), and nothing is lost. An endpoint's "
        "key is read from TEACHER_API_KEY, MOONSHOT_API_KEY or OPENAI_API_KEY.",
    )
    parser.add_argument("--out", required=True, help="the dataset to write, F.jsonl")
    parser.add_argument("--teacher", required=True, help="http(s)://, gguf:FILE-or-package, hf:org/model or a folder")
    parser.add_argument("--total", type=int, required=True, help="records wanted")
    parser.add_argument("--model", help="the endpoint's model id")
    parser.add_argument("--config", type=Path, help=f"a mix (default: {DEFAULT_CONFIG} where it exists)")
    parser.add_argument("--seed", type=int, default=0, help="which prompts, in which order")
    parser.add_argument("--budget-usd", type=float, help="US dollars that may be spent, over all starts")
    parser.add_argument("--budget-tokens", type=int, help="tokens that may be spent, over all starts")
    parser.add_argument("--fork", action="store_true", help="go on in a journal that was begun with other settings")
    parser.add_argument("--dry-run", action="store_true", help="show the mix; ask nothing")
    args = parser.parse_args(argv)
    config = _config(args)
    if args.dry_run:
        local = parse_spec(args.teacher).kind == "gguf"
        space = config.context - (config.max_tokens or LOCAL_TOKENS) if local else None
        for line in describe(open_prompts(config, args.seed, tools=True, room=space), args.total):
            print(line)
        print("strata with tools are left out where the teacher makes no calls: the probe finds out")
        return 0
    made = make(args.out, args.teacher, args.total, config, seed=args.seed, fork=args.fork)
    header, n = made.header, made.header.counts
    kept = "text only, no distributions"
    if header.logprobs:
        engine = header.teacher.logits_engine or "the endpoint"
        kept = f"{n['completion_tokens']} top-{header.logprobs.k} distributions from {engine}"
    print(f"{args.out}: {n['records']} records ({n['train']} train, {n['val']} val; {n['rejected']} rejected) from "
          f"{header.teacher.text_engine}; {kept}; {made.spent}")  # fmt: skip
    for name, missing in made.short.items():
        print(f"stratum {name} is {missing} short of its {header.quotas[name]}: its prompts are used up, or too many "
              "answers were rejected")  # fmt: skip
    return 1 if made.short else 0
