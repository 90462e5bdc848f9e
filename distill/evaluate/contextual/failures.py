"""Calls that fail: once, and the same call made again succeeds; or for good, and the right answer says so."""

from __future__ import annotations

import msgspec

from distill.evaluate.contextual.scene import Scene, Task

AGAIN = (
    "Where a function fails for a reason that may pass, make just the same call once more; else say what went wrong."
)
_PASSING = (("timeout", "no answer within 8 seconds, try again"), ("busy", "all workers are busy, try again"),
            ("connection_reset", "the connection broke off, try again"),
            ("temporarily_unavailable", "restarting, try again in a moment"))  # fmt: skip
_LASTING = (
    ("forbidden", "this account has no right to use {tool}; trying again will not help",
     "I could not do that: this account has no right to use the function that it takes."),
    ("retired", "{tool} was switched off for good; trying again will not help",
     "I could not do that: the function that it takes was switched off for good."),
    ("licence_expired", "the licence for {tool} has expired; trying again will not help",
     "I could not do that: the licence of the function that it takes has expired."),
)  # fmt: skip


def once(s: Scene, task: Task) -> Task:
    """The only call of a scene fails the first time."""
    (call,), (row,) = s.calls, s.rows
    kind, message = s.draw.choice(_PASSING)
    first = msgspec.structs.replace(row, nth=1, result=msgspec.UNSET, error={"type": kind, "message": message})
    again = msgspec.structs.replace(call, id="c2", after=(call.id,))
    s.calls.append(again)
    s.rows[:] = [first, msgspec.structs.replace(row, id="c2")]
    s.facts[:] = [msgspec.structs.replace(fact, call="c2") for fact in s.facts]
    return task


def for_good(s: Scene, task: Task) -> Task:
    """The only call of a scene fails whenever it is made: there is nothing to tell but that."""
    (row,) = s.rows
    kind, message, answer = s.draw.choice(_LASTING)
    error = {"type": kind, "message": message.format(tool=row.tool)}
    s.rows[:] = [msgspec.structs.replace(row, result=msgspec.UNSET, error=error)]
    s.decoys += [str(fact.value) for fact in s.facts]
    s.facts.clear()
    s.derived.clear()
    return Task(task.request, answer)
