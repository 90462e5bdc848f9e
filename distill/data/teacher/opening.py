"""From `--teacher` to a teacher that is ready: who it is, how it is reached, what it can do."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from distill import chat
from distill.artifacts import canonical_json, sha256_text
from distill.data.journal import Journal
from distill.data.mix_config import MixConfig
from distill.data.schema import Teacher
from distill.data.sender import Sender
from distill.data.teacher import wire
from distill.data.teacher.probe import WEATHER, Capabilities, probe
from distill.data.teacher.server_name import server_of
from distill.data.teacher.spec import Spec
from distill.data.teacher.transport import LOOPBACK, HttpTransport, Transport, only_model, unlisted_model
from distill.tokenizer import TURN_END, Tokenizer


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
    remark: str = ""
    """What looks odd about it, for people."""


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
        remark = unlisted_model(model, transport.models)
        return Opened(transport, identity, "chat", config.concurrency, transport.host in LOOPBACK, tokenizer, remark)
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
    prompt = chat.render([asked], [WEATHER], add_generation_prompt=True)
    body = {"model": opened.identity.model, "prompt": prompt, "max_tokens": 64, "temperature": 0.0, "top_p": 1.0,
            "seed": 0, "stop": [TURN_END]}  # fmt: skip
    exchange = await sender.probe(body, False)
    try:
        parsed = chat.parse(wire.read_reply(exchange.body).content)
    except wire.ReplyError:
        return False
    return not parsed.malformed and [call.name for call in parsed.calls] == ["get_weather"]
