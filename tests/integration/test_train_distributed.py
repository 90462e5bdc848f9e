"""Several processes compute what one does: gradients, runs, and what a stopped or killed run goes on from."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import yaml
from rich.console import Console
from torch import Tensor

from distill import checkpoint
from distill.data.batches import Examples
from distill.data.records import Dataset
from distill.errors import CheckpointError, stage_main
from distill.model import ModelConfig, Student
from distill.pretrained import save_pretrained
from distill.tokenizer import toy_tokenizer
from distill.train import loop, resume, sharded
from distill.train.adapters import add_adapters
from distill.train.config import LoraSection, OnPolicySection, TeacherSection, TrainConfig
from distill.train.distributed import ALONE, World, open_world
from distill.train.divergences import Divergence
from distill.train.objective import Objective, Sums
from distill.train.prepare import prepare
from distill.train.step import gradients
from distill.train.toy import toy_model
from tests.ranks import Ranks
from tests.unit.train_sets import config, write_set

KILLS = int(os.environ.get("TRAIN_KILLS", "6"))
SEED = int(os.environ.get("TRAIN_SEED", "1"))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("set") / "d.jsonl", 16, truth="No.")


# -- a step

_KINDS = ("forward_kl", "reverse_kl", "jsd", "tvd")


def _cut(indices: list[int], draw: random.Random) -> list[list[int]]:
    cuts = sorted(draw.sample(range(1, len(indices)), draw.randint(0, 4)))
    return [indices[a:b] for a, b in zip([0, *cuts], [*cuts, len(indices)])]


def _student(draw: random.Random) -> Student:
    size = ModelConfig(
        vocab_size=1088 + draw.choice([0, 5]), hidden_size=draw.choice([24, 30]), intermediate_size=37,
        num_hidden_layers=draw.randint(1, 3), num_attention_heads=2, num_key_value_heads=draw.choice([1, 2]),
        head_dim=16, tie_word_embeddings=draw.random() < 0.5, qk_norm=draw.random() < 0.5,
        attention_bias=draw.random() < 0.3,
    )  # fmt: skip
    student = Student(size).init_weights(draw.randrange(1000))
    student.gradient_checkpointing = draw.random() < 0.5
    if draw.random() < 0.3:
        add_adapters(student, LoraSection(rank=3, targets=["q_proj", "down_proj"]), draw.randrange(1000))
    return student.train()


def _vector(tensors: list[Tensor]) -> Tensor:
    return torch.cat([x.flatten().double() for x in tensors])


def _compare(world: World, examples: Examples, seed: int) -> tuple[float, float, float]:
    """How far several processes are from one, with the work cut up otherwise: gradient, weights after a step of SGD
    (over the size of the step), and loss."""
    draw = random.Random(seed)
    student = _student(draw)
    weights = {"kl_div": draw.random(), "ce_teacher": draw.random(), "ce_ground_truth": draw.random()}
    objective = Objective(weights, Divergence(draw.choice(_KINDS)), span_weights={"tool_args": draw.choice([0.0, 3.0])})
    order = draw.sample(range(len(examples)), 7)
    model = sharded.shard(sharded.outline(student), {n: p.detach() for n, p in student.named_parameters()}, world,
                          torch.device("cpu"))  # fmt: skip
    window = [examples.batch(part) for part in _cut(order, draw)]
    theirs = gradients(model, world.mine(window), objective, world)
    whole_window = [examples.batch(part) for part in _cut(draw.sample(order, 7), draw)]
    ours = gradients(student, whole_window, objective)
    before = _vector([p.detach() for p in student.parameters() if p.requires_grad])
    gradient = [_vector([p.grad for p in student.parameters() if p.grad is not None]),
                _vector([sharded.full(p.grad) for p in model.parameters() if p.grad is not None])]  # fmt: skip
    for trained in (student, model):
        torch.optim.SGD([p for p in trained.parameters() if p.requires_grad], lr=0.1).step()
    after = [_vector([p.detach() for p in student.parameters() if p.requires_grad]),
             _vector([sharded.full(p.detach()) for p in model.parameters() if p.requires_grad])]  # fmt: skip
    return (
        float((gradient[1] - gradient[0]).norm() / gradient[0].norm()),
        float((after[1] - after[0]).norm() / (after[0] - before).norm()),
        abs(theirs.total(weights) - ours.total(weights)) / abs(ours.total(weights)),
    )


def _worst(out: str, data: str, seeds: range, plant: str) -> None:
    torch.set_num_threads(1)
    divide = sharded.FSDPModule.set_gradient_divide_factor
    if plant == "averaged gradients":
        sharded.FSDPModule.set_gradient_divide_factor = lambda self, factor: divide(self, 2.0)  # type: ignore[method-assign]
    with open_world(torch.device("cpu")) as world:
        if plant == "a denominator each":

            class Deaf(World):
                def gather(self, value: Any) -> list[Any]:
                    found = World.gather(self, value)
                    mine = isinstance(value, tuple)
                    return [(value[0], n) for _, n in found] if mine else found

            world = Deaf(*world)
        examples = Examples(Dataset.open(data), toy_tokenizer(), "train", max_length=512)
        found = [_compare(world, examples, seed) for seed in seeds]
        if world.first:
            Path(out).write_text(json.dumps(found))


def _errors(folder: Path, data: Path, size: int, seeds: range, plant: str = "") -> list[list[float]]:
    out = folder / "errors.json"
    assert Ranks(size, _worst, str(out), str(data), seeds, plant).wait() == [0] * size
    return json.loads(out.read_text())


@pytest.mark.parametrize("size", [2, 3])
def test_gradient_update_and_loss_do_not_depend_on_the_number_of_processes(
    tmp_path: Path, data: Path, size: int
) -> None:
    """Random students, divergences, weights and cuts: fewer micro-batches than processes too."""
    for gradient, weights, loss in _errors(tmp_path, data, size, range(20 * SEED, 20 * SEED + 20)):
        assert gradient < 1e-6 and loss < 1e-6
        assert weights < 3e-6, "rounded once more, to the weights' own last bit"


@pytest.mark.parametrize("plant", ["averaged gradients", "a denominator each"])
def test_a_planted_fault_shows(tmp_path: Path, data: Path, plant: str) -> None:
    assert min(gradient for gradient, *_ in _errors(tmp_path, data, 2, range(4), plant)) > 1e-2


# -- a run


def _train(settings: TrainConfig) -> None:
    @stage_main
    def main(argv: list[str] | None = None) -> int:
        loop.run(settings, console=Console(file=io.StringIO()))
        return 0

    sys.exit(main())


def _run(settings: TrainConfig, size: int = 2) -> None:
    assert Ranks(size, _train, settings).wait() == [0] * size


def _settings(folder: Path, data: Path, **changes: Any) -> TrainConfig:
    """Three micro-batches a step."""
    return config(folder, data, **({"batch_size": 1, "accumulation": 3, "save_every": 2, "eval_every": 5} | changes))


def _weights(folder: Path) -> Tensor:
    return _vector(list(checkpoint.load(folder / "checkpoints/worker.pt").student.state_dict().values()))


def _steps(folder: Path) -> list[dict[str, float]]:
    (path,) = (folder / "runs").rglob("steps.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def _report(folder: Path) -> dict[str, Any]:
    report = json.loads((folder / "checkpoints/worker.report.json").read_text())
    del report["tokens_per_second"], report["provenance"]
    return report


def _assert_near(one: Path, other: Path, tolerance: float = 1e-5) -> None:
    first, second = _weights(one), _weights(other)
    assert (first - second).norm() < tolerance * first.norm()
    for a, b in zip(_steps(one), _steps(other), strict=True):
        assert a.keys() == b.keys() and a == pytest.approx(b, rel=tolerance * 10, abs=1e-7)
    assert sorted(p.name for p in (one / "checkpoints").iterdir()) == ["latest.pt", "worker.pt", "worker.report.json"]


def _assert_same(one: Path, other: Path) -> None:
    assert torch.equal(_weights(one), _weights(other))
    assert _steps(one) == _steps(other) and _report(one) == _report(other)
    assert sorted(p.name for p in (one / "checkpoints").iterdir()) == ["latest.pt", "worker.pt", "worker.report.json"]


def test_two_processes_train_what_one_does(tmp_path: Path, data: Path) -> None:
    _run(_settings(tmp_path / "two", data))
    loop.run(_settings(tmp_path / "one", data), console=Console(file=io.StringIO()))
    _assert_near(tmp_path / "two", tmp_path / "one")
    held_out = [_report(tmp_path / name)["held_out"]["after"] for name in ("two", "one")]
    assert held_out[0] == pytest.approx(held_out[1], rel=1e-4)


def test_torchrun_as_documented_and_one_line_from_one_process(tmp_path: Path, data: Path) -> None:
    settings = msgspec.to_builtins(_settings(tmp_path, data, max_steps=3))
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "training.distill_kd", "--config", str(tmp_path / "two.yaml")]  # fmt: skip
    for _ in range(2):
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        # seen 2 times in some 20 on busy cores, not explained: the second process aborts in C++
        if "terminate called without an active exception" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr
    assert (
        len(re.findall(r"^student .* parameters", done.stdout, re.M))
        == len(re.findall("worker.pt: stage worker", done.stdout))
        == 1
    )
    assert "2 processes" in done.stdout and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "changes",
    [
        {"lora": LoraSection(rank=4)},
        {"dtype": "bf16", "gradient_checkpointing": True},
        {"optimiser": "adamw8bit", "max_steps": 5},
    ],
    ids=["lora", "bf16", "8-bit moments"],
)
def test_options_work_with_two_processes_and_resume_bit_for_bit(
    tmp_path: Path, data: Path, changes: dict[str, Any]
) -> None:
    one, two, stopped = (_settings(tmp_path / name, data, **changes) for name in ("one", "two", "stopped"))
    _run(two)
    ranks = Ranks(2, _train, stopped, stderr=os.devnull)
    _wait_for(tmp_path / "stopped", 4)
    ranks.send(signal.SIGTERM)
    assert ranks.wait() == [75, 75]
    _run(stopped)
    _assert_same(tmp_path / "stopped", tmp_path / "two")
    loop.run(one, console=Console(file=io.StringIO()))
    _assert_near(tmp_path / "two", tmp_path / "one", 1e-3 if len(changes) > 1 else 1e-5)


def test_two_processes_answer_on_policy_as_one_does(tmp_path: Path, data: Path) -> None:
    teacher = Student(toy_model(32, 2)).init_weights(7)
    save_pretrained(teacher, tmp_path / "teacher")
    (tmp_path / "teacher/tokenizer.json").write_text(toy_tokenizer().to_json())
    section = {"teacher": TeacherSection(folder=str(tmp_path / "teacher")),
               "on_policy": OnPolicySection(share=0.5, max_new_tokens=8), "max_steps": 6}  # fmt: skip
    _run(_settings(tmp_path / "two", data, **section))
    loop.run(_settings(tmp_path / "one", data, **section), console=Console(file=io.StringIO()))
    _assert_near(tmp_path / "two", tmp_path / "one")


# -- stopped, killed, damaged


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data: Path) -> tuple[Path, float]:
    """An undisturbed run of two processes, and its seconds."""
    folder = tmp_path_factory.mktemp("whole")
    start = time.monotonic()
    _run(_settings(folder, data))
    return folder, time.monotonic() - start


def _wait_for(folder: Path, step: int) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(ValueError, FileNotFoundError):
            if len(_steps(folder)) >= step:
                return
        time.sleep(0.005)
    raise AssertionError(f"step {step} was not reached")


def test_killed_at_random_instants_all_or_one_of_them_it_ends_in_the_same_bits(
    tmp_path: Path, data: Path, whole: tuple[Path, float]
) -> None:
    draw, kills = random.Random(SEED), 0
    while kills < KILLS:
        ranks = Ranks(2, _train, _settings(tmp_path, data), stderr=os.devnull)
        time.sleep(draw.uniform(0.2, whole[1]))
        if draw.random() < 0.5:
            ranks.send(signal.SIGKILL)
        else:
            ranks.send_one(draw.choice(ranks.processes), signal.SIGKILL)
        if ranks.wait() == [0, 0]:
            _assert_same(tmp_path, whole[0])
            shutil.rmtree(tmp_path / "checkpoints")
        else:
            kills += 1
    _run(_settings(tmp_path, data))
    _assert_same(tmp_path, whole[0])


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2), (3, 2)])
def test_another_number_of_processes_goes_on(
    tmp_path: Path, data: Path, whole: tuple[Path, float], first: int, then: int
) -> None:
    settings = _settings(tmp_path, data)
    ranks = Ranks(first, _train, settings, stderr=os.devnull)
    _wait_for(tmp_path, 5)
    ranks.send(signal.SIGTERM)
    assert ranks.wait() == [75] * first
    _run(settings, then)
    _assert_near(tmp_path, whole[0])


def test_a_damaged_part_is_told_and_the_checkpoint_before_it_used(
    tmp_path: Path, data: Path, whole: tuple[Path, float]
) -> None:
    settings = _settings(tmp_path, data)
    ranks = Ranks(2, _train, settings, stderr=os.devnull)
    _wait_for(tmp_path, 5)
    ranks.send(signal.SIGTERM)
    assert ranks.wait() == [75, 75]
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("*.pt"))
    assert len(kept) >= 4 and kept[-1].endswith(".1of2.pt")
    newest = tmp_path / "checkpoints" / kept[-1]
    newest.write_bytes(newest.read_bytes()[:-100] + bytes(100))
    said: list[str] = []
    found = resume.find(prepare(settings), said.append)
    assert found is not None and [f"step_{part['step']:06d}" in kept[-3] for part in found] == [True, True]
    assert len(said) == 1 and kept[-1] in said[0] and "damaged" in said[0]
    (tmp_path / "elsewhere").mkdir()
    for name in kept[:-2]:
        (tmp_path / "checkpoints" / name).rename(tmp_path / "elsewhere" / name)
    with pytest.raises(CheckpointError, match="no resumable checkpoint of this run is sound"):
        resume.find(prepare(settings), said.append)
    for name in kept[:-2]:
        (tmp_path / "elsewhere" / name).rename(tmp_path / "checkpoints" / name)
    _run(settings)
    _assert_same(tmp_path, whole[0])


def test_parts_that_are_not_what_their_names_say_are_damage(tmp_path: Path, data: Path) -> None:
    settings = _settings(tmp_path, data)
    ranks = Ranks(2, _train, settings, stderr=os.devnull)
    _wait_for(tmp_path, 5)
    ranks.send(signal.SIGTERM)
    assert ranks.wait() == [75, 75]
    folder = tmp_path / "checkpoints"
    first, second = sorted(folder.glob("*of2.pt"))[-2:]
    older = sorted(folder.glob("*of2.pt"))[-4]
    for source in (second, older):  # another process's part, another step's
        kept = first.read_bytes()
        checkpoint.write_sealed(first, checkpoint.read(source))
        said: list[str] = []
        found = resume.find(prepare(settings), said.append)
        assert found is not None and f"step_{found[0]['step']:06d}" in older.name and "than its name says" in said[0]
        first.write_bytes(kept)


def _slow_first(settings: TrainConfig) -> None:
    """The first process removes what is old later than the other one writes what is new."""
    thin = resume.thin

    def late(*arguments: Any) -> None:
        if os.environ["RANK"] == "0":
            time.sleep(0.03)
        thin(*arguments)

    resume.thin = late
    _train(settings)


def test_what_another_process_is_writing_is_not_removed(tmp_path: Path, data: Path, whole: tuple[Path, float]) -> None:
    settings = _settings(tmp_path, data, save_every=1)
    ranks = Ranks(2, _slow_first, settings, stderr=os.devnull)
    _wait_for(tmp_path, 6)
    ranks.send(signal.SIGTERM)
    assert ranks.wait() == [75, 75]
    step = len(_steps(tmp_path))
    found = resume.find(prepare(settings), lambda text: None)
    assert found is not None and [part["step"] for part in found] == [step, step]


def test_one_that_fails_says_why_and_the_others_that_another_ended(tmp_path: Path, data: Path) -> None:
    ranks = Ranks(2, _train_without_data, _settings(tmp_path, data), stderr=str(tmp_path / "err"))
    assert sorted(map(int, filter(None, ranks.wait()))) == [1, 2]
    lines = (tmp_path / "err").read_text().splitlines()
    ours = [line for line in lines if line.startswith("error: ")]
    assert any("absent.jsonl" in line for line in ours) and any("another process of this run" in line for line in ours)
    assert not any("Traceback" in line for line in lines)


def _train_without_data(settings: TrainConfig) -> None:
    if os.environ["RANK"] == "1":
        settings = msgspec.structs.replace(settings, data="absent.jsonl")
    _train(settings)


def test_gathered_sums_are_those_of_one_process() -> None:
    part = Sums({"kl_div": 0.1}, {"kl_div": 1}, {"kl_div": 0.1}, 1.0)
    assert ALONE.gather(part) == [part] and ALONE.mine([1, 2, 3]) == [1, 2, 3]
    assert World(1, 2).mine([1, 2, 3]) == [2]
