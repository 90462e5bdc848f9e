"""`python -m scripts.make_kd_mix_hardened --out F --teacher SPEC --total N`: a teacher's answers as a KD dataset.

What comes back is in the journal, on disk, before it counts; a run that was killed goes on where it stopped, and the
dataset is built from the journal alone (distill/data/build.py).
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from distill.artifacts import canonical_json, require_replaceable_file, sweep
from distill.config import as_dict, build, load
from distill.data import records as kd
from distill.data.asking import (
    depends_on,
    known_unprobed,
    longest_answer,
    protocol_of,
    require_same_run,
    room,
    streams,
)
from distill.data.budget import Budget, OutOfBudget, usd
from distill.data.build import Built, Shortfall, run_id, write
from distill.data.dry_run import Forecast
from distill.data.generation import Generation, Interrupts, Plan
from distill.data.journal import JOURNAL, RUN, Journal, Totals
from distill.data.mix_config import MixConfig
from distill.data.prompts.stream import MixFiles, named, open_prompts, read_files
from distill.data.sender import Sender
from distill.data.status import Status
from distill.data.teacher.admission import WINDOW, Admission
from distill.data.teacher.opening import (
    Opened,
    capabilities_of,
    open_teacher,
    server_name,
)
from distill.data.teacher.spec import Spec, parse_spec
from distill.errors import GO_ON, InputError, Paused, stage_main
from distill.tokenizer import Tokenizer

DEFAULT_CONFIG = Path("configs/kd_mix.yaml")


class Job(NamedTuple):
    """What a run is asked to do."""

    out: Path
    spec: Spec
    total: int
    config: MixConfig
    files: MixFiles
    seed: int
    fork: bool = False


class Made(NamedTuple):
    """What came of it."""

    header: kd.Header
    short: dict[str, Shortfall]
    """Strata that have fewer records than their quota."""
    spent: str


def make(
    out: str | Path, teacher: str, total: int, config: MixConfig, *, seed: int = 0, fork: bool = False,
    quiet: bool = False, name: str = "the mix",
) -> Made:  # fmt: skip
    """Generate a dataset at `out`, going on where an earlier run stopped; errors call the configuration `name`.

    Paused: stopped early, and the same command goes on. Where only the budget stopped it, a dataset of what was
    accepted is written first.
    """
    _require_some(total)
    spec = parse_spec(teacher)
    _require_ours(Path(out))
    if config.tokenizer and spec.kind == "endpoint":
        with named(name, "tokenizer"):
            Tokenizer.from_file(config.tokenizer)
    job = Job(Path(out), spec, total, config, read_files(config, name), seed, fork)
    status = Status(total, quiet=quiet)
    try:
        with Journal(kd.sidecar(out) / JOURNAL) as journal, status:
            _sweep(job.out)
            budget = Budget(config.budget, _spent(journal))
            status.spending(budget, priced=config.prices is not None)
            built, stopped = asyncio.run(_generate(job, journal, budget, status))
            status.phase("writing the dataset")
            header, short = write(job.out, built, journal, status)
    except KeyboardInterrupt:
        raise Paused(f"interrupted; {_so_far(status, total)}; {GO_ON}") from None
    except Paused as error:
        raise Paused(f"{error}; {_so_far(status, total)}") from error
    if stopped:
        raise Paused(f"{stopped}; {header.counts['records']:,} of {total:,} records are in {out}; raise the budget and "
                     f"{GO_ON}")  # fmt: skip
    money = f", {usd(budget.spent.cost)} USD" if config.prices else ""
    return Made(header, short, f"{budget.spent.tokens:,} tokens{money} spent")


def _so_far(status: Status, total: int) -> str:
    return f"{status.accepted:,} of {total:,} records are accepted, and the dataset is written at the end"


def _require_some(total: int) -> None:
    if total < 1:
        raise InputError(f"--total {total} must be at least 1")


def _require_ours(out: Path) -> None:
    """InputError if something is there that no run of ours has written, before anything is asked and paid."""
    require_replaceable_file(out)
    folder = kd.sidecar(out)
    if out.exists() and not any((folder / name).is_file() for name in ("header.json", JOURNAL)):
        raise InputError(f"--out {out}: a file that is no dataset of ours (no {folder.name} beside it) is in the way")


def _sweep(out: Path) -> None:
    """Remove what killed runs left half-written; the journal's lock is held."""
    sweep(out)
    for name in kd.SIDECAR_FILES:
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
    if opened.remark:
        status.say(f"  {opened.remark}")
    if not job.fork:  # before anything is paid
        require_same_run(journal, known_unprobed(opened, config, job.seed))
    can = await capabilities_of(opened, config, sender, journal, anew=job.fork)
    server = await server_name(opened, journal)
    protocol = protocol_of(opened, can, config, job.seed)
    if not job.fork:
        require_same_run(journal, depends_on(protocol))
    journal.keep("depends_on", canonical_json(depends_on(protocol)))
    for line in can.lines():
        status.say(f"  {line}")
    sender.unique_ids = can.unique_ids
    sender.stream = streams(protocol, can, config)
    prompts = open_prompts(config, job.seed, tools=can.tools, room=room(opened, config, protocol), files=job.files)
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
    built = Built(plan, prompts, protocol, can, server, job.spec, opened.tokenizer, config, job.seed)
    journal.keep(RUN + run_id(built), "")
    await journal.flush()
    return built, stopped


def _spent(journal: Journal) -> Totals:
    """What the journal's ledger counts as spent: settled, or perhaps served."""
    found = journal.totals()
    return found.get("settled", Totals()) + found.get("uncertain", Totals())


def _config(args: argparse.Namespace) -> tuple[MixConfig, str]:
    """The mix, with what the command line says in its place, and what errors call it."""
    name = str(args.config or DEFAULT_CONFIG)
    if args.config is None and not DEFAULT_CONFIG.is_file():
        config, name = MixConfig(), "the mix"
    else:
        config = load(name, MixConfig)
    given: dict[str, Any] = {"model": args.model or config.model}
    if args.budget_usd is not None or args.budget_tokens is not None:
        given["budget"] = {
            "usd": config.budget.usd if args.budget_usd is None else args.budget_usd,
            "tokens": config.budget.tokens if args.budget_tokens is None else args.budget_tokens,
        }
    return build(as_dict(config) | given, MixConfig, name), name


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
    parser.add_argument("--fork", action="store_true", help="go on in a journal of another teacher or other settings: "
                        "everything is asked anew, what was asked before is kept and counts as spent")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="show the mix; ask nothing")
    args = parser.parse_args(argv)
    config, name = _config(args)
    if args.dry_run:
        return _dry_run(args, config, name)
    made = make(args.out, args.teacher, args.total, config, seed=args.seed, fork=args.fork, name=name)
    for line in _summary(args.out, made, config):
        print(line)
    return 1 if made.short else 0


def _dry_run(args: argparse.Namespace, config: MixConfig, name: str) -> int:
    _require_some(args.total)
    kind = parse_spec(args.teacher).kind
    local = kind != "endpoint"
    room = config.context - longest_answer(config, local=local, reasons=False) if kind == "gguf" else None
    prompts = open_prompts(config, args.seed, tools=True, room=room, files=read_files(config, name))
    for line in Forecast(prompts, args.total, config, local=local, out=Path(args.out)).lines():
        print(line)
    print("strata with tools are left out where the teacher makes no calls: the probe finds out")
    return 0


def _summary(out: str, made: Made, config: MixConfig) -> Iterator[str]:
    """What was made, and what it lacks."""
    header, n = made.header, made.header.counts
    kept = "text only, no distributions"
    if header.logprobs:
        engine = header.teacher.logits_engine or "the endpoint"
        kept = f"{n['completion_tokens']} top-{header.logprobs.k} distributions from {engine}"
    where = f"at {header.teacher.host}" if header.teacher.host else f"in {header.teacher.text_engine}"
    yield (f"{out}: {n['records']} records ({n['train']} train, {n['val']} val; {n['rejected']} rejected) from "
           f"{header.teacher.model} {where}; {kept}; {made.spent}")  # fmt: skip
    yield f"report: {kd.sidecar(out) / 'report.html'}"
    if not n["val"] and config.val_share:
        yield (f"nothing is held out for validation: val_share {config.val_share:g} of {n['records']} records, by a "
               "hash of each id, came to none; a larger --total or val_share gives some")  # fmt: skip
    for name, shortfall in made.short.items():
        yield f"stratum {name} is {shortfall.missing} short of its {header.quotas[name]}: {shortfall.why}"
