"""The stream of prompts: the same for ever, in proportion, without duplicates, with what it leaves out named."""

import json
import re
import subprocess
import sys
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import chat
from distill.chat import ToolCall
from distill.config import load
from distill.data.prompts.documents import estimate_tokens, long_question
from distill.data.prompts.similarity import jaccard
from distill.data.prompts.strata import TOOL_STRATA, built_in, capacity
from distill.data.prompts.stream import (
    STRATA,
    WEIGHTS,
    Prompt,
    PromptStream,
    SourceConfig,
    open_prompts,
    said,
    shares,
)
from distill.data.prompts.tool_material import BY_NAME
from distill.draw import Draw
from distill.errors import ConfigError, DatasetError
from distill.tokenizer import toy_tokenizer
from distill.tools import schema_problem


class Mix(msgspec.Struct, frozen=True):
    """The keys of a mix that prompts depend on."""

    strata: dict[str, float] = msgspec.field(default_factory=lambda: dict(WEIGHTS))
    sources: list[SourceConfig] = []
    tools: list[str] = []
    fixtures: list[str] = []
    long_context_tokens: int = 1500
    near_duplicates: float = 0.8
    decontaminate: list[str] = []


def stream(
    seed: int = 0, *, tools: bool = True, room: int | None = None, tool_files: list[str] | None = None, **keys: Any
) -> PromptStream:
    return open_prompts(Mix(tools=tool_files or [], **keys), seed, tools=tools, room=room)


def take(n: int, prompts: PromptStream) -> list[Prompt]:
    return [prompt for _, prompt in zip(range(n), prompts, strict=False)]


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(scope="module")
def many() -> tuple[list[Prompt], PromptStream]:
    prompts = stream(long_context_tokens=600)
    return take(2000, prompts), prompts


# --- the order


def test_a_longer_run_begins_with_a_shorter_one_and_a_seed_gives_another(
    many: tuple[list[Prompt], PromptStream],
) -> None:
    assert take(700, stream(long_context_tokens=600)) == many[0][:700]
    others = {prompt.id for prompt in take(700, stream(1, long_context_tokens=600))}
    assert len(others & {prompt.id for prompt in many[0]}) < 300


def test_the_stream_is_the_same_in_another_process() -> None:
    code = (
        "from distill.data.prompts.stream import open_prompts\n"
        "from distill.data.mix_config import MixConfig\n"
        "mix = MixConfig(strata={'tool_single': 1, 'domain': 2, 'long_context': 1})\n"
        "print([p.id for _, p in zip(range(200), open_prompts(mix, 3, tools=True, room=None))])"
    )
    runs = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": s}, capture_output=True, check=True).stdout
        for s in ("0", "9")
    ]
    assert runs[0] == runs[1] and runs[0].count(b"tool_single-") == 50


def test_ids_are_hashes_of_what_the_prompt_holds(many: tuple[list[Prompt], PromptStream]) -> None:
    prompts = many[0]
    assert len({prompt.id for prompt in prompts}) == len(prompts)
    assert all(re.fullmatch(rf"{prompt.stratum}-[0-9a-f]{{20}}", prompt.id) for prompt in prompts)


def test_thousands_of_prompts_take_seconds() -> None:
    started = time.perf_counter()
    found = take(4000, stream(long_context_tokens=4000))
    assert len(found) == 4000 and len({said(prompt) for prompt in found}) == 4000
    assert time.perf_counter() - started < 15  # some 1.2 on an idle core


# --- proportions


def test_every_beginning_is_in_proportion(many: tuple[list[Prompt], PromptStream]) -> None:
    total = sum(WEIGHTS.values())
    for n in (1, 10, 137, 1000):
        counts = Counter(prompt.stratum for prompt in many[0][:n])
        assert all(abs(counts[name] - n * weight / total) < 2 for name, weight in WEIGHTS.items())


def test_quotas_sum_to_the_total_and_are_what_the_stream_gives(many: tuple[list[Prompt], PromptStream]) -> None:
    for total in (1, 7, 100, 1999):
        quotas = many[1].quotas(total)
        counts = Counter(prompt.stratum for prompt in many[0][:total])
        assert sum(quotas.values()) == total and list(quotas) == list(WEIGHTS)
        assert all(abs(quotas[name] - counts[name]) <= 1 for name in quotas)


def test_a_stratum_that_runs_short_leaves_its_share_to_the_others(tmp_path: Path) -> None:
    rows = [{"prompt": f"number {i}: {'abcdefghijklmnopqrst'[i]}"} for i in range(20)]
    small = SourceConfig(write(tmp_path / "small.jsonl", rows), weight=1.0)
    prompts = stream(strata={"arithmetic": 1.0, "domain": 2.0}, sources=[small])
    assert prompts.quotas(40) == {"arithmetic": 10, "domain": 20, "small": 10}
    assert prompts.quotas(400) == {"arithmetic": 127, "domain": 253, "small": 20}
    counts = Counter(prompt.stratum for prompt in take(400, prompts))
    assert counts == {"arithmetic": 127, "domain": 253, "small": 20} and prompts.exhausted == {"small"}
    alone = stream(strata={}, sources=[small])
    assert alone.quotas(50) == {"small": 50}, "what cannot be reached shows as records that are missing"
    assert len(take(50, alone)) == 20


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.sampled_from("abcdefg"), st.floats(0.001, 1000), min_size=1),
    st.dictionaries(st.sampled_from("abcdefg"), st.integers(0, 50)),
    st.integers(1, 500),
)
def test_shares_sum_keep_to_their_limits_and_stay_near_proportion(
    weights: dict[str, float], limits: dict[str, int], total: int
) -> None:
    found = shares(weights, limits, total)
    assert sum(found.values()) == total and set(found) == set(weights) and min(found.values()) >= 0
    room = sum(limits.get(name, total) for name in weights)
    if room >= total:
        assert all(found[name] <= limits.get(name, total) for name in weights)
        free = [name for name in weights if found[name] < limits.get(name, total)]
        for a in free:
            for b in free:
                unit = Fraction(weights[a]) / Fraction(weights[b])
                assert found[a] <= (found[b] + 1) * unit + 1


# --- what the strata hold


def test_strata_hold_what_they_promise(many: tuple[list[Prompt], PromptStream]) -> None:
    for prompt in many[0]:
        names = [tool["function"]["name"] for tool in prompt.tools]
        assert len(names) == len(set(names)) and prompt.messages[-1].role == "user"
        assert bool(names) == (prompt.stratum in TOOL_STRATA)
        expected = "no_call" if prompt.stratum == "tool_control" else "call" if names else "any"
        assert prompt.expect == expected
        assert (prompt.fault != "") == (prompt.stratum == "tool_error")
        assert (prompt.ground_truth is not None) == (prompt.stratum in ("arithmetic", "long_context"))
        assert "{" not in said(prompt) and "  " not in prompt.text
        chat.render(prompt.messages, prompt.tools)
    assert {prompt.stratum for prompt in many[0]} == set(STRATA)
    assert {prompt.fault for prompt in many[0]} == {"", "once", "always"}


def test_tools_are_offered_in_changing_order_among_others(many: tuple[list[Prompt], PromptStream]) -> None:
    offered = [prompt for prompt in many[0] if prompt.tools]
    assert {len(prompt.tools) for prompt in offered if prompt.stratum == "tool_single"} == {3, 4, 5}
    assert max(len(prompt.tools) for prompt in offered) == 7
    assert {tool["function"]["name"] for prompt in offered for tool in prompt.tools} == set(BY_NAME)
    weather = [p for p in offered if p.stratum == "tool_single" and re.search("weather in|it will rain", p.text)]
    places = Counter([t["function"]["name"] for t in p.tools].index("get_weather") for p in weather)
    assert len(places) > 2
    for prompt in offered[:50]:
        for tool in prompt.tools:
            assert tool == BY_NAME[tool["function"]["name"]].offer
            assert schema_problem(tool["function"]["parameters"]) is None


def test_what_the_first_call_of_a_faulty_prompt_gets_is_an_error(many: tuple[list[Prompt], PromptStream]) -> None:
    prompts = many[1]
    prompt = next(p for p in many[0] if p.stratum == "tool_error" and "get_weather" in json.dumps(p.tools))
    result = prompts.broker.call(ToolCall("get_weather", {"city": "Oslo"}), seed=1, fault=prompt.fault)
    assert result.error
    assert not re.search("fault|simulat|broker", chat.render(prompt.messages, prompt.tools), re.IGNORECASE)


def test_arithmetic_knows_its_answers(many: tuple[list[Prompt], PromptStream]) -> None:
    checked = 0
    for prompt in many[0]:
        if found := re.fullmatch(r"What is (\d+) (plus|minus|times) (\d+)\? .*", prompt.text):
            a, b = int(found[1]), int(found[3])
            assert prompt.ground_truth == str({"plus": a + b, "minus": a - b, "times": a * b}[found[2]])
            checked += 1
    assert checked > 20


def test_a_long_document_holds_its_answer_once_beside_what_is_asked() -> None:
    texts = []
    for seed in range(30):
        question = long_question(Draw("long", seed), 9000)
        body, _, asked = question.text.rpartition("\n\n")
        other = {"According", "After", "Answer", "Going", "How", "On", "Using", "What", "Which", "Who"}
        (name,) = {word for word in re.findall(r"\b[A-Z][a-z]+\b", asked)} - other
        lines = [line for line in body.splitlines() if re.search(rf"\b{name}\b", line)]
        assert len(lines) == 1 and question.answer in lines[0]
        assert 9000 <= estimate_tokens(question.text) < 9200
        texts.append(question.text)
    assert max(jaccard(texts[0], other) for other in texts[1:]) < 0.3


def test_the_estimate_of_tokens_is_not_below_a_small_vocabulary_of_words() -> None:
    lengths = {name: next(built_in(name, 0, 12_000)).needs_tokens for name in STRATA}
    assert 3000 < lengths["long_context"] < 14_000 and max(lengths[n] for n in lengths if n != "long_context") < 2500
    assert estimate_tokens("2026-05-17") == 9 and estimate_tokens("") == 0
    assert estimate_tokens("word " * 100) * 3 > len(toy_tokenizer().encode("word " * 100))


def test_prompts_do_not_run_out_soon() -> None:
    assert sum(capacity(name) or 0 for name in STRATA) > 30_000
    for name in ("tool_single", "tool_parallel", "tool_chain", "arithmetic"):
        assert capacity(name) is None
        assert len({said(prompt) for _, prompt in zip(range(1500), built_in(name, 0, 500), strict=False)}) > 1300


def test_a_stratum_that_is_used_up_ends() -> None:
    prompts = stream(strata={"rewrite": 1.0})
    found = list(prompts)
    assert 300 < len(found) <= (capacity("rewrite") or 0) and prompts.exhausted == {"rewrite"}
    assert prompts.drops["rewrite", "near_duplicate"] > 0 and next(prompts, None) is None


# --- what is dropped and left out


def test_duplicates_are_dropped_with_their_evidence(tmp_path: Path) -> None:
    long = (
        "please explain to me in your own words how the tide comes and goes along the coast of the northern sea and why"
    )
    rows = [{"prompt": "What is rain?"}, {"prompt": "what  is RAIN"}, {"prompt": long}, {"prompt": long + " exactly"},
            {"prompt": "Something else"}]  # fmt: skip
    prompts = stream(strata={}, sources=[SourceConfig(write(tmp_path / "x.jsonl", rows))])
    found = list(prompts)
    assert len(found) == 3 and {drop.reason for drop in prompts.dropped} == {"duplicate", "near_duplicate"}
    kept = {prompt.id for prompt in found}
    for drop in prompts.dropped:
        assert any(identity in drop.evidence for identity in kept) and drop.evidence.startswith("x.jsonl:")
        assert drop.other in {" ".join(prompt.text.split())[:160] for prompt in found} and drop.other != drop.text
    assert prompts.drops == {("x", "duplicate"): 1, ("x", "near_duplicate"): 1}


def test_no_two_prompts_that_are_kept_are_near(many: tuple[list[Prompt], PromptStream]) -> None:
    short = [said(prompt) for prompt in many[0] if prompt.stratum in ("summarise", "tool_control")][:90]
    assert all(jaccard(a, b) < 0.8 for i, a in enumerate(short) for b in short[:i])


def test_what_is_in_an_evaluation_set_is_not_asked(tmp_path: Path) -> None:
    asked = take(60, stream(strata={"domain": 1.0, "arithmetic": 1.0}))
    secret = [prompt for prompt in asked if len(said(prompt).split()) > 12][:3]
    path = write(
        tmp_path / "eval.jsonl", [{"id": f"e{i}", "question": said(p) + " Really?"} for i, p in enumerate(secret)]
    )
    prompts = stream(strata={"domain": 1.0, "arithmetic": 1.0}, decontaminate=[path])
    found = take(60, prompts)
    assert not {prompt.id for prompt in found} & {prompt.id for prompt in secret}
    hits = [drop for drop in prompts.dropped if drop.reason == "contaminated"]
    assert {drop.id for drop in hits} >= {prompt.id for prompt in secret}
    assert all(drop.evidence.startswith("eval.jsonl e") for drop in hits)
    assert list(prompts.decontamination) == ["eval.jsonl"]
    items = [f"{said(prompt)} Really?" for prompt in secret]
    assert all(any(" ".join(item.split())[:150] == drop.other[:150] for item in items) for drop in hits)


def test_strata_that_need_tools_are_left_out_with_the_reason(tmp_path: Path) -> None:
    rows = [{"prompt": "with", "tools": ["set_timer"]}, {"prompt": "without any"}]
    mixed = SourceConfig(write(tmp_path / "mixed.jsonl", rows))
    only = SourceConfig(write(tmp_path / "only.jsonl", rows[:1]))
    prompts = stream(tools=False, sources=[mixed, only])
    assert prompts.left_out == dict.fromkeys([*TOOL_STRATA, "only"], "the teacher cannot call tools")
    found = take(300, prompts)
    assert not any(prompt.tools for prompt in found) and "without any" in {prompt.text for prompt in found}
    quotas = prompts.quotas(300)
    assert sum(quotas.values()) == 300 and not set(quotas) & set(TOOL_STRATA)


def test_what_is_too_long_is_left_out_or_dropped(tmp_path: Path) -> None:
    prompts = stream(room=200, long_context_tokens=8000)
    found = take(200, prompts)
    assert set(prompts.left_out) == {*TOOL_STRATA, "long_context"}
    assert "there is room for 200" in prompts.left_out["long_context"]
    assert all(prompt.needs_tokens <= 200 for prompt in found)
    rows = [{"prompt": "word " * (1000 if i % 2 else 3 + i)} for i in range(40)]
    some = stream(strata={}, sources=[SourceConfig(write(tmp_path / "x.jsonl", rows))], room=300, near_duplicates=1.0)
    assert all(prompt.needs_tokens <= 300 for prompt in some) and some.drops["x", "too_long"] == 20
    shrunk = stream(strata={"long_context": 1.0}, room=2500, long_context_tokens=8000)
    assert all(800 < prompt.needs_tokens <= 2500 for prompt in take(20, shrunk))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"strata": {"explian": 1.0}}, "the mix: strata: unknown stratum 'explian'; the nearest is 'explain'"),
        ({"strata": {"explain": -1.0}}, "the weight of explain must be 0 or more, not -1.0"),
        ({"strata": {"explain": 0.0}}, "no positive weight"),
        ({"strata": {}}, "no positive weight"),
        ({"near_duplicates": 0.0}, "threshold"),
    ],
)
def test_a_mix_that_makes_no_sense_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stream(**keys)


def test_a_mix_without_anything_to_ask_says_why() -> None:
    with pytest.raises(ConfigError, match="tool_single: the teacher cannot call tools"):
        stream(strata={"tool_single": 1.0}, tools=False)


def test_a_name_belongs_to_one_source(tmp_path: Path) -> None:
    path = write(tmp_path / "domain.jsonl", [{"prompt": "mine"}])
    with pytest.raises(ConfigError, match="stratum domain is in the mix already"):
        stream(sources=[SourceConfig(path)])
    assert [p.text for p in stream(strata={"domain": 0.0}, sources=[SourceConfig(path)])] == ["mine"]


def test_tools_and_fixtures_from_files_answer_prompts_from_files(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"item": {"type": "string"}}, "required": ["item"]}
    tools = write(tmp_path / "tools.jsonl", [{"name": "stock", "parameters": schema}])
    fixtures = write(tmp_path / "fixtures.jsonl", [{"tool": "stock", "args": {"item": "nut"}, "result": {"left": 3}}])
    inline = {"name": "shelf", "parameters": schema, "returns": {"const": "B7"}}
    source = write(tmp_path / "x.jsonl", [{"prompt": "How many nuts?", "tools": ["stock", inline], "expect": "call"}])
    prompts = stream(strata={}, sources=[SourceConfig(source)], tool_files=[tools], fixtures=[fixtures])
    prompt = next(prompts)
    assert [tool["function"]["name"] for tool in prompt.tools] == ["stock", "shelf"]
    assert prompts.broker.call(ToolCall("stock", {"item": "nut"}), seed=0).content == '{"left": 3}'
    assert prompts.broker.call(ToolCall("shelf", {"item": "nut"}), seed=0).content == '"B7"'
    with pytest.raises(ConfigError, match="stock has neither fixtures nor"):
        stream(strata={"domain": 1.0}, tool_files=[tools])
    with pytest.raises(DatasetError, match="unknown tool 'stock'"):
        stream(strata={"domain": 1.0}, fixtures=[fixtures])


def test_the_shipped_mix_holds_every_stratum_with_its_weight() -> None:
    from distill.data.mix_config import MixConfig

    assert load("configs/kd_mix.yaml", MixConfig).strata == WEIGHTS
