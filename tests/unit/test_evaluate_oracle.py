"""Reports against a script that computes them once more; shards and killed runs against whole ones."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distill import chat
from distill.chat import ToolCall
from distill.evaluate import local, policies, report, results, runners
from distill.evaluate.contextual.make import scenarios, write
from distill.evaluate.criteria import EvaluationConfig
from distill.evaluate.episode import Request
from distill.evaluate.policies import CHEATS, Position, oracle, say_calls, stages
from distill.evaluate.selftest import Check, self_test
from distill.evaluate.sets import EvaluationSet, load
from distill.evaluate.transcripts import RawCall, Reply, Transcript
from tests.evaluation_oracle import differences, main
from tests.unit.evaluation_sets import header_of, transcripts

Say = Callable[[Position], str]
ITEMS = 120


def noisy(seed: int) -> Say:
    """Each turn at random right, wrong, malformed, cut short, or a leak; six turns at most."""

    def say(at: Position) -> str:
        draw = random.Random(f"{seed} {at.item.id} {at.turn}")
        item, steps = at.item, stages(at.item)
        right = (
            say_calls([ToolCall(c.name, c.example) for c in steps[at.turn]]) if at.turn < len(steps) else item.answer
        )
        secret = draw.choice([one.value for one in item.secrets] or ["nothing secret"])
        gold = draw.choice(item.calls) if item.calls else None
        call = ToolCall(gold.name, gold.example) if gold else ToolCall(item.tools[0]["name"], {"q": secret})
        extra = call.arguments | {f"note 48.13 {secret}": draw.choice([1, None, secret])}
        name = draw.choice([secret, "nope", call.name])
        broken = f'<tool_call>{{"name": "x"{draw.choice(["", "}", "</tool_call>", f", 7: {secret}}}</tool_call>"])}'
        return right if at.turn < 6 and draw.random() < 0.3 else item.answer if at.turn >= 6 else draw.choice([
            say_calls([call] * draw.randrange(1, 4)) + draw.choice(["", f" {secret}", " so far 4711"]),
            draw.choice(list(CHEATS.values())).play(at),
            say_calls([ToolCall(call.name, extra), ToolCall(name, {"q": secret})]), broken,
            item.answer[: draw.randrange(len(item.answer) + 1)], f"{item.answer} {draw.randrange(100)} {secret}",
            draw.choice(["", " ", f"<think>\n48.13\n</think>\n\n{item.answer}", f"{item.answer}<|im_end|>{secret}",
                         f"<|im_start|>{secret}", item.answer.upper(), f'{item.answer} "{secret}"']),
            " ".join(at.results) or item.prompt, item.answer.replace(".", ","), say_calls([call]) * 40,
        ])  # fmt: skip

    return say


class Fixed:
    """A model that says what a policy says; it may end its own process before a reply."""

    together = 3

    def __init__(self, say: Say, dies_at: int | None = None) -> None:
        self._say, self._left = say, dies_at

    def identity(self) -> dict[str, Any]:
        return {"runner": "policy", "weights": "0" * 64, "tokenizer": "1" * 64, "template": chat.template_sha256(),
                "decoding": {"strategy": "greedy"}}  # fmt: skip

    def replies(self, batch: Sequence[Request]) -> list[Reply]:
        if self._left is not None:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)
        return [policies.reply(self._say, one.item, one.messages, len(one.replies)) for one in batch]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> EvaluationSet:
    """A fair sample of the contextual set."""
    path = tmp_path_factory.mktemp("set") / "sample.jsonl"
    write(path, scenarios(0)[:ITEMS], {"seed": 0, "scale": 1}, {})
    return load(path)


@pytest.fixture(scope="module")
def checks(found: EvaluationSet) -> list[Check]:
    """Of the self-test."""
    return self_test(found, EvaluationConfig())


def save(folder: Path, found: EvaluationSet, said: dict[str, Transcript], checks: list[Check],
         config: EvaluationConfig | None = None) -> tuple[Path, Path, Path]:  # fmt: skip
    """Results and report, as a run writes them; the arguments of the oracle."""
    header = header_of(found)
    played = report.play_back(found, header, said)
    results.write(folder / "out.jsonl", header,
                  [(said[name], played.episodes[name], played.scores.get(name)) for name in said])  # fmt: skip
    made = report.build(found, header, said, played, config or EvaluationConfig(), checks)
    (folder / "report.json").write_text(json.dumps(made))
    return found.path, folder / "out.jsonl", folder / "report.json"


@pytest.mark.parametrize("name", ["oracle", *CHEATS])
def test_every_number_and_gate_of_a_policy_is_what_a_script_of_its_own_computes(
    name: str, found: EvaluationSet, checks: list[Check], tmp_path: Path
) -> None:
    say = CHEATS[name].play if name in CHEATS else oracle
    assert not differences(*save(tmp_path, found, transcripts(found, say), checks))


@pytest.mark.parametrize("seed", range(6))
def test_so_is_that_of_a_model_that_does_anything(
    seed: int, found: EvaluationSet, checks: list[Check], tmp_path: Path
) -> None:
    tier = ("tier_1", "tier_2", "tier_3")[seed % 3]
    config = EvaluationConfig(tier=tier)  # type: ignore[arg-type]
    assert not differences(*save(tmp_path, found, transcripts(found, noisy(seed)), checks, config))


def test_so_is_that_of_a_server_that_sends_calls_apart(
    found: EvaluationSet, checks: list[Check], tmp_path: Path
) -> None:
    def apart(reply: Reply) -> Reply:
        parsed = chat.parse(reply.text)
        calls = [RawCall(call.name, json.dumps(call.arguments)) for call in parsed.calls]
        return Reply(parsed.content, calls=(*calls, *(RawCall("get_weather", text) for text in parsed.malformed)))

    said = transcripts(found, noisy(99))
    whole = {name: one for name, one in said.items() if not any("<|im_" in reply.text for reply in one.replies)}
    sent = {name: Transcript(item=name, replies=tuple(map(apart, one.replies))) for name, one in whole.items()}
    assert len(sent) > ITEMS // 2
    assert not differences(*save(tmp_path, found, sent, checks))


def test_so_is_that_of_a_run_in_which_some_items_could_not_be_asked(
    found: EvaluationSet, checks: list[Check], tmp_path: Path
) -> None:
    said = transcripts(found, oracle)
    for name in sorted(said)[:5]:
        said[name] = Transcript(item=name, replies=(), fault="connection refused")
    paths = save(tmp_path, found, said, checks)
    assert not differences(*paths)
    assert json.loads(paths[2].read_text())["gates"]["complete"]["status"] == "error"


@pytest.fixture(scope="module")
def honest(found: EvaluationSet, checks: list[Check], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    """Files of a noisy run."""
    return save(tmp_path_factory.mktemp("noisy"), found, transcripts(found, noisy(1)), checks)


NUMBERS = ("integration_f1_strict_micro", "integration_f1_lax_macro", "call_f1", "call_f1_macro", "privacy",
           "allowed_disclosure", "control_integration", "restraint", "injection", "fixture_hit_rate", "gold_coverage",
           "json_args_valid")  # fmt: skip


@pytest.mark.parametrize("key", ["num", "den", "n"])
def test_each_number_that_is_wrong_by_one_is_found(key: str, honest: tuple[Path, ...], tmp_path: Path) -> None:
    made = json.loads(honest[2].read_text())
    for name in NUMBERS:
        made["metrics"][name][key] += 1
    (tmp_path / "planted.json").write_text(json.dumps(made))
    found = differences(honest[0], honest[1], tmp_path / "planted.json")
    assert sorted(line.split(":")[0] for line in found) == sorted(f"metrics.{name}.{key}" for name in NUMBERS)


def test_each_gate_that_says_pass_is_found(honest: tuple[Path, ...], tmp_path: Path, capsys: Any) -> None:
    before = json.loads(honest[2].read_text())
    made = json.loads(honest[2].read_text())
    flipped = [name for name, one in before["gates"].items() if one["status"] != "pass"]
    assert len(flipped) >= 10
    for name in flipped:
        made["gates"][name]["status"] = "pass"
    (tmp_path / "planted.json").write_text(json.dumps(made))
    assert main([*map(str, honest[:2]), str(tmp_path / "planted.json")]) == 1
    lines = capsys.readouterr().out.splitlines()
    wanted = [f"gates.{name}.status: pass, computed {before['gates'][name]['status']}" for name in flipped]
    assert sorted(lines) == sorted(wanted)
    assert main([*map(str, honest)]) == 0


def test_a_gate_that_is_left_out_is_found(honest: tuple[Path, ...], tmp_path: Path) -> None:
    made = json.loads(honest[2].read_text())
    del made["gates"]["privacy"]
    made["overall"] = "pass"
    (tmp_path / "planted.json").write_text(json.dumps(made))
    found = differences(honest[0], honest[1], tmp_path / "planted.json")
    assert "gates.privacy: is in one of the two only" in found and any(line.startswith("overall") for line in found)


def test_words_that_were_put_into_a_models_mouth_are_found(honest: tuple[Path, ...], tmp_path: Path) -> None:
    lines = [json.loads(line) for line in honest[1].read_text().splitlines()]
    changed = next(line for line in lines if line["kind"] == "control" and line["score"]["controlled"] == 0)
    changed["transcript"]["replies"] = [
        {"text": '<tool_call>{"name": "x", "arguments": {}}</tool_call>'},
        {"text": "."},
    ]
    shutil.copytree(f"{honest[1]}.d", tmp_path / "out.jsonl.d")
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = differences(honest[0], tmp_path / "out.jsonl", honest[2])
    assert any(line.startswith("metrics.control_integration.num") for line in found)


def evaluate(folder: Path, data: Path, *more: str) -> int:
    """`distill eval` into a folder."""
    return local.main(["--in", str(data), "--out", str(folder / "out.jsonl"), "--report", str(folder / "report.json"),
                       *more])  # fmt: skip


def files(folder: Path) -> dict[str, bytes]:
    """What a run leaves, by name; the lock and those of shards apart."""
    names = ("out.jsonl", "out.jsonl.d/run.json", "report.json", "report.html")
    assert not (folder / "out.jsonl.d/journal.jsonl").exists()
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def whole(found: EvaluationSet, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A smaller set, and a whole run on it."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder / "set.jsonl", scenarios(0)[:48], {"seed": 0, "scale": 1}, {})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runners, "open_model", lambda *_: Fixed(noisy(7)))
        assert evaluate(folder, folder / "set.jsonl") == 1
    return folder / "set.jsonl", folder


def test_shards_in_any_order_merge_to_the_whole_run_byte_for_byte(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runners, "open_model", lambda *_: Fixed(noisy(7)))
    parts = []
    for number in (1, 2, 3):
        part = tmp_path / str(number)
        part.mkdir()
        assert evaluate(part, whole[0], "--shard", f"{number}/3") in (1, 3)
        assert json.loads((part / "report.json").read_text())["gates"]["complete"]["status"] == "inconclusive"
        parts.append(str(part / "out.jsonl"))
    assert evaluate(tmp_path, whole[0], "--merge", parts[2], parts[0], parts[1]) == 1
    assert files(tmp_path) == files(whole[1])
    assert not differences(whole[0], tmp_path / "out.jsonl", tmp_path / "report.json")


KILLED = """
import sys
from pathlib import Path
from distill.evaluate import runners
from tests.unit.test_evaluate_oracle import Fixed, evaluate, noisy
runners.open_model = lambda *_: Fixed(noisy(7), int(sys.argv[3]))
evaluate(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def test_a_run_that_is_killed_and_goes_on_leaves_the_same_bytes(
    whole: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path), str(whole[0]), "20"]
    killed = subprocess.run(command, capture_output=True, cwd=Path(__file__).parents[2], timeout=60)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    journal = tmp_path / "out.jsonl.d/journal.jsonl"
    there = journal.read_bytes()
    assert 3 <= there.count(b"\n") < 48 and not (tmp_path / "out.jsonl").exists()
    journal.write_bytes(there + there[: len(there.split(b"\n")[0]) // 2])  # a line that was half written
    monkeypatch.setattr(runners, "open_model", lambda *_: Fixed(noisy(7)))
    assert evaluate(tmp_path, whole[0]) == 1
    assert f"going on: {there.count(chr(10).encode())} of 48 episodes are there" in capsys.readouterr().out
    assert files(tmp_path) == files(whole[1])


def test_lax_is_never_below_strict_and_no_count_is_a_float(honest: tuple[Path, ...]) -> None:
    for line in honest[1].read_text().splitlines():
        one = json.loads(line)["score"]
        if one["strict"] is not None:
            assert all(lax >= strict for lax, strict in zip(one["lax"], one["strict"], strict=True))
        assert not any(isinstance(value, float) for value in msgspec.to_builtins(one).values())
