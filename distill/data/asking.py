"""How a teacher is asked, given what it can do, and whether a journal's answers were asked for in that way."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from distill.data.episodes import Protocol
from distill.data.journal import Journal
from distill.data.mix_config import MixConfig
from distill.data.teacher.opening import Opened
from distill.data.teacher.probe import Capabilities
from distill.data.teacher.spec import Sampling
from distill.errors import InputError

_LONG_ANSWER = 2048  # tokens; above it, gateways lose patience with a connection on which nothing moves


def protocol_of(opened: Opened, can: Capabilities, config: MixConfig, seed: int) -> Protocol:
    """How this teacher is asked, given what it can do."""
    local = opened.form == "completions"
    most = longest_answer(config, local=local, reasons=can.reasoning_field is not None)
    top = min(config.top_k, can.top_logprobs) if config.tokenizer and not local else 0
    field = can.reasoning_field if can.reasoning_field not in (None, "content") else None
    return Protocol(
        opened.identity, opened.form, Sampling(most, config.temperature, config.top_p), seed,
        max_turns=config.max_turns, top_logprobs=top, logprobs_with_tools=can.logprobs_with_tools,
        replay_reasoning=field, max_tokens_field=can.max_tokens_field, learn_reasoning=config.reasoning == "learn",
    )  # fmt: skip


def longest_answer(config: MixConfig, *, local: bool, reasons: bool) -> int:
    """Most tokens of an answer."""
    return config.max_tokens or (256 if local else 16384 if reasons else 1024)


def streams(protocol: Protocol, can: Capabilities, config: MixConfig) -> bool:
    """Whether answers are streamed."""
    if protocol.form == "completions" or (protocol.top_logprobs and not can.logprobs_in_stream):
        return False
    if config.stream is not None:
        return config.stream
    return can.streaming and can.stream_usage and protocol.sampling.max_tokens > _LONG_ANSWER


def room(opened: Opened, config: MixConfig, protocol: Protocol) -> int | None:
    """Tokens that a prompt may take; None where that is not known."""
    if opened.identity.kind != "gguf":
        return None
    return config.context - protocol.sampling.max_tokens


def depends_on(protocol: Protocol) -> dict[str, object]:
    """What every answer of a run depends on, flat: a journal that was begun with other values is another run's."""
    identity = {f"teacher.{name}": value for name, value in msgspec.to_builtins(protocol.identity).items()}
    sampling = {name: value for name, value in msgspec.to_builtins(protocol.sampling).items()}
    return identity | sampling | {"seed": protocol.seed, "top_logprobs": protocol.top_logprobs, "form": protocol.form}


def known_unprobed(opened: Opened, config: MixConfig, seed: int) -> dict[str, object]:
    """As much of `depends_on` as is known before anything is asked."""
    known = depends_on(protocol_of(opened, Capabilities(), config, seed))
    probed = {"top_logprobs"} if config.max_tokens else {"top_logprobs", "max_tokens"}
    return {name: value for name, value in known.items() if name not in probed}


def require_same_run(journal: Journal, now: Mapping[str, object]) -> None:
    """InputError if the journal's answers were given by another teacher or under other settings: none would be used."""
    before = msgspec.json.decode(journal.meta("depends_on") or "{}", type=dict[str, object])
    changed = [f"{name} was {before[name]}, is {now[name]}" for name in sorted(before.keys() & now.keys())
               if before[name] != now[name]]  # fmt: skip
    if changed:
        raise InputError(f"{journal.path} is of another run: {'; '.join(changed)}. --fork goes on in it: "
                         "everything is asked anew, what was asked before is kept and counts as spent; "
                         "another --out leaves it alone")  # fmt: skip
