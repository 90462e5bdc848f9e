"""What `--dry-run` says beforehand, held against what a run then reserves, is answered and pays."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest

from distill.data import mix
from distill.data.budget import Limits, Prices, usd
from distill.data.dry_run import Forecast, Load
from distill.data.journal import JOURNAL, read_ledger
from distill.data.ledger import ledger
from distill.data.mix_config import MixConfig
from distill.data.prompts.sources import SourceConfig
from distill.data.prompts.stream import open_prompts
from tests.unit.stub_teacher import StubTeacher

STRATA = {"explain": 1.0, "tool_single": 1.0, "tool_chain": 1.0, "arithmetic": 2.0}


def forecast(out: Path, total: int, tools: bool = True, **keys: Any) -> Forecast:
    """What is said of a run at an endpoint."""
    config = MixConfig(**{"strata": STRATA, "attempts": 2, "timeout_s": 5, "concurrency": 4} | keys)
    return Forecast(open_prompts(config, 0, tools=tools, room=None), total, config, local=False, out=out)


def run(out: Path, stub: StubTeacher, total: int, **keys: Any) -> None:
    """The run itself."""
    config = MixConfig(**{"strata": STRATA, "attempts": 2, "timeout_s": 5, "concurrency": 4} | keys)
    mix.make(out, stub.url, total, config, quiet=True)


def _lines(it: Forecast) -> list[str]:
    return list(it.lines())


def test_a_mix_can_be_looked_at_before_it_is_paid_for(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    rows = [{"prompt": "What is rain?"}, {"prompt": "what is rain"}, {"prompt": "Another question"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    strata = MixConfig().strata
    it = forecast(tmp_path / "x", 60, tools=False, strata=strata, sources=[SourceConfig(str(path), weight=40.0)])
    lines = _lines(it)
    table = {line.split()[0]: line.split()[1:] for line in lines[1:15]}
    assert table["mine"][:3] == ["2", "2", "2"] and table["mine"][4] == "1"
    assert any(line.startswith("in all") and line.split()[2:5] == ["60"] * 3 for line in lines)
    assert "tool_single is left out: the teacher cannot call tools" in lines
    place = next(i for i, line in enumerate(lines) if line.startswith("duplicate: mine: "))
    assert "rain" in lines[place] and lines[place + 1].startswith("    mine.jsonl:")
    assert lines[place + 2].startswith("    collides with: What is rain")
    assert all("\n" not in line and len(line) < 400 for line in lines)


def test_words_shared_with_an_evaluation_set_are_shown_once_and_without_a_terminals_codes(tmp_path: Path) -> None:
    text = 'Who said "all that glitters is not gold" in a play about a merchant of Venice?'
    (tmp_path / "mine.jsonl").write_text(json.dumps({"prompt": f"{text} \x1b[2J"}) + '\n{"prompt": "Another"}\n')
    (tmp_path / "eval.txt").write_text(text + "\n")
    sources = [SourceConfig(str(tmp_path / "mine.jsonl"))]
    it = forecast(tmp_path / "x", 10, strata={}, sources=sources, decontaminate=[str(tmp_path / "eval.txt")])
    lines = _lines(it)
    place = next(i for i, line in enumerate(lines) if line.startswith("contaminated: mine: "))
    assert 'Who said "all that' in lines[place] and "\x1b" not in lines[place]
    assert "eval.txt line 1: who said all that glitters" in lines[place + 1]
    assert not any("collides with" in line for line in lines)


def test_what_is_expected_is_never_more_than_the_most(tmp_path: Path) -> None:
    it = forecast(tmp_path / "x", 20, max_tokens=100)
    assert it.answer == 100 and all(it.expected[name].tokens <= it.most[100][name].tokens for name in it.quotas)


def test_every_stratum_is_counted_up_to_its_quota(tmp_path: Path) -> None:
    it = forecast(tmp_path / "x", 83)
    assert it.prompts == it.quotas and it.prompts.total() == 83
    assert it.expected["tool_chain"].requests == 3 * it.quotas["tool_chain"]


def test_a_run_reserves_and_takes_no_more_than_was_said(tmp_path: Path) -> None:
    def calls(body: dict[str, Any]) -> dict[str, Any]:
        """Calls a tool with arguments that never fit, where there are tools: rejected, and asked for all the same."""
        usage = {"prompt_tokens": 20, "completion_tokens": 30}
        message: dict[str, Any] = {"role": "assistant", "content": "Yes."}
        if body.get("tools"):
            function = {"name": body["tools"][0]["function"]["name"], "arguments": '{"nothing": 1}'}
            message |= {"tool_calls": [{"id": "a", "type": "function", "function": function}]}
        finish = "tool_calls" if body.get("tools") else "stop"
        return {"choices": [{"message": message, "finish_reason": finish}], "usage": usage}

    it = forecast(tmp_path / "kd.jsonl", 30, max_tokens=400)
    with StubTeacher(answer=calls) as stub:
        run(tmp_path / "kd.jsonl", stub, 30, max_tokens=400)
    with contextlib.closing(read_ledger(tmp_path / "kd.jsonl.d" / JOURNAL)) as db:
        requests, reserved, largest = db.execute(
            "SELECT count(*), sum(reserved_tokens), max(reserved_tokens) FROM attempt WHERE purpose='answer'"
        ).fetchone()
    assert it.longest == [400] and requests > 30
    worst = it.worst(400)
    assert requests <= worst.requests and reserved <= worst.tokens and largest <= it.largest.tokens


def test_the_length_of_answers_is_measured_once_there_are_some(tmp_path: Path) -> None:
    plain = {"explain": 1.0, "arithmetic": 1.0}
    before = forecast(tmp_path / "kd.jsonl", 40, strata=plain)
    assert before.measured is None and "(assumed)" in "\n".join(_lines(before))
    with StubTeacher() as stub:
        run(tmp_path / "kd.jsonl", stub, 10, strata=plain)
    after = forecast(tmp_path / "kd.jsonl", 40, strata=plain)
    assert after.answer == 5 and "answers of 5 tokens (as in its ledger)" in "\n".join(_lines(after))
    assert after.spent.tokens == ledger(tmp_path / "kd.jsonl")["counted"]["tokens"] > 0


def test_money_is_shown_where_there_are_prices_and_named_where_there_are_none(tmp_path: Path) -> None:
    prices = Prices(0.6, 2.5)
    priced, free = forecast(tmp_path / "x", 50, prices=prices), forecast(tmp_path / "x", 50)
    total = sum(priced.expected.values(), Load())
    row = next(line for line in _lines(priced) if line.startswith("expected"))
    assert row.split()[-1] == usd(total.cost(prices)) and total.cost(prices) == total.prompt * 600_000 + (
        total.completion * 2_500_000
    )
    assert any("no `prices` in the mix" in line for line in _lines(free)) and "USD" not in _lines(free)[6]


@pytest.mark.parametrize(
    ("budget", "said"),
    [
        (Limits(), "no budget is set"),
        (Limits(tokens=10_000), "the budget of 10,000 tokens is less than the largest request reserves"),
        (Limits(tokens=150_000), "the budget of 150,000 tokens is enough for about"),
        (Limits(tokens=2_000_000), "is enough for what is expected, not for the most"),
        (Limits(tokens=20_000_000_000), "is enough whatever is answered"),
        (Limits(usd=2), "the budget of 2 USD is enough for what is expected"),
        (Limits(usd=0.0001), "the budget of 0.0001 USD is less than the largest request reserves"),
    ],
)
def test_a_budget_is_held_against_what_is_needed(tmp_path: Path, budget: Limits, said: str) -> None:
    it = forecast(tmp_path / "x", 200, prices=Prices(0.6, 2.5), budget=budget, max_tokens=1000)
    assert any(said in line for line in _lines(it)), _lines(it)


def test_what_is_spent_is_taken_off_the_budget(tmp_path: Path) -> None:
    plain = {"explain": 1.0, "arithmetic": 1.0}
    with StubTeacher() as stub:
        run(tmp_path / "kd.jsonl", stub, 30, strata=plain)
    spent = ledger(tmp_path / "kd.jsonl")["counted"]["tokens"]
    it = forecast(tmp_path / "kd.jsonl", 40, strata=plain, budget=Limits(tokens=spent + 100), max_tokens=50)
    assert any("less what is spent, is less than the largest" in line for line in _lines(it)), _lines(it)


def test_a_total_of_nothing_is_refused_before_anything(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--out", str(tmp_path / "x.jsonl"), "--teacher", "https://host.example", "--total", "0", "--dry-run"]
    assert mix.main(args) == 2 and "--total 0 must be at least 1" in capsys.readouterr().err
