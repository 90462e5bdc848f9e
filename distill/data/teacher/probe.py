"""What an endpoint can do, found with at most five cheap calls before any money is spent on data.

Known quirks that this looks for: llama.cpp refuses log-probabilities with tools in a stream (ggml-org/llama.cpp#28478),
SGLang drops them where a parser of reasoning or tools is on (sgl-project/sglang#28456), Ollama drops the calls
(ollama/ollama#13092), OpenAI's thinking models take max_completion_tokens and no log-probabilities.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any, Literal, NamedTuple

import msgspec

from distill.data.teacher.outcomes import judge
from distill.data.teacher.wire import Exchange, Reply
from distill.errors import InputError

MOST_CALLS = 5
MOST_TOKENS = 256
"""Of each answer, unless a teacher thinks for longer before it calls."""
_LONG_THOUGHT = 2048
MOST_LOGPROBS = 20
"""Alternatives a token that are asked for: what most servers allow at most."""
_QUESTION = "Use get_weather to look up the weather in Paris and in Oslo. Make both calls at once."
WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city now.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
"""The tool that a teacher is asked to call."""


class Capabilities(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the probe found. The same server gives the same values."""

    streaming: bool = False
    stream_usage: bool = False
    """Whether a stream ends with what it used."""
    tools: bool = False
    """Whether a call came back as one when it was asked for."""
    parallel_calls: bool = False
    reasoning_field: str | None = None
    """Where reasoning came: reasoning_content, reasoning, or content (between think tags)."""
    top_logprobs: int = 0
    """Alternatives a token that can be had; 0: no usable distributions."""
    logprobs_with_tools: bool = False
    """Whether both come in one answer."""
    logprobs_in_stream: bool = False
    usage: bool = False
    unique_ids: bool = False
    """Whether answers are numbered, so that one given twice is seen."""
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    notes: tuple[str, ...] = ()
    """What was missing or odd, one line each."""
    refusals: dict[str, str] = {}
    """What was refused, and the server's words for it, which may differ each time."""

    def facts(self) -> dict[str, Any]:
        """All but the words of a server: what a dataset may depend on."""
        refused = tuple(f"{what}: refused" for what in self.refusals)
        return msgspec.to_builtins(msgspec.structs.replace(self, notes=self.notes + refused, refusals={}))

    def lines(self) -> list[str]:
        """A few plain lines for people."""
        streams = f"yes, {'with' if self.stream_usage else 'without'} usage" if self.streaming else "no"
        calls = "yes, several at once" if self.parallel_calls else "yes, one at a time"
        found = f"top {self.top_logprobs} of a token"
        if self.tools and not self.logprobs_with_tools:
            found += ", not together with tool calls"
        if self.streaming and not self.logprobs_in_stream:
            found += ", not in streams"
        return [
            f"streams: {streams}",
            f"tool calls: {calls if self.tools else 'none came'}",
            f"reasoning: {'in ' + self.reasoning_field if self.reasoning_field else 'none seen'}",
            f"distributions: {found if self.top_logprobs else 'none: text only'}",
            f"usage: {'counted by the server' if self.usage else 'not told: every answer counts at its largest'}",
            *self.notes,
            *(f"{what}: refused ({words})" for what, words in self.refusals.items()),
        ]


class _Ask(NamedTuple):
    """What one call tries at a time."""

    tools: bool = False
    logprobs: bool = False
    stream: bool = False

    @property
    def words(self) -> str:
        """For people."""
        named = (("a stream", self.stream), ("tools", self.tools), ("log-probabilities", self.logprobs))
        return " with ".join(name for name, on in named if on) or "a plain question"


class _Seen(NamedTuple):
    """An answer, or why there is none."""

    reply: Reply | None
    exchange: Exchange
    detail: str

    @property
    def depth(self) -> int:
        """Alternatives of a token in it."""
        return max((len(row.top) for row in (self.reply and self.reply.logprobs) or ()), default=0)

    @property
    def cut_off(self) -> bool:
        """Whether the answer ended before a call could come."""
        return self.reply is not None and self.reply.finish == "length" and not self.reply.calls

    @property
    def doubtful(self) -> bool:
        """Whether it lacks what most servers tell with every answer."""
        return self.reply is not None and (self.reply.usage is None or "bad_logprobs" in self.reply.flags)

    @property
    def n_calls(self) -> int:
        return len(self.reply.calls) if self.reply else 0


async def probe(post: Callable[[dict[str, Any], bool], Awaitable[Exchange]], model: str) -> Capabilities:
    """Ask at most MOST_CALLS times through `post(body, stream)`, which retries what may pass and keeps the ledger.

    InputError where not even a plain answer comes.
    """
    prober = _Prober(post, model)
    await prober.run()
    return prober.capabilities()


class _Prober:
    def __init__(self, post: Callable[[dict[str, Any], bool], Awaitable[Exchange]], model: str) -> None:
        self._post, self._model = post, model
        self._left = MOST_CALLS
        self._most = MOST_TOKENS
        self._k = MOST_LOGPROBS
        self._field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
        self._temperature = self._usage_option = True
        self._seen: dict[_Ask, _Seen] = {}
        self._notes: list[str] = []

    async def run(self) -> None:
        """Everything at once first; then apart what did not come; then the same in a stream."""
        both = await self._ask(_Ask(tools=True, logprobs=True))
        refused = both.detail.lower() if both.reply is None else ""
        if not both.depth and ("tool" in refused or "logprob" not in refused):
            await self._ask(_Ask(logprobs=True))
        if not both.n_calls and self._left > 1:
            await self._ask(_Ask(tools=True))
        tools, logprobs = any(s.n_calls for s in self._seen.values()), any(s.depth for s in self._seen.values())
        if self._left:
            streamed = await self._ask(_Ask(tools, logprobs, stream=True))
            if streamed.reply is None and self._left and (tools or logprobs):
                await self._ask(_Ask(stream=True))
        if not self._answered and self._left:
            await self._ask(_Ask())
        if not self._answered:
            last = list(self._seen.values())[-1]
            raise InputError(f"the teacher gives no usable answer: {last.detail}")

    @property
    def _answered(self) -> bool:
        return any(seen.reply for seen in self._seen.values())

    async def _ask(self, ask: _Ask) -> _Seen:
        """One question, put differently as long as the server says what it does not like and calls are left."""
        if not self._left:
            return _Seen(None, Exchange(0, {}, b"", "", False), "not asked")
        again = False
        while True:
            self._left -= 1
            exchange = await self._post(self._body(ask), ask.stream)
            outcome = judge(exchange, 0.0)
            seen = self._seen[ask] = _Seen(outcome.reply, exchange, outcome.detail)
            if outcome.kind == "refused":
                raise InputError(f"the teacher refuses: {outcome.detail}")
            if seen.doubtful and not again and self._left > 2:
                again = True  # it may have been an accident
            elif self._left and ask.tools and self._most < _LONG_THOUGHT and seen.cut_off:
                self._most = _LONG_THOUGHT
            elif seen.reply is not None or not self._left or not self._adapt(ask, seen):
                return seen

    def _body(self, ask: _Ask) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self._model, self._field: self._most}
        body["messages"] = [{"role": "user", "content": _QUESTION}]
        if self._temperature:
            body["temperature"] = 0
        if ask.tools:
            body["tools"] = [{"type": "function", "function": WEATHER}]
        if ask.logprobs:
            body |= {"logprobs": True, "top_logprobs": self._k}
        if ask.stream and self._usage_option:
            body["stream_options"] = {"include_usage": True}
        return body

    def _adapt(self, ask: _Ask, seen: _Seen) -> bool:
        """Change the way of asking by what the error says; whether there is something to try again."""
        if seen.exchange.status < 400:
            return False
        text = seen.detail.lower()
        if "max_completion_tokens" in text and self._field == "max_tokens":
            self._field = "max_completion_tokens"
            return True
        if "temperature" in text and self._temperature:
            self._temperature = False
            self._notes.append("temperature 0 is refused")
            return True
        if "stream_options" in text and ask.stream and self._usage_option:
            self._usage_option = False
            return True
        if ask.logprobs and "logprob" in text:
            # "must be at most 5", "between 0 and 5", "greater than max allowed: 5"
            smaller = [int(n) for n in re.findall(r"(?<![\w.])\d{1,2}(?![\w.]*\d)", text) if 0 < int(n) < self._k]
            if smaller:
                self._k = max(smaller)
                return True
        return False

    def capabilities(self) -> Capabilities:
        """What all the answers together show."""
        answers = {ask: seen for ask, seen in self._seen.items() if seen.reply}
        streams = [s for ask, s in answers.items() if ask.stream and "event-stream" in
                   s.exchange.headers.get("content-type", "")]  # fmt: skip
        plain = [s for ask, s in answers.items() if not ask.stream]
        n_calls = max((s.n_calls for s in answers.values()), default=0)
        ids = {s.reply.id for s in answers.values() if s.reply}
        fields = [field for s in [*plain, *streams] if (field := _reasoning_field(s)) is not None]
        return Capabilities(
            streaming=bool(streams),
            stream_usage=any(s.reply and s.reply.usage for s in streams),
            tools=n_calls > 0,
            parallel_calls=n_calls > 1,
            reasoning_field=fields[0] if fields else None,
            top_logprobs=max((s.depth for s in answers.values()), default=0),
            logprobs_with_tools=any(s.depth and s.n_calls for ask, s in answers.items() if not ask.stream),
            logprobs_in_stream=any(s.depth for s in streams),
            usage=any(s.reply and s.reply.usage for s in plain),
            unique_ids=len(answers) > 1 and len(ids - {""}) == len(answers),
            max_tokens_field=self._field,
            notes=tuple(self._notes + self._remarks()),
            refusals={ask.words: seen.detail[:160] for ask, seen in self._seen.items() if seen.reply is None},
        )

    def _remarks(self) -> list[str]:
        """What was missing or odd."""
        remarks = []
        for ask, seen in self._seen.items():
            if seen.reply and seen.reply.flags:
                remarks.append(f"{ask.words}: {', '.join(seen.reply.flags)}")
        if any(ask.tools and seen.reply for ask, seen in self._seen.items()) and not any(
            seen.n_calls for seen in self._seen.values()
        ):
            remarks.append("tools are accepted, but the teacher made no call when asked to")
        return remarks


def _reasoning_field(seen: _Seen) -> str | None:
    if seen.reply is None or seen.reply.reasoning is None:
        return None
    if "thought_in_content" in seen.reply.flags:
        return "content"
    choices = msgspec.json.decode(seen.exchange.body)["choices"]
    message = next(choice for choice in choices if not choice.get("index")).get("message") or {}
    return "reasoning_content" if message.get("reasoning_content") else "reasoning"
