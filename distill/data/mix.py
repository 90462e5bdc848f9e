"""`python -m scripts.make_kd_mix_hardened --out F --teacher SPEC --total N`: a teacher's answers as a KD dataset.

Prompts are asked in a fixed order until N answers are accepted. Every answer is in the journal, on disk, before it
counts; a run that was killed goes on where it stopped, and the dataset is built from the journal alone.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from distill import chat
from distill.artifacts import canonical_json, sha256_text
from distill.config import as_dict, load
from distill.data import records as kd
from distill.data.journal import Journal
from distill.data.prompts import STRATA, Prompt, prompts
from distill.data.status import Status
from distill.data.targets import targets_of
from distill.data.teachers import Answer, Asker, Endpoint, Sampling, Spec, Unreachable, parse_spec, reject_of
from distill.errors import DistillError, InputError, Paused, stage_main
from distill.tokenizer import Tokenizer

DEFAULT_CONFIG = Path("configs/kd_mix.yaml")
_OPERATIONAL = {"concurrency", "timeout_s", "attempts", "context"}  # they change no answer
_DOWN_AFTER = 3  # requests in a row without any answer: the teacher is down


class MixConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """configs/kd_mix.yaml: how a teacher is asked."""

    model: str | None = None
    """The endpoint's model id; null takes the only one that it lists."""
    max_tokens: int = 256
    """Longest answer; one that is cut off is rejected."""
    temperature: float = 0.7
    top_p: float = 0.95
    concurrency: int = 16
    """Requests in flight."""
    timeout_s: float = 120.0
    """Longest wait for one answer."""
    attempts: int = 6
    """Tries at one request before the teacher counts as not answering."""
    context: int = 1024
    """Tokens of context for each concurrent request of a gguf: teacher."""
    tokenizer: str | None = None
    """The student's tokenizer.json for an endpoint's text; a local teacher brings its own."""
    top_k: int = 50
    """Entries of the teacher's distribution kept for each token, of a teacher whose logits can be read."""
    logprob_dtype: str = "F32"
    """F32 or F16: how log-probabilities are stored."""
    capture_dtype: str = "float32"
    """float32 or bfloat16: what the teacher's logits are computed in."""
    val_share: float = 0.1
    """Share of records held out for validation, by a hash of their id."""
    strata: dict[str, float] = msgspec.field(default_factory=lambda: dict.fromkeys(STRATA, 1.0))
    """Weight of each kind of prompt."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency", "attempts", "context", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 <= self.val_share < 1 or not 0 < self.top_p <= 1 or self.temperature < 0 or self.timeout_s <= 0:
            raise ValueError("val_share must be in [0, 1), top_p in (0, 1], temperature >= 0, timeout_s > 0")
        if self.logprob_dtype not in ("F32", "F16"):
            raise ValueError(f"logprob_dtype {self.logprob_dtype!r} is not F32 or F16")
        if self.capture_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"capture_dtype {self.capture_dtype!r} is not float32 or bfloat16")

    @property
    def sampling(self) -> Sampling:
        """What the teacher is told about decoding."""
        return Sampling(self.max_tokens, self.temperature, self.top_p)


class Request(NamedTuple):
    """A prompt with its seed and the key under which the journal knows it."""

    prompt: Prompt
    seed: int
    key: str


def requests(config: MixConfig, identity: kd.Teacher, seed: int, limit: int) -> Iterator[Request]:
    """At most `limit` requests. A key is a hash of everything that the answer depends on, so that an answer is reused
    only for the same question to the same teacher."""
    sampling = msgspec.to_builtins(config.sampling)
    for prompt in itertools.islice(prompts(config.strata, seed), limit):
        draw = int(sha256_text(f"kd-seed/1\n{seed}\n{prompt.id}")[:8], 16) & 0x7FFFFFFF
        body = {
            "teacher": msgspec.to_builtins(identity),
            "messages": msgspec.to_builtins(prompt.messages),
            "sampling": sampling,
            "seed": draw,
        }
        yield Request(prompt, draw, sha256_text("kd-request/1\n" + canonical_json(body)))


async def gather(asker: Asker, queue: Sequence[Request], total: int, config: MixConfig, journal: Journal,
                 status: Status) -> None:  # fmt: skip
    """Ask until `total` answers are accepted or the queue is empty. Paused if the teacher stops answering.

    A request is sent only while accepted answers and those in flight are fewer than `total`, so the set that was
    asked is the same at any concurrency.
    """
    pending: set[asyncio.Task[None]] = set()
    accepted = failures = refused = 0
    position = 0

    async def one(request: Request) -> None:
        nonlocal accepted, failures, refused
        try:
            answer = await asker.ask(request.prompt.messages, config.sampling, request.seed)
        except Unreachable as error:
            failures += 1
            status.trouble(str(error))
            if failures >= _DOWN_AFTER:
                raise Paused(f"the teacher stopped answering ({error}); run the same command again to go on") from error
            return
        failures = 0
        if answer.reject in ("http", "malformed") and not accepted:  # not journalled: what is wrong may be the set-up
            refused += 1
            if refused >= _DOWN_AFTER:
                raise InputError(f"the teacher gives no usable answer: {answer.detail}")
            return
        journal.add(request.key, answer)
        accepted += reject_of(answer) is None
        status.answered(answer, reject_of(answer))

    try:
        while True:
            while position < len(queue) and len(pending) < config.concurrency and accepted + len(pending) < total:
                request, position = queue[position], position + 1
                known = journal.get(request.key)
                if known is None:
                    pending.add(asyncio.create_task(one(request)))
                else:
                    accepted += reject_of(known) is None
                    status.resumed(reject_of(known))
            if not pending:
                return
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)


class Built(NamedTuple):
    """What the journal gives: records in the order of the prompts, and what was rejected."""

    records: list[kd.Record]
    rejects: list[dict[str, Any]]


def build(queue: Sequence[Request], journal: Journal, total: int, val_share: float) -> Built:
    """The dataset as a pure function of the journal and the queue of requests."""
    out = Built([], [])
    for request in queue:
        if len(out.records) == total:
            break
        answer = journal.get(request.key)
        if answer is None:
            continue
        if reason := reject_of(answer):
            out.rejects.append({"id": request.prompt.id, "reason": reason, "detail": answer.detail})
        else:
            out.records.append(_record(request.prompt, answer, val_share))
    return out


def _record(prompt: Prompt, answer: Answer, val_share: float) -> kd.Record:
    messages = (*prompt.messages, chat.Message("assistant", answer.text))
    return kd.Record(
        id=prompt.id,
        prompt=prompt.text,
        teacher_text=answer.text,
        ground_truth=prompt.ground_truth,
        messages=messages,
        run_id="",
        split=kd.split_of(prompt.id, val_share),
        stratum=prompt.stratum,
        reasoning=answer.reasoning,
        targets=targets_of(messages),
        usage=answer.usage,
    )


def make(
    out: str | Path, teacher: str, total: int, config: MixConfig, *, seed: int = 0, quiet: bool = False
) -> kd.Header:
    """Generate a dataset at `out`; going on where an earlier run stopped. Returns its header."""
    if total < 1:
        raise InputError(f"--total {total} must be at least 1")
    spec = parse_spec(teacher)
    journal = Journal(kd.sidecar(out) / "journal.jsonl")
    try:
        with Status(total, quiet=quiet) as status:
            queue, identity, tokenizer = asyncio.run(_collect(spec, total, config, seed, journal, status))
            built = build(queue, journal, total, config.val_share)
            if not built.records:
                reasons = Counter(reject["reason"] for reject in built.rejects)
                raise DistillError(f"no answer was accepted; rejected: {dict(reasons)}")
            return _write(Path(out), built, spec, identity, tokenizer, config, seed, status)
    except KeyboardInterrupt:
        raise Paused(f"interrupted; {len(journal)} answers are kept: run the same command again to go on") from None
    finally:
        journal.close()


async def _collect(
    spec: Spec, total: int, config: MixConfig, seed: int, journal: Journal, status: Status
) -> tuple[list[Request], kd.Teacher, Tokenizer | None]:
    asker, identity, tokenizer = await _open(spec, config, status)
    try:
        # up to half of all answers may be rejected before we give up on reaching the total
        queue = list(requests(config, identity, seed, 2 * total + 20))
        status.phase(f"asking {identity.model}")
        await gather(asker, queue, total, config, journal, status)
    finally:
        await asker.close()
    return queue, identity, tokenizer


async def _open(spec: Spec, config: MixConfig, status: Status) -> tuple[Asker, kd.Teacher, Tokenizer | None]:
    options: dict[str, Any] = {"concurrency": config.concurrency, "timeout_s": config.timeout_s,
                               "attempts": config.attempts}  # fmt: skip
    if spec.kind == "endpoint":
        tokenizer = Tokenizer.from_file(config.tokenizer) if config.tokenizer else None
        endpoint = await Endpoint.connect(spec.target, model=config.model, **options)
        return endpoint, endpoint.identity, tokenizer
    from distill.data import local_teachers

    status.phase("loading the teacher")
    identity = local_teachers.identity_of(spec)
    box_tokenizer = local_teachers.load_tokenizer(spec)
    asker = await local_teachers.open_local(
        spec, identity, context=config.context, dtype=config.capture_dtype, **options
    )
    return asker, identity, box_tokenizer


def _write(out: Path, built: Built, spec: Spec, identity: kd.Teacher, tokenizer: Tokenizer | None,
           config: MixConfig, seed: int, status: Status) -> kd.Header:  # fmt: skip
    """Capture the teacher's distributions where they can be read, and write the dataset."""
    info, distributions = None, None
    if spec.kind != "endpoint":
        from distill.data import capture, local_teachers

        status.phase("loading the teacher for its logits")
        box = local_teachers.load_white_box(spec, dtype=config.capture_dtype)
        status.capturing(len(built.records))
        info = msgspec.convert(
            {"k": config.top_k, "temperature": 1.0, "kind": "raw", "dtype": config.logprob_dtype}, kd.LogprobInfo
        )
        distributions = capture.teacher_distributions(box, built.records, config.top_k, on_tokens=status.captured)
    header = kd.make_header(
        config={name: value for name, value in as_dict(config).items() if name not in _OPERATIONAL} | {"seed": seed},
        sampling=msgspec.to_builtins(config.sampling),
        teacher=identity,
        prompts_sha256=sha256_text("\n".join(record.id for record in built.records)),
        tokenizer=tokenizer,
        logprobs=info,
    )
    reasons = Counter(reject["reason"] for reject in built.rejects)
    strata = Counter(record.stratum for record in built.records)
    return kd.write_dataset(
        out, built.records, header, distributions=distributions, tokenizer=tokenizer, rejects=built.rejects,
        report={"rejected": dict(sorted(reasons.items())), "strata": dict(sorted(strata.items()))},
    )  # fmt: skip


@stage_main
def main(argv: list[str] | None = None) -> int:
    """Generate a KD dataset from a teacher."""
    parser = argparse.ArgumentParser(
        prog="distill kd-dataset",
        description="A teacher's answers as a KD dataset. Run it again to go on after a stop.",
    )
    parser.add_argument("--out", required=True, help="the dataset to write, F.jsonl")
    parser.add_argument("--teacher", required=True, help="http(s)://, gguf:FILE-or-package, hf:org/model or a folder")
    parser.add_argument("--total", type=int, required=True, help="records wanted")
    parser.add_argument("--model", help="the endpoint's model id")
    parser.add_argument("--config", type=Path, help=f"a mix (default: {DEFAULT_CONFIG} where it exists)")
    parser.add_argument("--seed", type=int, default=0, help="which prompts, in which order")
    args = parser.parse_args(argv)
    if args.config is None and not DEFAULT_CONFIG.is_file():
        config = MixConfig()
    else:
        config = load(args.config or DEFAULT_CONFIG, MixConfig)
    if args.model:
        config = msgspec.structs.replace(config, model=args.model)
    header = make(args.out, args.teacher, args.total, config, seed=args.seed)
    n = header.counts
    kept = "text only, no distributions"
    if header.logprobs:
        kept = f"{n['completion_tokens']} top-{header.logprobs.k} distributions from {header.teacher.logits_engine}"
    print(f"{args.out}: {n['records']} records ({n['train']} train, {n['val']} val; {n['rejected']} rejected) from "
          f"{header.teacher.text_engine}; {kept}")  # fmt: skip
    if n["records"] < args.total:
        print(f"{args.total - n['records']} records short of --total {args.total}: too many answers were rejected")
        return 1
    return 0
