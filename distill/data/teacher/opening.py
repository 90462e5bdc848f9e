"""From `--teacher` to a teacher that is ready: who it is, how it is reached, what it can do, how it is asked."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from distill import chat
from distill.artifacts import canonical_json, sha256_text
from distill.data.episodes import Protocol
from distill.data.journal import Journal
from distill.data.mix_config import MixConfig
from distill.data.schema import Teacher
from distill.data.sender import Sender
from distill.data.teacher import wire
from distill.data.teacher.probe import Capabilities, probe
from distill.data.teacher.server_name import server_of
from distill.data.teacher.spec import Sampling, Spec
from distill.data.teacher.transport import LOOPBACK, HttpTransport, Transport, only_model
from distill.tokenizer import TURN_END, Tokenizer

LOCAL_TOKENS = 256
"""Longest answer of a local teacher where the mix does not say."""
_LONG_ANSWER = 2048  # tokens; above it, gateways lose patience with a connection on which nothing moves
_TOOL = {
    "name": "get_weather",
    "description": "The weather in a city now.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


class Opened(NamedTuple):
    """A teacher that can be asked."""

    transport: Transport
    identity: Teacher
    form: Literal["chat", "completions"]
    most: int
    """Requests in flight that it is worth having."""
    here: bool
    """On this machine: nobody else asks it, so there is no need to begin with a few requests."""
    tokenizer: Tokenizer | None
    """The student's: a local teacher's own, or the one that the configuration names."""


async def open_teacher(spec: Spec, config: MixConfig) -> Opened:
    """Connect to an endpoint, or start a local teacher. InputError where that fails."""
    if spec.kind == "endpoint":
        tokenizer = Tokenizer.from_file(config.tokenizer) if config.tokenizer else None
        transport = await HttpTransport.connect(
            spec.target, timeout_s=config.timeout_s, deadline_s=config.deadline_s, connections=config.concurrency
        )
        try:
            model = config.model or only_model(spec.target, transport.models)
        except BaseException:
            await transport.close()
            raise
        identity = Teacher("endpoint", model, text_engine="OpenAI-compatible endpoint", host=transport.host)
        return Opened(transport, identity, "chat", config.concurrency, transport.host in LOOPBACK, tokenizer)
    from distill.data.teacher import local as local_teachers

    identity, tokenizer = local_teachers.identity_of(spec), local_teachers.load_tokenizer(spec)
    local = await local_teachers.open_local(
        spec, identity, concurrency=config.slots, context=config.context, timeout_s=config.timeout_s,
        deadline_s=config.deadline_s, dtype=config.capture_dtype,
    )  # fmt: skip
    return Opened(local, identity, "completions", config.slots, True, tokenizer)


async def capabilities_of(
    opened: Opened, config: MixConfig, sender: Sender, journal: Journal, *, anew: bool
) -> Capabilities:
    """What a teacher can do: probed once, or `anew`, and kept in the journal, since a run's requests depend on it."""
    name = "capabilities/" + sha256_text(canonical_json(msgspec.to_builtins(opened.identity)))[:16]
    if not anew and (kept := journal.meta(name)) is not None:
        return msgspec.json.decode(kept, type=Capabilities)
    if opened.form == "chat":
        found = await probe(sender.probe, opened.identity.model)
    else:
        tools = await _calls_in_our_template(opened, sender)
        found = Capabilities(usage=True, tools=tools, top_logprobs=config.top_k, logprobs_with_tools=True)
    journal.keep(name, msgspec.json.encode(found).decode())
    return found


async def server_name(opened: Opened, journal: Journal) -> str | None:
    """What a server on this machine calls itself; asked once, then read from the journal."""
    if not isinstance(opened.transport, HttpTransport):
        return None
    kept = journal.meta("server")
    if kept is None:
        kept = await server_of(opened.transport) or ""
        journal.keep("server", kept)
    return kept or None


async def _calls_in_our_template(opened: Opened, sender: Sender) -> bool:
    """Whether a model that reads our own rendering writes a well-formed call when asked for one."""
    asked = chat.Message("user", "What is the weather in Oslo now? Call the function.")
    prompt = chat.render([asked], [_TOOL], add_generation_prompt=True)
    body = {"model": opened.identity.model, "prompt": prompt, "max_tokens": 64, "temperature": 0.0, "top_p": 1.0,
            "seed": 0, "stop": [TURN_END]}  # fmt: skip
    exchange = await sender.probe(body, False)
    try:
        parsed = chat.parse(wire.read_reply(exchange.body).content)
    except wire.ReplyError:
        return False
    return not parsed.malformed and [call.name for call in parsed.calls] == ["get_weather"]


def protocol_of(opened: Opened, can: Capabilities, config: MixConfig, seed: int) -> Protocol:
    """How this teacher is asked, given what it can do."""
    local = opened.form == "completions"
    most = config.max_tokens or (LOCAL_TOKENS if local else 16384 if can.reasoning_field else 1024)
    top = min(config.top_k, can.top_logprobs) if config.tokenizer and not local else 0
    field = can.reasoning_field if can.reasoning_field not in (None, "content") else None
    return Protocol(
        opened.identity, opened.form, Sampling(most, config.temperature, config.top_p), seed,
        max_turns=config.max_turns, top_logprobs=top, logprobs_with_tools=can.logprobs_with_tools,
        replay_reasoning=field, max_tokens_field=can.max_tokens_field, learn_reasoning=config.reasoning == "learn",
    )  # fmt: skip


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
