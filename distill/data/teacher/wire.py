"""What a chat or text completion says: its JSON body, or the server-sent events that add up to one. Pure: no I/O.

Read after the references of OpenAI, Moonshot, vLLM, SGLang, llama.cpp, Ollama and OpenRouter, which differ. A body is
hostile until read: every size is bounded and every type checked. Of a key that occurs twice the last one counts, as in
the json module; of several choices the one with index 0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from distill.data.schema import Usage

BOM = b"\xef\xbb\xbf"
LARGEST_BODY = 256 << 20
"""Bytes of one answer, streamed or not."""
_MOST_TOKENS = 1 << 31
_SENTINEL = -9000.0  # vLLM writes -9999.0 where it has no log-probability (vllm-project/vllm#17637)
_TOKEN_ID = re.compile(r"token_id:(\d{1,9})")


class Exchange(NamedTuple):
    """One request and what came of it."""

    status: int
    """Of HTTP; 0 where none came."""
    headers: Mapping[str, str]
    """Of the response, names in lower case."""
    body: bytes
    """Whole, or empty; of a stream, the equivalent plain body."""
    problem: str
    """What went wrong on the way, one line without the key; empty if the body is whole."""
    sent: bool
    """Whether the server may have started on it."""


class ReplyError(Exception):
    """Not a usable answer; the message says in one line what is wrong with it."""


class CallText(msgspec.Struct, frozen=True):
    """A call as the teacher wrote it. `arguments` is its own string, never repaired."""

    id: str
    name: str
    arguments: str


class TopToken(msgspec.Struct, frozen=True):
    """A candidate for one place. `bytes` and `id` where the server gives them."""

    token: str
    bytes: bytes | None
    id: int | None
    logprob: float


class TokenLogprob(msgspec.Struct, frozen=True):
    """A generated token and its most probable alternatives, best first as the server sorts them."""

    token: str
    bytes: bytes | None
    id: int | None
    logprob: float | None
    """None where the server gave a sentinel instead of a number."""
    top: tuple[TopToken, ...]


class Reply(msgspec.Struct, frozen=True):
    """A usable answer."""

    content: str
    reasoning: str | None
    calls: tuple[CallText, ...]
    finish: str | None
    usage: Usage | None
    """None where the server does not say, or says nonsense: then nobody knows what it cost."""
    model: str
    system_fingerprint: str
    logprobs: tuple[TokenLogprob, ...] | None
    flags: tuple[str, ...] = ()
    id: str = ""
    """As the server numbers its answers, where it does."""
    """What was unusual: thought_in_content, object_arguments, bad_usage, bad_logprobs, sentinel_logprobs."""


class WireFunction(msgspec.Struct):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class WireCall(msgspec.Struct):
    function: WireFunction | None = None
    id: str | None = None
    index: int | None = None


class WireMessage(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[WireCall] | None = None


class _Choice(msgspec.Struct):
    index: int | None = None
    message: WireMessage | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: msgspec.Raw = msgspec.Raw()


class _Body(msgspec.Struct):
    choices: list[_Choice]
    model: str | None = None
    system_fingerprint: str | None = None
    id: msgspec.Raw = msgspec.Raw()
    usage: msgspec.Raw = msgspec.Raw()


_BODY = msgspec.json.Decoder(_Body)


def read_reply(body: bytes) -> Reply:
    """Read a chat.completion or text_completion."""
    if len(body) > LARGEST_BODY:
        raise ReplyError(f"an answer of {len(body)} bytes")
    try:
        read = _BODY.decode(body.removeprefix(BOM))
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise ReplyError(one_line(error)) from error
    choice = next((c for c in read.choices if not c.index), None)
    if choice is None:
        raise ReplyError("no choices")
    message = choice.message or WireMessage(content=choice.text)
    if choice.message is None and choice.text is None:
        raise ReplyError("the choice holds neither a message nor a text")
    if choice.finish_reason is None:
        raise ReplyError("no finish_reason: the answer did not end")
    flags: list[str] = []
    content, reasoning = _thought(message, flags)
    usage, logprobs = _usage(read.usage, flags), _logprobs(choice.logprobs, flags)
    model, fingerprint = read.model or "", read.system_fingerprint or ""
    finish = choice.finish_reason
    return Reply(content, reasoning, _calls(message, flags), finish, usage, model, fingerprint, logprobs, tuple(flags),
                 bytes(read.id)[:200].decode(errors="replace"))  # fmt: skip


def _thought(message: WireMessage, flags: list[str]) -> tuple[str, str | None]:
    """Content and reasoning. A server without a reasoning parser leaves the thought at the head of the content, and
    without its opening tag where the template has already written that (DeepSeek R1, Kimi K2 Thinking)."""
    content, reasoning = message.content or "", message.reasoning_content or message.reasoning or None
    head, end, rest = content.partition("</think>")
    thought = head.lstrip().removeprefix("<think>")
    if reasoning is None and end and "<think>" not in thought:
        flags.append("thought_in_content")
        return rest.lstrip("\n"), thought.strip("\n") or None
    return content, reasoning


def _calls(message: WireMessage, flags: list[str]) -> tuple[CallText, ...]:
    calls = []
    for call in message.tool_calls or []:
        if call.function is None or not call.function.name:
            raise ReplyError("a tool call without a function's name")
        arguments = "" if call.function.arguments is None else call.function.arguments
        if isinstance(arguments, dict):  # not what the API says; whoever trains on it decides
            flags.append("object_arguments")
            arguments = msgspec.json.encode(arguments).decode()
        calls.append(CallText(call.id or "", call.function.name, arguments))
    return tuple(calls)


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int | None = None
    total_tokens: int | None = None
    cached_tokens: int | None = None
    prompt_cache_hit_tokens: int | None = None
    prompt_tokens_details: _PromptDetails | None = None
    completion_tokens_details: _CompletionDetails | None = None


_USAGE = msgspec.json.Decoder(_Usage | None)


def _usage(raw: msgspec.Raw, flags: list[str]) -> Usage | None:
    """Tokens used. Gemini and Grok leave reasoning out of completion_tokens but not out of total_tokens."""
    if not raw:
        return None
    try:
        read = _USAGE.decode(raw)
    except (msgspec.MsgspecError, RecursionError, ValueError):
        read = _Usage(-1)
    if read is None:
        return None
    prompt = read.prompt_tokens
    completion = max(read.completion_tokens or 0, (read.total_tokens or 0) - prompt)
    cached = read.cached_tokens or read.prompt_cache_hit_tokens or 0
    if read.prompt_tokens_details:
        cached = read.prompt_tokens_details.cached_tokens or cached
    reasoning = (read.completion_tokens_details and read.completion_tokens_details.reasoning_tokens) or 0
    if reasoning > completion:  # left out of completion_tokens, and there is no total
        completion += reasoning
    if not all(0 <= n <= _MOST_TOKENS for n in (prompt, read.completion_tokens or 0, completion, cached, reasoning)):
        flags.append("bad_usage")
        return None
    if not completion:
        return None  # an answer is never free: it does not say
    return Usage(prompt, completion, min(reasoning, completion), min(cached, prompt))


class _Top(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int] | None = None
    id: int | None = None


class _Token(_Top):
    top_logprobs: list[_Top] | None = None


class _Logprobs(msgspec.Struct):
    content: list[_Token] | None = None
    tokens: list[str] | None = None
    token_logprobs: list[float | None] | None = None
    top_logprobs: list[dict[str, float] | None] | None = None


_LOGPROBS = msgspec.json.Decoder(_Logprobs | None)


def _logprobs(raw: msgspec.Raw, flags: list[str]) -> tuple[TokenLogprob, ...] | None:
    """Of chat and llama.cpp's completions (`content`) or of OpenAI's legacy completions (parallel lists)."""
    if not raw:
        return None
    try:
        read = _LOGPROBS.decode(raw)
        if read is None:
            return None
        if read.content is not None:
            rows = [_row(_top(t), [_top(c) for c in t.top_logprobs or []]) for t in read.content]
        elif read.tokens is not None:
            rows = _legacy(read)
        else:
            return None
    except (msgspec.MsgspecError, RecursionError, ValueError):
        flags.append("bad_logprobs")
        return None
    if any(sentinel for _, sentinel in rows):
        flags.append("sentinel_logprobs")
    return tuple(row for row, _ in rows)


def _legacy(read: _Logprobs) -> list[tuple[TokenLogprob, bool]]:
    tokens, chosen = read.tokens or [], read.token_logprobs or []
    tops = read.top_logprobs or [None] * len(tokens)
    if not len(tokens) == len(chosen) == len(tops):
        raise ValueError("lists of different lengths")
    return [
        _row(_top(_Top(token, _SENTINEL if lp is None else lp)), [_top(_Top(t, p)) for t, p in (top or {}).items()])
        for token, lp, top in zip(tokens, chosen, tops)
    ]


def _top(read: _Top) -> TopToken:
    if match := _TOKEN_ID.fullmatch(read.token):
        return TopToken("", None, int(match[1]), read.logprob)  # vLLM's return_tokens_as_token_ids: the text is lost
    return TopToken(read.token, None if read.bytes is None else bytes(read.bytes), read.id, read.logprob)


def _row(chosen: TopToken, top: list[TopToken]) -> tuple[TokenLogprob, bool]:
    """A token with its alternatives, and whether a sentinel stood among them."""
    kept = tuple(candidate for candidate in top if candidate.logprob > _SENTINEL)
    known = chosen.logprob > _SENTINEL
    row = TokenLogprob(chosen.token, chosen.bytes, chosen.id, chosen.logprob if known else None, kept)
    return row, not known or len(kept) < len(top)


_LEAKS = {
    "kimi": re.compile(r"<\|tool_calls?_(?:section_|argument_)?(?:begin|end)\|>"),
    "tool_call": re.compile(r"</?tool_call>|</?tool_response>"),
    "mistral": re.compile(r"\[/?(?:TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS|INST)\]"),
    "llama": re.compile(r"<\|(?:python_tag|eom_id|eot_id|start_header_id|end_header_id)\|>|<function="),
    "deepseek": re.compile(r"<\uff5c[^\uff5c<>\n]{1,40}\uff5c>|</?[\uff5c|]?DSML[\uff5c|]"),
    "harmony": re.compile(r"<\|(?:channel|message|call|return|start|constrain)\|>"),
    "chatml": re.compile(r"<\|(?:im_start|im_end|im_middle|im_user|im_assistant|im_system|endoftext)\|>"),
    "xml": re.compile(r"</?(?:function_calls?|invoke|antml:[a-z_]{1,20}|tool_use|minimax:tool_call)\b[^<>\n]{0,200}>"),
    "thought": re.compile(r"</?think>"),
}


def leak_of(reply: Reply) -> str | None:
    """The family of tool-call or control markup that a server's parser left in the text, or None."""
    return markup_in(reply.content) or markup_in(reply.reasoning or "")


def markup_in(text: str) -> str | None:
    """The family of tool-call or control markup in `text`, or None."""
    if "<" in text or "[" in text:
        for family, pattern in _LEAKS.items():
            if pattern.search(text):
                return family
    return None


_LOST = re.compile("[\x00\ufffd\ud800-\udfff]")


def lost_bytes(text: str) -> bool:
    """Whether `text` holds characters that stand for bytes that were lost: U+FFFD, NUL, lone surrogates."""
    return "\x00" in text or (not text.isascii() and _LOST.search(text) is not None)


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
