"""One request until it is answered: attempts, the ledger's entries, and who is told to stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from distill.data.budget import Budget, Limits, Prices
from distill.data.journal import Dead, Journal, Totals
from distill.data.sender import Request, Sender, Stopped, Unanswered
from distill.data.teacher.admission import Admission
from distill.data.teacher.spec import KEY_VARIABLES
from distill.data.teacher.transport import Exchange
from distill.errors import InputError, Paused

USAGE = {"prompt_tokens": 7, "completion_tokens": 5}
GOOD = Exchange(200, {}, json.dumps({"choices": [{"message": {"content": "Yes."}, "finish_reason": "stop"}],
                                     "usage": USAGE}).encode(), "", True)  # fmt: skip
BODY = {"model": "m", "messages": [{"role": "user", "content": "Is it?"}], "max_tokens": 50}
REQUEST = Request(b"k" * 32, BODY)


def _status(status: int, headers: Mapping[str, str] = {}, body: bytes = b"{}") -> Exchange:
    return Exchange(status, headers, body, "", True)


class Scripted:
    """A transport that gives these exchanges, one after another, the last one for ever."""

    def __init__(self, *script: Exchange | Callable[[], Any]) -> None:
        self.script, self.bodies, self.distrusted = list(script), [], 0

    async def post(self, body: Mapping[str, Any], *, stream: bool = False) -> Exchange:
        self.bodies.append(dict(body))
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return step if isinstance(step, Exchange) else await step()

    def distrust(self) -> None:
        self.distrusted += 1

    async def close(self) -> None:
        pass


class Quiet:
    """Nobody is told."""

    def waiting(self, detail: str) -> None: ...
    def failed(self, detail: str) -> None: ...


def _run(tmp_path: Path, transport: Scripted, work: Callable[[Sender], Any], *, attempts: int = 3,
         limits: Limits = Limits(), clock: Callable[[], float] | None = None) -> tuple[Any, dict[str, Totals]]:  # noqa: B008  # fmt: skip
    async def main() -> Any:
        options: dict[str, Any] = {"clock": clock} if clock else {}
        with Journal(tmp_path / "j" / "journal.sqlite") as journal:
            sender = Sender(transport, journal, Admission(4, **options), Budget(limits, Totals()), Prices(1.0, 2.0),
                            Quiet(), attempts=attempts)  # fmt: skip
            try:
                return await asyncio.wait_for(work(sender), 20), None
            except (Exception, asyncio.CancelledError) as error:
                return None, error
            finally:
                await journal.flush()
                found.update(journal.totals())

    found: dict[str, Totals] = {}
    value, error = asyncio.run(main())
    if error is not None:
        raise Told(error, found)
    return value, found


class Told(Exception):
    """What the sender raised, with the ledger."""

    def __init__(self, error: BaseException, ledger: dict[str, Totals]) -> None:
        super().__init__(repr(error))
        self.error, self.ledger = error, ledger


@contextlib.contextmanager
def _raises(kind: type[BaseException], match: str = ""):
    import re

    with pytest.raises(Told) as told:
        yield told
    assert isinstance(told.value.error, kind), told.value
    assert re.search(match, str(told.value.error))


@pytest.mark.parametrize(
    ("fault", "state"),
    [
        (_status(500), "released"), (_status(503, {"retry-after": "0"}), "released"),
        (_status(504, {"retry-after": "0"}), "uncertain"), (_status(200, body=b"<html>"), "uncertain"),
        (Exchange(0, {}, b"", "reset", True), "uncertain"), (Exchange(0, {}, b"", "refused", False), "released"),
        (_status(429, {"retry-after": "0"}), "released"),
    ],
)  # fmt: skip
def test_a_fault_is_tried_again_and_entered_for_what_it_may_have_cost(tmp_path: Path, fault, state) -> None:
    transport = Scripted(fault, GOOD)
    answer, ledger = _run(tmp_path, transport, lambda sender: sender.ask(REQUEST))
    assert answer.body == GOOD.body and len(transport.bodies) == 2
    assert ledger["settled"] == Totals(1, 12, 7 * 10**6 + 5 * 2 * 10**6)
    assert ledger[state].attempts == (2 if state == "settled" else 1)
    if state == "uncertain":
        assert ledger["uncertain"].tokens > 50, "all that was reserved: the prompt's bound and max_tokens"


def test_after_the_last_attempt_it_is_unanswered_but_429_costs_none(tmp_path: Path) -> None:
    transport = Scripted(*[_status(429, {"retry-after": "0"})] * 5, *[_status(500, {"retry-after": "0"})] * 9)
    with _raises(Unanswered, "500"):
        _run(tmp_path, transport, lambda sender: sender.ask(REQUEST), attempts=2)
    assert len(transport.bodies) == 5 + 2


def test_half_an_hour_of_refusals_pauses_the_run(tmp_path: Path) -> None:
    now = [0.0]

    def later() -> float:
        now[0] += 100.0
        return now[0]

    with _raises(Paused, "refusing for 30 minutes"):
        _run(tmp_path, Scripted(_status(429)), lambda sender: sender.ask(REQUEST), clock=later)


@pytest.mark.parametrize(
    ("exchange", "error", "match"),
    [
        (
            _status(401, body=b'{"error": {"message": "bad key"}}'),
            InputError,
            "refuses.*401.*no key is set in TEACHER_API_KEY, MOONSHOT_API_KEY, OPENAI_API_KEY",
        ),
        (_status(429, body=b'{"error": {"code": "insufficient_quota"}}'), Paused, "quota"),
    ],
)
def test_where_trying_again_is_no_use_it_says_so_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange, error, match: str
) -> None:
    for name in KEY_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    transport = Scripted(exchange)
    with _raises(error, match):
        _run(tmp_path, transport, lambda sender: sender.ask(REQUEST))
    assert len(transport.bodies) == 1


def test_a_request_that_is_wrong_for_good_is_entered_as_dead_once_others_were_answered(tmp_path: Path) -> None:
    async def work(sender: Sender) -> Any:
        await sender.ask(REQUEST)
        return await sender.ask(Request(b"x" * 32, BODY))

    answer, ledger = _run(tmp_path, Scripted(GOOD, _status(400)), work)
    assert answer.body == b"" and answer.dead == Dead("http", "HTTP 400") and set(ledger) == {"settled", "released"}


def test_three_refusals_at_the_start_are_the_configurations_fault_and_are_not_kept(tmp_path: Path) -> None:
    async def work(sender: Sender) -> None:
        for number in range(3):
            with contextlib.suppress(Unanswered):
                await sender.ask(Request(bytes([number]) * 32, BODY))

    said = _status(400, body=b'{"error": {"message": "temperature must be 1"}}')
    with _raises(InputError, "no usable answer.*temperature must be 1"):
        _run(tmp_path, Scripted(said), work)
    answer, _ = _run(tmp_path, Scripted(GOOD), lambda sender: sender.ask(Request(bytes(32), BODY)))
    assert answer.body == GOOD.body, "repaired, the same request is asked again"


def test_one_that_is_cancelled_in_flight_stays_counted(tmp_path: Path) -> None:
    async def never() -> Exchange:
        await asyncio.sleep(60)
        return GOOD

    async def work(sender: Sender) -> None:
        task = asyncio.create_task(sender.ask(REQUEST))
        await asyncio.sleep(0.2)
        task.cancel()
        await task

    with _raises(asyncio.CancelledError) as told:
        _run(tmp_path, Scripted(never), work)
    assert told.value.ledger["uncertain"].attempts == 1


def test_stopping_lets_what_is_in_flight_finish_and_wakes_who_waits(tmp_path: Path) -> None:
    gate = asyncio.Event()

    async def slow() -> Exchange:
        await gate.wait()
        return GOOD

    async def work(sender: Sender) -> list[Any]:
        limited = [asyncio.create_task(sender.ask(Request(bytes([n]) * 32, BODY))) for n in range(9)]
        await asyncio.sleep(0.2)
        sender.stop()
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(*limited, return_exceptions=True)

    transport = Scripted(slow)
    ends, ledger = _run(tmp_path, transport, work)
    stopped = [end for end in ends if isinstance(end, Stopped)]
    assert len(stopped) == 5 and len(transport.bodies) == 4 == ledger["settled"].attempts
    assert "uncertain" not in ledger


def test_a_server_that_counts_more_than_was_reserved_stops_a_run_with_a_budget(tmp_path: Path) -> None:
    greedy = json.loads(GOOD.body) | {"usage": {"prompt_tokens": 7, "completion_tokens": 5000}}
    transport = Scripted(GOOD._replace(body=json.dumps(greedy).encode()))
    with _raises(Paused, "counted 5,007 tokens .* for a request that may take"):
        _run(tmp_path, transport, lambda sender: sender.ask(REQUEST), limits=Limits(tokens=10_000))
    _run(tmp_path / "free", transport, lambda sender: sender.ask(REQUEST))


def test_what_a_server_counted_beyond_the_bound_is_reserved_from_then_on_in_later_runs_too(tmp_path: Path) -> None:
    greedy = json.loads(GOOD.body) | {"usage": {"prompt_tokens": 7, "completion_tokens": 5000}}
    transport = Scripted(GOOD._replace(body=json.dumps(greedy).encode()))
    with _raises(Paused, "counted 5,007 tokens .* may take 230 .* from now on so much more is reserved"):
        _run(tmp_path, transport, lambda sender: sender.ask(REQUEST), limits=Limits(tokens=10_000))
    limits = Limits(tokens=8_422)
    answer, _ = _run(tmp_path, transport, lambda sender: sender.ask(Request(b"x" * 32, BODY)), limits=limits)
    assert answer.body, "as much as it was known to count fits, so nothing was counted beyond what was reserved"
    with _raises(Paused, "a request may take 8,422"):
        _run(tmp_path, transport, lambda sender: sender.ask(Request(b"y" * 32, BODY)), limits=Limits(tokens=8_421))
    assert len(transport.bodies) == 2


def test_an_answer_that_was_given_before_is_not_taken_for_another_requests(tmp_path: Path) -> None:
    first, second = (GOOD._replace(body=GOOD.body[:-1] + f', "id": "{name}"}}'.encode()) for name in "ab")
    transport = Scripted(first, first, second)

    async def work(sender: Sender) -> Any:
        sender.unique_ids = True
        await sender.ask(REQUEST)
        return await sender.ask(Request(b"x" * 32, BODY))

    answer, ledger = _run(tmp_path, transport, work)
    assert answer.body == second.body and transport.distrusted == 1
    assert ledger["uncertain"].attempts == 1, "the real answer to it may have been served"


def test_answers_of_the_probe_and_of_earlier_runs_are_known_too(tmp_path: Path) -> None:
    first, second = (GOOD._replace(body=GOOD.body[:-1] + f', "id": "{name}"}}'.encode()) for name in "ab")

    async def probe(sender: Sender) -> Any:
        return await sender.probe(BODY, False)

    async def ask(sender: Sender) -> Any:
        sender.unique_ids = True
        return await sender.ask(REQUEST)

    _run(tmp_path, Scripted(first), probe)
    transport = Scripted(first, second)
    answer, _ = _run(tmp_path, transport, ask)
    assert answer.body == second.body and transport.distrusted == 1


def test_an_answer_that_the_server_did_not_count_is_settled_as_reserved(tmp_path: Path) -> None:
    silent = GOOD._replace(body=GOOD.body.replace(json.dumps(USAGE).encode(), b"null"))
    answer, ledger = _run(tmp_path, Scripted(silent), lambda sender: sender.ask(REQUEST))
    assert answer.body == silent.body and ledger["settled"].attempts == 1 and "uncertain" not in ledger
    assert ledger["settled"].tokens > 50


def test_a_combination_that_a_server_answers_with_500_is_the_probes_to_judge(tmp_path: Path) -> None:
    bad, busy = (_status(status, {"retry-after": "0"}, b'{"error": "tools need --jinja"}') for status in (500, 503))
    asked = BODY | {"tools": [{}]}
    exchange, ledger = _run(tmp_path, Scripted(bad), lambda sender: sender.probe(asked, False))
    assert exchange == bad and ledger["released"].attempts == 3
    with _raises(Paused, "does not answer"):  # a server in trouble says nothing about tools
        _run(tmp_path / "busy", Scripted(busy, bad), lambda sender: sender.probe(asked, False))
    with _raises(Paused, "does not answer"):
        _run(tmp_path / "plain", Scripted(bad), lambda sender: sender.probe(BODY, False))
