"""Answers of servers as they are and as nobody should write them; a stream reads to the same as the plain body."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.data.schema import Usage
from distill.data.teacher import events as stream_module
from distill.data.teacher import wire
from distill.data.teacher.events import StreamError, StreamReader
from distill.data.teacher.wire import CallText, ReplyError, TopToken, leak_of, read_reply


def body(message: Any = None, **more: Any) -> bytes:
    choice = {"index": 0, "message": message or {"role": "assistant", "content": "hi"}, "finish_reason": "stop"}
    return json.dumps({"model": "m", "choices": [choice | more.pop("choice", {})], **more}).encode()


def test_a_plain_answer_is_read() -> None:
    usage = {
        "prompt_tokens": 9,
        "completion_tokens": 5,
        "prompt_tokens_details": {"cached_tokens": 4},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }
    reply = read_reply(body({"content": "hi", "reasoning_content": "hm"}, usage=usage, system_fingerprint="fp"))
    assert (reply.content, reply.reasoning, reply.finish, reply.model) == ("hi", "hm", "stop", "m")
    assert reply.usage == Usage(9, 5, 2, 4) and reply.system_fingerprint == "fp"
    assert reply.logprobs is None and reply.calls == () and reply.flags == ()


@pytest.mark.parametrize(
    ("message", "content", "reasoning"),
    [
        ({"content": "a", "reasoning": "b"}, "a", "b"),
        ({"content": "a", "reasoning_content": "", "reasoning": None}, "a", None),
        ({"content": "<think>\nb\n</think>\n\na"}, "a", "b"),
        ({"content": "\n<think></think>a"}, "a", None),
        ({"content": "a <think>b</think>"}, "a <think>b</think>", None),
        ({"content": "<think>b"}, "<think>b", None),
        ({"content": "b\n</think>\n\na"}, "a", "b"),
        ({"content": "b <think> c</think>a"}, "b <think> c</think>a", None),
        ({"content": "<think>x</think>a", "reasoning_content": "b"}, "<think>x</think>a", "b"),
        ({"content": None}, "", None),
    ],
)
def test_reasoning_is_found_where_servers_put_it(message: dict[str, Any], content: str, reasoning: str | None) -> None:
    reply = read_reply(body(message))
    assert (reply.content, reply.reasoning) == (content, reasoning)


def test_argument_strings_stay_as_they_came() -> None:
    raw = '{"a": 1}""\\u00e9 \n'
    call = {"id": "functions.f:0", "type": "function", "function": {"name": "f", "arguments": raw}}
    reply = read_reply(body({"content": None, "tool_calls": [call, {"function": {"name": "g", "arguments": None}}]}))
    assert reply.calls == (CallText("functions.f:0", "f", raw), CallText("", "g", ""))


def test_a_text_completion_is_read() -> None:
    data = {"choices": [{"text": " Paris", "index": 0, "finish_reason": "length"}]}
    reply = read_reply(json.dumps(data).encode())
    assert (reply.content, reply.finish, reply.usage, reply.model) == (" Paris", "length", None, "")


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 9, "completion_tokens": 5, "cached_tokens": 3}, Usage(9, 5, 0, 3)),  # Moonshot
        ({"prompt_tokens": 9, "completion_tokens": 5, "prompt_cache_hit_tokens": 3}, Usage(9, 5, 0, 3)),  # DeepSeek
        ({"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 20,
          "completion_tokens_details": {"reasoning_tokens": 6}}, Usage(9, 11, 6, 0)),  # Grok, Gemini
        ({"prompt_tokens": 9, "total_tokens": 9}, None), ({"prompt_tokens": 9}, None),
        ({"prompt_tokens": 9, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 6}},
         Usage(9, 11, 6, 0)),
        ({"prompt_tokens": 9, "completion_tokens": 5, "prompt_tokens_details": None}, Usage(9, 5)),
        ({"prompt_tokens": 9, "completion_tokens": 5, "cached_tokens": 30}, Usage(9, 5, 0, 9)),
        (None, None),
    ],
)  # fmt: skip
def test_usage_is_read_in_its_forms(usage: Any, expected: Usage | None) -> None:
    reply = read_reply(body(usage=usage))
    assert reply.usage == expected and reply.flags == ()


@pytest.mark.parametrize(
    "usage",
    [{"prompt_tokens": -9, "completion_tokens": 5}, {"prompt_tokens": 9, "completion_tokens": -5}, {}, [], "none", 7,
     {"prompt_tokens": "9", "completion_tokens": 5}, {"prompt_tokens": 9, "completion_tokens": 2**70},
     {"prompt_tokens": 9, "completion_tokens": 2**50}, {"prompt_tokens": 9.5, "completion_tokens": 1}],
)  # fmt: skip
def test_nonsense_of_usage_is_unknown_usage(usage: Any) -> None:
    reply = read_reply(body(usage=usage))
    assert reply.usage is None and reply.flags == ("bad_usage",)


def test_of_several_choices_the_first_by_index_counts() -> None:
    choices = [{"index": n, "message": {"content": text}, "finish_reason": "stop"} for n, text in ((1, "b"), (0, "a"))]
    assert read_reply(json.dumps({"choices": choices}).encode()).content == "a"


def test_of_a_key_that_occurs_twice_the_last_counts_as_in_json() -> None:
    text = b'{"choices": [{"message": {"content": "a", "content": "b"}, "finish_reason": "stop"}]}'
    assert read_reply(text).content == json.loads(text)["choices"][0]["message"]["content"] == "b"


@pytest.mark.parametrize(
    "text",
    [
        b"", b"not json", b"[1]", b"{}", b'{"choices": []}', b'{"choices": null}', b'{"choices": [{"index": 0}]}',
        b'{"choices": [{"message": {"content": ["a"]}}]}', b'{"choices": [{"message": {"content": 3}}]}',
        b'{"error": {"message": "x"}}', b'{"choices": [{"message": {"content": "\\ud800"}}]}',
        b'{"choices": [{"message": {"content": "\xff"}}]}', b'{"choices": [{"message": {"content": NaN}}]}',
        b'{"choices": [{"message": {"content": "a"}, "finish_reason": null}]}', b'{"choices": [{"text": "a"}]}',
        b'{"choices": [{"index": 1, "message": {"content": "a"}}]}', b'{"choices": [{"message": {"content": "a"}',
        b'{"choices": [{"message": {"tool_calls": [{"function": {"arguments": "{}"}}]}}]}',
        b'{"choices": [{"message": {"tool_calls": [{"function": {"name": "f", "arguments": [1]}}]}}]}',
        b'{"choices": [{"message": {"tool_calls": [{"id": "a"}]}}]}', b'{"choices": [{"message": {"tool_calls": 1}}]}',
        b'{"choices": ' + b"[" * 100_000, b'{"x": ' + b"[" * 100_000 + b"]" * 100_000 + b', "choices": []}',
        b'{"choices": [{"message": {"content": "a"}}]} trailing',
    ],
)  # fmt: skip
def test_what_is_no_answer_is_an_error_of_one_line(text: bytes) -> None:
    with pytest.raises(ReplyError) as caught:
        read_reply(text)
    assert 0 < len(str(caught.value)) <= 320 and "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [{}, {"a": 1}])
def test_arguments_that_are_an_object_are_flagged_in_a_stream_too(arguments) -> None:
    message = {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": arguments}}]}
    reader = StreamReader()
    event = {"choices": [{"index": 0, "delta": message, "finish_reason": "tool_calls"}]}
    reader.feed(b"data: " + json.dumps(event).encode() + b"\n\ndata: [DONE]\n\n")
    for reply in (read_reply(body(message)), read_reply(reader.finish())):
        assert "object_arguments" in reply.flags and json.loads(reply.calls[0].arguments) == arguments


@given(st.binary(max_size=200) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["choices", "message", "content", "tool_calls", "function", "name", "usage", "logprobs", "text",
                         "index", "top_logprobs", "tokens", "delta", "error", "finish_reason", "token"]), inner,
        max_size=4), max_leaves=20).map(lambda value: json.dumps(value).encode()))  # fmt: skip
def test_anything_is_an_answer_or_an_error(text: bytes) -> None:
    reader = StreamReader()
    for act in (lambda: read_reply(text), lambda: reader.feed(b"data: " + text + b"\n\n"), reader.finish):
        try:
            act()
        except ReplyError as error:
            assert "\n" not in str(error)


CHAT_LOGPROBS = {"content": [
    {"token": "Hi", "bytes": [72, 105], "logprob": -0.5, "id": 7, "top_logprobs": [
        {"token": "Hi", "bytes": [72, 105], "logprob": -0.5, "id": 7},
        {"token": "\ufffd", "bytes": [195], "logprob": -2.0}]},
    {"token": "!", "logprob": -0.25, "bytes": None, "top_logprobs": []},
]}  # fmt: skip


def test_log_probabilities_of_chat_are_read_with_ids_and_bytes() -> None:
    rows = read_reply(body(choice={"logprobs": CHAT_LOGPROBS})).logprobs
    assert rows is not None and len(rows) == 2
    assert (rows[0].token, rows[0].bytes, rows[0].id, rows[0].logprob) == ("Hi", b"Hi", 7, -0.5)
    assert rows[0].top[1] == TopToken("\ufffd", b"\xc3", None, -2.0)
    assert rows[1].bytes is None and rows[1].top == ()


def test_log_probabilities_of_llama_cpp_completions_have_the_form_of_chat() -> None:
    data = {"choices": [{"text": "Hi", "index": 0, "logprobs": CHAT_LOGPROBS, "finish_reason": "stop"}]}
    rows = read_reply(json.dumps(data).encode()).logprobs
    assert rows is not None and rows[0].id == 7


def test_legacy_log_probabilities_are_read() -> None:
    legacy = {"tokens": ["Hi", "!"], "token_logprobs": [None, -0.25], "text_offset": [0, 2],
              "top_logprobs": [None, {"!": -0.25, "?": -3}]}  # fmt: skip
    rows = read_reply(body(choice={"logprobs": legacy})).logprobs
    assert rows is not None and [row.token for row in rows] == ["Hi", "!"]
    assert rows[0].logprob is None and rows[0].top == ()
    assert rows[1].top == (TopToken("!", None, None, -0.25), TopToken("?", None, None, -3.0))


def test_token_ids_in_place_of_tokens_are_ids() -> None:
    row = {"token": "token_id:42", "logprob": -1, "bytes": list(b"token_id:42"), "top_logprobs": [
        {"token": "token_id:42", "logprob": -1}, {"token": "token_id:9", "logprob": -2}]}  # fmt: skip
    rows = read_reply(body(choice={"logprobs": {"content": [row]}})).logprobs
    assert rows is not None and (rows[0].id, rows[0].token, rows[0].bytes) == (42, "", None)
    assert [top.id for top in rows[0].top] == [42, 9]


def test_sentinels_are_dropped_and_flagged() -> None:
    row = {"token": "", "logprob": -9999.0, "bytes": [], "top_logprobs": [{"token": "", "logprob": -9999.0}]}
    reply = read_reply(body(choice={"logprobs": {"content": [row]}}))
    assert reply.logprobs and reply.logprobs[0].logprob is None and reply.logprobs[0].top == ()
    assert reply.flags == ("sentinel_logprobs",)


@pytest.mark.parametrize(
    "logprobs",
    [3, [], {"content": [{"token": 3}]}, {"content": [{"token": "a", "logprob": -1, "bytes": [256]}]},
     {"tokens": ["a"], "token_logprobs": []}, {"tokens": ["a"], "token_logprobs": ["x"]}],
)  # fmt: skip
def test_bad_log_probabilities_do_not_cost_the_text(logprobs: Any) -> None:
    reply = read_reply(body(choice={"logprobs": logprobs}))
    assert reply.content == "hi" and reply.logprobs is None and reply.flags == ("bad_logprobs",)


@pytest.mark.parametrize(
    ("text", "family"),
    [
        ("x<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0", "kimi"),
        ("<tool_call>{}</tool_call>", "tool_call"), ("[TOOL_CALLS][{}]", "mistral"), ("<|python_tag|>f()", "llama"),
        ("<function=f>{}</function>", "llama"), ("<\uff5ctool\u2581calls\u2581begin\uff5c>", "deepseek"),
        ("<\uff5cDSML\uff5cinvoke name=\"f\">", "deepseek"), ("<|channel|>commentary to=functions.f", "harmony"),
        ("x<|im_end|>", "chatml"), ("<function_calls><invoke name=\"f\">", "xml"), ("<think>a", "thought"),
        ("a < b and [INSTANCE] or <think", None), ("", None), ("f(x) <= |y|", None),
    ],
)  # fmt: skip
def test_markup_that_a_parser_left_is_recognised(text: str, family: str | None) -> None:
    assert leak_of(read_reply(body({"content": text}))) == family
    assert leak_of(read_reply(body({"content": "fine", "reasoning_content": text}))) == family


def test_looking_for_markup_takes_linear_time() -> None:
    reply = read_reply(body({"content": "<invoke " * 100_000 + "<\uff5c" * 100_000 + "[" * 100_000}))
    start = time.perf_counter()
    leak_of(reply)
    assert time.perf_counter() - start < 2


# streams


def events(*values: Any, end: str = "\n", done: bool = True) -> bytes:
    lines = [f"data: {value if isinstance(value, str) else json.dumps(value)}{end}{end}" for value in values]
    return "".join([*lines, f"data: [DONE]{end}{end}" if done else ""]).encode()


def delta(finish: str | None = None, **fields: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": fields, "finish_reason": finish}], "model": "m"}


def assembled(text: bytes, size: int = 0) -> wire.Reply:
    reader = StreamReader()
    for at in range(0, len(text), size or len(text) or 1):
        reader.feed(text[at : at + (size or len(text))])
    return read_reply(reader.finish())


def test_a_stream_cut_at_every_place_reads_the_same() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    for end in ("\n", "\r\n", "\r"):
        text = b"\xef\xbb\xbf: hello" + end.encode() * 2 + events(
            delta(role="assistant", content=""), delta(content="Über \U0001f600"), delta(content=" ok"),
            delta("stop"), usage, end=end)  # fmt: skip
        whole = assembled(text)
        assert whole.content == "Über \U0001f600 ok" and whole.usage == Usage(3, 2) and whole.model == "m"
        for size in (1, 2, 3, 7):
            assert assembled(text, size) == whole


def test_events_may_lack_the_space_have_names_and_span_lines() -> None:
    text = b"event: message\nid: 3\nretry: 10\n"
    text += b'data:{"choices":[{"delta":{"content":"a"},\ndata: "finish_reason":"stop"}]}\n\n'
    for form in (text, text.replace(b"\n", b"\r\n"), text.replace(b"\n", b"\r")):
        assert [assembled(form, size).content for size in (0, 1, 2, 5)] == ["a"] * 4


def test_call_pieces_are_put_together_by_index_in_any_order() -> None:
    def piece(index: int | None, **fields: Any) -> dict[str, Any]:
        call: dict[str, Any] = {key: fields.pop(key) for key in ("id",) if key in fields}
        return delta(tool_calls=[call | {"function": fields} | ({} if index is None else {"index": index})])

    reply = assembled(events(
        piece(1, id="b", name="g", arguments=""), piece(0, id="a", name="f", arguments='{"x"'), piece(1, arguments="{"),
        piece(0, name="f", arguments=": 1}"), piece(1, arguments="}"), delta("tool_calls")))  # fmt: skip
    assert reply.calls == (CallText("a", "f", '{"x": 1}'), CallText("b", "g", "{}")) and reply.finish == "tool_calls"
    whole = [piece(index, id=i, name="f", arguments=a) for index in (None, 0) for i, a in (("a", "{}"), ("b", "[]"))]
    for pair in (whole[:2], whole[2:]):  # no index at all; and Gemini's, where every call has index 0
        assert [c.id for c in assembled(events(*pair, delta("stop"))).calls] == ["a", "b"]
    loose = [piece(None, id="a", name="f", arguments="{"), piece(None, arguments="}")]
    assert assembled(events(*loose, delta("stop"))).calls == (CallText("a", "f", "{}"),)


def test_reasoning_comes_under_either_name_and_once() -> None:
    for name in ("reasoning", "reasoning_content"):
        assert (
            assembled(events(delta(**{name: "a"}), delta(**{name: "b"}), delta("stop", content="c"))).reasoning == "ab"
        )
    both = {"reasoning": "a", "reasoning_content": "a"}
    assert assembled(events(delta(**both), delta("stop", content="c"))).reasoning == "a"


def test_usage_is_found_where_moonshot_puts_it() -> None:
    last = {
        "choices": [
            {"index": 0, "delta": {}, "finish_reason": "stop", "usage": {"prompt_tokens": 1, "completion_tokens": 2}}
        ]
    }
    assert assembled(events(delta(content="a"), last)).usage == Usage(1, 2)


def test_a_stream_is_whole_with_its_finish_reason_and_not_without() -> None:
    parts = (delta(content="a"), delta("length"))
    assert assembled(events(*parts, done=False)).finish == "length"
    assert assembled(events(*parts, done=False)[:-2]).finish == "length"  # the last line end is missing
    for cut in (
        events(parts[0]),
        events(parts[0], done=False),
        b"",
        events(*parts, done=False)[:-9],
        b"data: [DONE]\n\n",
    ):
        with pytest.raises(ReplyError):
            assembled(cut)


def test_a_stream_that_goes_on_after_its_end_is_refused() -> None:
    with pytest.raises(ReplyError, match="goes on"):
        assembled(events(delta("stop", content="a"), delta(content="b")))
    twice = events(delta("stop", content="a")) + events(delta("stop", content="b"))
    assert assembled(twice).content == "a"  # [DONE] ends it, whatever comes then


@pytest.mark.parametrize("error", [{"message": "overloaded", "code": 503}, "busy"])
def test_an_error_event_ends_the_stream(error: Any) -> None:
    with pytest.raises(StreamError) as caught:
        assembled(events(delta(content="a"), {"error": error}))
    assert json.loads(caught.value.event) == {"error": error}


@pytest.mark.parametrize("text", [b"data: {\n\n", b"data: 3\n\n", b'data: {"choices": 3}\n\n', b"data: \xff\n\n",
                                  b'data: {"choices": [{"delta": {"content": 3}}]}\n\n',
                                  b"data: " + b"[" * 99999 + b"\n\n",
                                  b'data: {"choices": [{"delta": {}, "logprobs": 3}]}\n\n'])  # fmt: skip
def test_an_event_that_is_none_is_refused(text: bytes) -> None:
    with pytest.raises(ReplyError):
        assembled(text + events(delta("stop")))


def test_a_stream_is_bounded_and_read_in_linear_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "LARGEST_BODY", 1 << 20)
    reader, start = StreamReader(), time.perf_counter()
    with pytest.raises(ReplyError, match="more than"):
        for _ in range(1 << 21):
            reader.feed(b"x" * 16)
    assert time.perf_counter() - start < 2


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
finishes = st.sampled_from(["stop", "length", "tool_calls"])
calls = st.lists(
    st.tuples(st.text("ab", min_size=1, max_size=4), st.text("fg", min_size=1, max_size=4), texts), max_size=3
)


@settings(max_examples=150, deadline=None)
@given(st.lists(texts, max_size=4), st.lists(texts, max_size=3), calls, finishes, st.booleans(), st.booleans(),
       st.integers(1, 40))  # fmt: skip
def test_a_stream_and_its_plain_body_read_to_the_same_reply(
    content: list[str], thought: list[str], called: list[tuple[str, str, str]], finish: str, usage: bool,
    logprobs: bool, size: int,
) -> None:  # fmt: skip
    message: dict[str, Any] = {"role": "assistant", "content": "".join(content), "reasoning_content": "".join(thought)}
    message["tool_calls"] = [{"id": i + str(n), "type": "function", "function": {"name": name, "arguments": arguments}}
                             for n, (i, name, arguments) in enumerate(called)]  # fmt: skip
    parts = [delta(reasoning_content=t) for t in thought] + [delta(content=t) for t in content]
    for n, call in enumerate(message["tool_calls"]):
        whole = call["function"]["arguments"]
        parts.append(delta(tool_calls=[{**call, "index": n, "function": {"name": call["function"]["name"]}}]))
        parts += [delta(tool_calls=[{"index": n, "function": {"arguments": c}}]) for c in (whole[:3], whole[3:])]
    tail: dict[str, Any] = {"usage": {"prompt_tokens": 3, "completion_tokens": 2}} if usage else {}
    scores: dict[str, Any] = {}
    if logprobs:
        for row in CHAT_LOGPROBS["content"]:
            parts.append(delta(content=""))
            parts[-1]["choices"][0]["logprobs"] = {"content": [row]}
        scores = {"choice": {"logprobs": CHAT_LOGPROBS}}
    parts += [delta(finish), {"choices": [], **tail}]
    scores["choice"] = scores.get("choice", {}) | {"finish_reason": finish}
    assert assembled(events(*parts), size) == read_reply(body(message, **scores, **tail))


def test_a_streamed_text_completion_reads_like_a_plain_one() -> None:
    legacy = {"tokens": ["a", "b"], "token_logprobs": [-1.0, -2.0], "top_logprobs": [{"a": -1.0}, {"b": -2.0}]}
    parts = [{"choices": [{"index": 0, "text": t, "finish_reason": None,
                           "logprobs": {key: [values[i]] for key, values in legacy.items()}}]}
             for i, t in enumerate("ab")]  # fmt: skip
    plain = {"choices": [{"index": 0, "text": "ab", "finish_reason": "stop", "logprobs": legacy}]}
    last = {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}
    assert assembled(events(*parts, last)) == read_reply(json.dumps(plain).encode())


def test_a_byte_order_mark_is_no_part_of_an_answer() -> None:
    plain = b'{"choices": [{"index": 0, "message": {"content": "a"}, "finish_reason": "stop"}]}'
    assert read_reply(b"\xef\xbb\xbf" + plain) == read_reply(plain)
    reader = StreamReader()
    reader.feed(b'\xef\xbb\xbfdata: {"choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}]}\n\n')
    assert read_reply(reader.finish()).content == "a"
