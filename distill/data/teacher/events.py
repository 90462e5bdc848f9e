"""Server-sent events of a chat or text completion, put together again into the one equivalent plain body. No I/O."""

from __future__ import annotations

import re
from typing import Any

import msgspec

from distill.data.teacher.wire import BOM, LARGEST_BODY, ReplyError, WireCall, WireFunction, WireMessage, one_line


class _Piece(msgspec.Struct):
    index: int | None = None
    delta: WireMessage | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: msgspec.Raw = msgspec.Raw()
    usage: msgspec.Raw = msgspec.Raw()


class _Chunk(msgspec.Struct):
    choices: list[_Piece] | None = None
    id: msgspec.Raw = msgspec.Raw()
    model: str | None = None
    system_fingerprint: str | None = None
    usage: msgspec.Raw = msgspec.Raw()
    error: msgspec.Raw = msgspec.Raw()


class _Logprobs(msgspec.Struct):
    content: list[msgspec.Raw] | None = None
    tokens: list[msgspec.Raw] | None = None
    token_logprobs: list[msgspec.Raw] | None = None
    top_logprobs: list[msgspec.Raw] | None = None


_CHUNK = msgspec.json.Decoder(_Chunk)
_LOGPROBS = msgspec.json.Decoder(_Logprobs | None)
_LINE_END = re.compile(rb"\r\n|\n|\r")


class StreamReader:
    """Server-sent events in, the one equivalent plain body out. Both raise ReplyError.

    An answer is whole once its finish_reason has come; [DONE] may be missing, and what follows it is not read.
    """

    def __init__(self) -> None:
        self._tail: list[bytes] = []
        self._event: list[bytes] = []
        self._size = 0
        self._done = False
        self._first = True
        self._top: dict[str, Any] = {}
        self._usage = msgspec.Raw()
        self._texts: dict[str, list[str]] = {"content": [], "reasoning_content": [], "text": []}
        self._calls: list[_OpenCall] = []
        self._logprobs: dict[str, list[msgspec.Raw]] = {}
        self._thought_name = "reasoning_content"
        self._finish: str | None = None

    def feed(self, chunk: bytes) -> None:
        """Read the next bytes, cut anywhere."""
        self._size += len(chunk)
        if self._size > LARGEST_BODY:
            raise ReplyError(f"a stream of more than {LARGEST_BODY} bytes")
        if self._done:
            return
        self._tail.append(chunk)
        if b"\n" not in chunk and b"\r" not in chunk:
            return
        text = b"".join(self._tail)
        held = b"\r" if text.endswith(b"\r") else b""  # the first half of \r\n, perhaps
        *lines, rest = _LINE_END.split(text[: len(text) - len(held)])
        self._tail = [rest + held]
        for line in lines:
            self._read_line(line)

    def finish(self) -> bytes:
        """The whole answer as a chat.completion or text_completion."""
        for line in _LINE_END.split(b"".join(self._tail)):
            self._read_line(line)
        self._read_line(b"")
        if self._finish is None:
            raise ReplyError("the stream ended before the answer did: no finish_reason came")
        choice: dict[str, Any] = {"index": 0, "finish_reason": self._finish}
        content, text = "".join(self._texts["content"]), "".join(self._texts["text"])
        if text and not content:
            choice["text"] = text
        else:
            choice["message"] = {"role": "assistant", "content": content}
            if thought := "".join(self._texts["reasoning_content"]):
                choice["message"][self._thought_name] = thought
            if self._calls:
                choice["message"]["tool_calls"] = [c.plain() for c in sorted(self._calls, key=lambda c: c.index)]
        if self._logprobs:
            choice["logprobs"] = self._logprobs
        body = {"object": "chat.completion" if "message" in choice else "text_completion", **self._top}
        body["choices"] = [choice]
        if self._usage:
            body["usage"] = self._usage
        return msgspec.json.encode(body)

    def _read_line(self, line: bytes) -> None:
        if self._first:
            self._first, line = False, line.removeprefix(BOM)
        if line.startswith(b"data:"):
            self._event.append(line[5:].removeprefix(b" "))
        elif not line and self._event:
            data, self._event = b"\n".join(self._event), []
            if data.strip() == b"[DONE]":
                self._done = True
            elif not self._done and data.strip():
                self._read_event(data)

    def _read_event(self, data: bytes) -> None:
        try:
            chunk = _CHUNK.decode(data)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise ReplyError(f"an event of the stream: {one_line(error)}") from error
        if chunk.error and chunk.error != b"null":
            raise StreamError("an error within the stream", data)
        if chunk.id and chunk.id != b"null":
            self._top["id"] = chunk.id
        for name in ("model", "system_fingerprint"):
            if value := getattr(chunk, name):
                self._top[name] = value
        if chunk.usage and chunk.usage != b"null":
            self._usage = chunk.usage
        for piece in chunk.choices or []:
            if not piece.index:
                self._read_piece(piece)

    def _read_piece(self, piece: _Piece) -> None:
        delta = piece.delta or WireMessage()
        thought = delta.reasoning_content or delta.reasoning  # one vLLM release sends both, with the same text
        if thought and not delta.reasoning_content:
            self._thought_name = "reasoning"
        if self._finish is not None and (delta.content or thought or delta.tool_calls or piece.text):
            raise ReplyError("the stream goes on after its finish_reason")
        for name, text in (("content", delta.content), ("reasoning_content", thought), ("text", piece.text)):
            if text:
                self._texts[name].append(text)
        for call in delta.tool_calls or []:
            self._read_call(call)
        if piece.logprobs and piece.logprobs != b"null":
            self._read_logprobs(piece.logprobs)
        if piece.usage and piece.usage != b"null":  # where Moonshot puts it
            self._usage = piece.usage
        self._finish = piece.finish_reason or self._finish

    def _read_call(self, call: WireCall) -> None:
        """A call's pieces belong together by index; by a new id where a server leaves the index out or at 0."""
        same = [c for c in self._calls if call.index is None or c.index == call.index]
        open_call = same[-1] if same else None
        if open_call is None or (call.id and open_call.id and call.id != open_call.id):
            index = len(self._calls) if call.index is None else call.index
            open_call = _OpenCall(index)
            self._calls.append(open_call)
        open_call.add(call)

    def _read_logprobs(self, raw: msgspec.Raw) -> None:
        try:
            read = _LOGPROBS.decode(raw)
        except (msgspec.MsgspecError, RecursionError, ValueError) as error:
            raise ReplyError(f"logprobs of the stream: {one_line(error)}") from error
        for name in _Logprobs.__struct_fields__:
            if (rows := getattr(read, name, None)) is not None:
                self._logprobs.setdefault(name, []).extend(rows)


class StreamError(ReplyError):
    """The server ended the stream with an error event, `event`."""

    def __init__(self, what: str, event: bytes) -> None:
        super().__init__(f"{what}: {one_line(Exception(event.decode(errors='replace')))}")
        self.event = event


class _OpenCall:
    """A call whose pieces are still coming."""

    def __init__(self, index: int) -> None:
        self.index, self.id, self._name = index, "", ""
        self._arguments: list[str] = []
        self._object: dict[str, Any] | None = None

    def add(self, call: WireCall) -> None:
        self.id = self.id or call.id or ""
        function = call.function or WireFunction()
        if function.name and function.name != self._name:  # some repeat it with every piece
            self._name += function.name
        if isinstance(function.arguments, dict):
            self._object = function.arguments
        elif function.arguments:
            self._arguments.append(function.arguments)

    def plain(self) -> dict[str, Any]:
        arguments = "".join(self._arguments) if self._object is None else self._object
        function = {"name": self._name, "arguments": arguments}
        return {"id": self.id, "type": "function", "function": function}
