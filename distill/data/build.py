"""The dataset as a pure function of the journal, the prompts in their order, and the configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from distill.artifacts import sha256_text
from distill.config import as_dict
from distill.data import records as kd
from distill.data.budget import dollars
from distill.data.episodes import Accepted, Protocol, Rejected, episode, replay
from distill.data.generation import Plan, most_asked
from distill.data.journal import Journal
from distill.data.mix_config import OPERATIONAL, MixConfig
from distill.data.prompts.stream import Dropped, Prompt, PromptStream
from distill.data.schema import LogprobInfo, Usage, completion_ids
from distill.data.status import Status
from distill.data.store.distributions import Distribution, from_endpoint
from distill.data.targets import lay_out
from distill.data.teacher.probe import Capabilities
from distill.data.teacher.spec import Spec
from distill.data.teacher.wire import Reply
from distill.errors import DistillError
from distill.tokenizer import Tokenizer

_EXAMPLES = 50  # of dropped prompts, for each reason
STOPPED = "the run stopped early"
USED_UP = "prompts are used up"
"""Why a stratum is short: its prompts were not all asked, or all."""


class Built(NamedTuple):
    """What generation leaves to build the dataset from, beside the journal."""

    plan: Plan
    prompts: PromptStream
    protocol: Protocol
    capabilities: Capabilities
    server: str | None
    spec: Spec
    tokenizer: Tokenizer | None
    config: MixConfig
    seed: int


class Shortfall(NamedTuple):
    """Of a stratum: how many records are missing, why, and what helps."""

    missing: int
    why: str


_BAD_CALLS = "this teacher does not do what the stratum asks: leave it out of `strata`, or ask another teacher"
_ADVICE = {"length": "raise `max_tokens`", "fixture_miss": "add to `fixtures` what is called"} | dict.fromkeys(
    ("args", "unknown_tool", "schema", "too_many_calls", "no_call", "unexpected_call", "too_many_turns"), _BAD_CALLS
)  # fmt: skip
"""What helps against a reason for rejects; against others, reading them does."""


def write(out: Path, built: Built, journal: Journal, status: Status) -> tuple[kd.Header, dict[str, Shortfall]]:
    """Write the dataset, of a white box with the distributions that its logits give. Returns its header, and the strata
    that are short of their quota. DistillError if no answer was accepted."""
    builder = Builder(built, journal)
    records: Iterable[kd.Record] = builder.records()
    info: LogprobInfo | None = None
    distributions: Iterable[Distribution | None] | None = None
    if built.protocol.identity.logits_engine is not None:
        records = list(records)
        if records:
            info, distributions = _capture(built, out, records, status)
    elif built.protocol.top_logprobs:
        info = LogprobInfo(
            k=built.protocol.top_logprobs, temperature=1.0, kind="unknown", tail="log1mexp", codec=built.config.codec
        )
        distributions = builder.distributions()
    header = kd.write_dataset(
        out, records, _header(built, info), distributions=distributions, tokenizer=built.tokenizer,
        rejects=builder.rejects, finish=builder.finish, report=builder.report,
    )  # fmt: skip
    spool_of(out).unlink(missing_ok=True)
    return header, builder.shortfalls()


def run_id(built: Built) -> str:
    """That of the dataset."""
    return _header(built, None).run_id


def _header(built: Built, info: LogprobInfo | None) -> kd.Header:
    config = {name: value for name, value in as_dict(built.config).items() if name not in OPERATIONAL}
    return kd.make_header(
        config=config | {"seed": built.seed, "total": sum(built.plan.quotas.values())},
        sampling=msgspec.to_builtins(built.protocol.sampling), teacher=built.protocol.identity, prompts_sha256="",
        tokenizer=built.tokenizer, logprobs=info, licence=built.config.licence, quotas=built.plan.quotas,
        quota_tolerance=built.config.quota_tolerance, capabilities=built.capabilities.facts(),
        decontamination=built.prompts.decontamination, near_duplicates=built.config.near_duplicates,
    )  # fmt: skip


def _capture(
    built: Built, out: Path, records: list[kd.Record], status: Status
) -> tuple[LogprobInfo, Iterable[Distribution]]:
    """The distributions of a white box, read from its logits now."""
    from distill.data.store import capture
    from distill.data.teacher import local as local_teachers

    status.phase("loading the teacher for its logits")
    config = built.config
    box = local_teachers.load_white_box(built.spec, dtype=config.capture_dtype)
    status.phase("reading the teacher's logits", len(records))
    info = LogprobInfo(k=config.top_k, temperature=1.0, kind="raw", tail="logsumexp", codec=config.codec)
    teacher = built.protocol.identity
    return info, capture.teacher_distributions(
        box, records, config.top_k, identity=f"{teacher.weights_sha256 or teacher.model} {config.capture_dtype}",
        spool=spool_of(out), on_tokens=status.captured,
    )  # fmt: skip


def why_short(quota: int, records: int, reasons: Counter[str], *, exhausted: bool) -> str:
    """Why a stratum has fewer records than its quota; `reasons` are those of its rejects."""
    ordered = sorted(reasons.items(), key=lambda item: (-item[1], item[0]))
    rejected = sum(n for _, n in ordered)
    asked = records + rejected
    listed = f" ({', '.join(f'{reason} {n}' for reason, n in ordered)})" if ordered else ""
    if asked >= most_asked(quota):
        return (f"too many answers were rejected, {rejected} of {asked}{listed}; "
                f"{_ADVICE.get(ordered[0][0], 'rejects.jsonl has each of them')}")  # fmt: skip
    if not exhausted:
        return STOPPED
    also = f", and {rejected} answers were rejected{listed}" if rejected else ""
    return (f"its {asked} {USED_UP}{also}; give it less weight, or more prompts"
            " (`sources`), or lower --total")  # fmt: skip


def cost_per_record(cost: Decimal, records: int) -> Decimal:
    """For report.json."""
    return round(cost / records, 12)


def examples_of(dropped: Sequence[Dropped]) -> list[dict[str, str]]:
    """The first of each reason: many duplicates must not hide what an evaluation set holds."""
    taken: Counter[str] = Counter()
    out = []
    for drop in dropped:
        taken[drop.reason] += 1
        if taken[drop.reason] <= _EXAMPLES:
            out.append(drop._asdict())
    return out


def spool_of(out: Path) -> Path:
    """Where captured distributions wait for the dataset."""
    return kd.sidecar(out) / "capture.spool"


class Builder:
    """Makes a record of every episode in the journal. What it counts is complete when `records` has ended."""

    def __init__(self, built: Built, journal: Journal) -> None:
        self._built, self._protocol, self._journal = built, built.protocol, journal
        self._tokenizer, self._prices = built.tokenizer, built.config.prices
        self.rejects: list[dict[str, Any]] = []
        self.strata: Counter[str] = Counter()
        self.models: set[str] = set()
        self.system_fingerprints: set[str] = set()
        self.cost = 0
        self.unaligned = 0
        """Records whose log-probabilities are not those of the student's tokens."""
        self._ids: list[str] = []
        self._replies: tuple[Reply, ...] = ()
        self._last: kd.Record | None = None

    def records(self) -> Iterator[kd.Record]:
        """The accepted episodes, in the order of the prompts; of each stratum as many as its quota."""
        asked: Counter[str] = Counter()
        quotas, broker = self._built.plan.quotas, self._built.prompts.broker
        for prompt in self._built.plan.pulled:
            name = prompt.stratum
            if self.strata[name] >= quotas.get(name, 0) or asked[name] >= most_asked(quotas[name]):
                continue
            end = replay(episode(prompt, self._protocol, broker), self._journal.answer)
            if isinstance(end, Rejected):
                self._reject(prompt, end)
            elif isinstance(end, Accepted):
                self.strata[name] += 1
                yield self._record(prompt, end)
            else:
                continue
            asked[name] += 1

    def distributions(self) -> Iterator[Distribution | None]:
        """Of the record that `records` gave last, what the endpoint said of its tokens; in step with it."""
        assert self._tokenizer is not None
        while self._last is not None:
            rows = [reply.logprobs for reply in self._replies]
            item = from_endpoint(
                rows, completion_ids(self._last, self._tokenizer), self._tokenizer, k=self._protocol.top_logprobs
            )
            self.unaligned += item is None
            yield item

    def finish(self, header: kd.Header) -> kd.Header:
        """The header with what is known when all records are made."""
        if not self._ids:
            raise DistillError(f"no answer was accepted; rejected: {dict(self._reasons())}")
        teacher = msgspec.structs.replace(
            header.teacher, server=self._built.server, models_seen=tuple(sorted(self.models)),
            system_fingerprints_seen=tuple(sorted(self.system_fingerprints)),
        )  # fmt: skip
        prompts = sha256_text("\n".join(self._ids))
        return msgspec.structs.replace(header, teacher=teacher, prompts_sha256=prompts, cost_usd=self._cost_usd())

    def report(self) -> dict[str, Any]:
        """How the dataset came about; the same for the same answers."""
        prompts, short = self._built.prompts, self.shortfalls()
        strata = {
            name: {"quota": quota, "records": self.strata[name], "rejected": self._reasons(name).total()}
            | ({"short": short[name].why} if name in short else {})
            for name, quota in self._built.plan.quotas.items()
        }
        cost = self._cost_usd()
        return {
            "rejected": dict(sorted(self._reasons().items())),
            "strata": strata,
            "left_out": prompts.left_out,
            "prompts_dropped": {f"{name}: {reason}": n for (name, reason), n in sorted(prompts.drops.items())},
            "dropped_examples": examples_of(prompts.dropped),
            "unaligned_logprobs": self.unaligned,
            "cost_usd": cost,
            "cost_usd_per_record": None if cost is None else cost_per_record(cost, len(self._ids)),
        }

    def shortfalls(self) -> dict[str, Shortfall]:
        """Strata that have fewer records than their quota."""
        quotas = self._built.plan.quotas.items()
        return {name: Shortfall(quota - self.strata[name], self._why_short(name, quota))
                for name, quota in quotas if self.strata[name] < quota}  # fmt: skip

    def _why_short(self, name: str, quota: int) -> str:
        return why_short(quota, self.strata[name], self._reasons(name), exhausted=name in self._built.prompts.exhausted)

    def _reasons(self, stratum: str | None = None) -> Counter[str]:
        return Counter(reject["reason"] for reject in self.rejects if stratum in (None, reject["stratum"]))

    def _cost_usd(self) -> Decimal | None:
        """What all answers, rejected ones included, cost."""
        return dollars(self.cost) if self._prices else None

    def _reject(self, prompt: Prompt, end: Rejected) -> None:
        # a server's own words on its errors differ from run to run
        detail = end.detail.partition(":")[0] if end.reason in ("http", "unanswered") else end.detail
        reject: dict[str, Any] = {"id": prompt.id, "stratum": prompt.stratum, "reason": end.reason, "detail": detail}
        self.rejects.append(reject | self._paid(end.usages))

    def _paid(self, usages: Sequence[Usage], answers: int = 0) -> dict[str, Any]:
        """What an episode cost; nothing where the server did not count one of its answers: the ledger knows more."""
        if self._prices is None or len(usages) < answers:
            return {}
        cost = sum(self._prices.cost(usage) for usage in usages)
        self.cost += cost
        return {"cost_usd": dollars(cost)}

    def _record(self, prompt: Prompt, end: Accepted) -> kd.Record:
        for reply in end.replies:
            self.models |= {reply.model} - {""}
            self.system_fingerprints |= {reply.system_fingerprint} - {""}
        layout = lay_out(end.messages, prompt.tools, self._tokenizer)
        usage = sum(end.usages, Usage())
        text = "".join(turn.content for turn in end.messages)
        self._ids.append(prompt.id)
        self._replies = end.replies
        self._last = kd.Record(
            id=prompt.id, prompt=prompt.text, teacher_text=kd.turn_text(end.messages[-1]),
            ground_truth=prompt.ground_truth, messages=end.messages, tools=list(prompt.tools), run_id="",
            split=kd.split_of(prompt.id, self._built.config.val_share), stratum=prompt.stratum, expect=prompt.expect,
            reasoning=end.replies[-1].reasoning, render=layout.rendered, targets=layout.targets,
            usage=usage if end.usages else None, provenance=end.provenance, flags=("crlf",) if "\r" in text else (),
            **self._paid(end.usages, len(end.replies)),
        )  # fmt: skip
        return self._last
