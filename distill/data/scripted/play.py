"""A conversation in the making: the scripted teacher calls, the broker answers, calls that may pass are made again."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from distill.broker import Broker, ToolError
from distill.chat import ToolCall
from distill.data.prompts.strata import Prompt
from distill.data.schema import Call, Turn
from distill.data.scripted.wording import failure
from distill.errors import DistillError
from distill.tools import arguments_problem

_PASSING = ("timeout", "rate_limited", "connection_reset")


class Failed(Exception):
    """A call that did not work: the sentence that says so."""


class Conversation:
    """The turns of one prompt, until the last word."""

    def __init__(self, prompt: Prompt, broker: Broker, seed: int) -> None:
        self._prompt, self._broker, self._seed = prompt, broker, seed
        self._offered = {tool["function"]["name"]: tool["function"] for tool in prompt.tools}
        self.turns = [Turn(message.role, message.content) for message in prompt.messages]
        self.fixtures: list[str] = []

    def ask(self, tool: str, **arguments: Any) -> dict[str, Any]:
        """The result of one call. Failed where it is an error still when made again."""
        (result,) = self.ask_all([ToolCall(tool, arguments)])
        if isinstance(result, Failed):
            raise result
        return result

    def ask_all(self, calls: Sequence[ToolCall]) -> list[dict[str, Any] | Failed]:
        """The result of each of the calls of a turn; those that failed for what may pass are made once more."""
        results = self._turn(calls)
        if again := [place for place, result in enumerate(results) if _may_pass(result)]:
            for place, result in zip(again, self._turn([calls[place] for place in again]), strict=True):
                results[place] = result
        return [Failed(failure(call.name, str(error))) if (error := _error(result)) else result
                for call, result in zip(calls, results, strict=True)]  # fmt: skip

    def say(self, text: str) -> None:
        """The last word."""
        self.turns.append(Turn("assistant", text, origin="teacher", finish_reason="stop"))

    def _turn(self, calls: Sequence[ToolCall]) -> list[dict[str, Any]]:
        before = len(self.fixtures)
        made = tuple(Call(call.name, call.arguments, id=f"call_{before + n}") for n, call in enumerate(calls))
        for call in made:
            problem = arguments_problem(call, self._offered[call.name])
            if problem:
                raise DistillError(f"the scripted call of {call.name} for {self._prompt.text!r} is wrong: {problem}")
        self.turns.append(Turn("assistant", tool_calls=made, origin="teacher", finish_reason="tool_calls"))
        out = []
        for call in made:
            result = self._broker.call(call, seed=self._seed, nth=len(self.fixtures), fault=self._prompt.fault)
            self.fixtures.append(result.sha256)
            self.turns.append(Turn("tool", result.content, origin="broker", tool_call_id=call.id))
            out.append(json.loads(result.content))
        return out


def _error(result: dict[str, Any]) -> ToolError | None:
    error = result.get("error")
    return ToolError(error["type"], error["message"]) if isinstance(error, dict) else None


def _may_pass(result: dict[str, Any]) -> bool:
    error = _error(result)
    return error is not None and (error.kind in _PASSING or "try again" in str(error))
