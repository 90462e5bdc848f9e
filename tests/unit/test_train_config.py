"""Configurations: what is refused, what ships, and the plan of the 9B worker."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
import yaml

from distill.config import as_dict, load
from distill.errors import ConfigError
from distill.model import Student
from distill.pretrained import save_pretrained
from distill.tokenizer import toy_tokenizer
from distill.train import init, loop, memory
from distill.train.config import InitSection, TrainConfig, fingerprint, identity
from distill.train.kd import load_config, main
from distill.train.prepare import prepare
from distill.train.toy import toy_model
from tests.unit.train_sets import config, write_set

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("worker_*.yaml")), ids=lambda p: p.name)
def test_every_shipped_worker_configuration_loads(path: Path) -> None:
    assert load(path, TrainConfig).stage.startswith("worker")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lrr: 1", "unknown key 'lrr'; the nearest key is 'lr'"),
        ("loss_weights: {kl: 1}", "unknown key 'loss_weights.kl'; the nearest key is 'loss_weights.kl_div'"),
        ("model: {vocab: 5}", "unknown key 'model.vocab'; the nearest key is 'model.vocab_size'"),
        (
            "curriculum: [{max_len: 5}]",
            "unknown key 'curriculum[].max_len'; the nearest key is 'curriculum[].max_length'",
        ),
        ("lr: 0", "lr must be above 0"),
        ("lr: fast", "lr must be a number, not a string"),
        ("schedule: step", "schedule"),
        ("loss_weights: {kl_div: 0, ce_teacher: 0, ce_ground_truth: 0}", "all are 0"),
        ("loss_weights: {kl_div: .nan}", "loss_weights.kl_div"),
        ("curriculum: [{max_length: 9}, {max_length: 5}]\ninit: {checkpoint: c.pt}", "must grow"),
        ("batch_size: 0", "batch_size must be at least 1"),
        ("stage: ../worker", "plain name"),
        ("epochs: 1\nepochs: 2", "given twice"),
        ("init: {from_pretrained: a, checkpoint: b}", "not both"),
        ("init: {keep_layers: 3}", "keep_layers needs"),
    ],
)
def test_a_wrong_configuration_is_one_line_that_names_the_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, message: str
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"data: d.jsonl\n{text}\n")
    assert main(["--config", str(path)]) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1 and str(path) in line and message in line


def test_a_missing_configuration_dataset_or_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--config", str(tmp_path / "none.yaml")]) == 2
    assert "none.yaml" in capsys.readouterr().err
    for changes, name in (
        ({"data": str(tmp_path / "none.jsonl")}, "none.jsonl"),
        ({"tokenizer": "none.json"}, "none.json"),
    ):
        settings = as_dict(config(tmp_path, tmp_path / "d.jsonl")) | changes
        if name != "none.jsonl":
            write_set(tmp_path / "d.jsonl")
        (tmp_path / "c.yaml").write_text(yaml.safe_dump(settings))
        assert main(["--config", str(tmp_path / "c.yaml")]) == 2
        error = capsys.readouterr().err
        assert name in error and error.count("\n") == 1


def test_the_9b_worker_has_the_documented_dimensions() -> None:
    settings = load_config(str(CONFIGS / "worker_9b.yaml"))
    model = settings.model
    assert model is not None
    with torch.device("meta"):
        student = Student(model)
    built = sum(p.numel() for p in student.parameters())
    assert built == model.n_params() and round(built / 1e9, 2) == 8.99
    assert [s.max_length for s in settings.stages()] == [4096, 8192, 16384]


def test_the_9b_training_step_runs_at_small_width_with_every_other_setting_equal(tmp_path: Path) -> None:
    whole = load_config(str(CONFIGS / "worker_9b.yaml"))
    assert whole.model is not None
    narrow = msgspec.structs.replace(
        whole.model, hidden_size=64, intermediate_size=224, num_hidden_layers=4, head_dim=4
    )
    data = write_set(tmp_path / "d.jsonl", 8, val=2)
    settings = msgspec.structs.replace(
        whole, model=narrow, data=str(data), tokenizer="toy", device="cpu", threads=1, max_steps=2,
        checkpoints=str(tmp_path / "c"), runs=str(tmp_path / "r"),
    )  # fmt: skip
    it = prepare(settings)
    assert {len(step) for step in it.steps} <= set(range(1, 9)) and it.start.student.config.num_key_value_heads == 8
    values = loop.run(settings).values
    assert values["steps"] == 2 and values["loss"] < values["first_loss"]


def test_layers_are_kept_evenly_with_the_first_and_the_last() -> None:
    def kept(keep: int | list[int]) -> list[int]:
        return init.layers_kept(InitSection(from_pretrained="x", keep_layers=keep), 30)

    assert kept(18)[0] == 0 and kept(18)[-1] == 29 and len(set(kept(18))) == 18
    assert kept(30) == list(range(30)) and kept(2) == [0, 29] and kept([1, 4]) == [1, 4]
    for wrong in (1, 31, [3, 2], [0, 30], []):
        with pytest.raises(ConfigError, match="keep_layers"):
            kept(wrong)


def test_a_student_of_some_layers_shares_the_weights_of_the_folder(tmp_path: Path) -> None:
    whole = Student(msgspec.structs.replace(toy_model(32, 5), tie_word_embeddings=True)).init_weights(1)
    save_pretrained(whole, tmp_path / "hf")
    (tmp_path / "hf/tokenizer.json").write_text(toy_tokenizer().to_json())
    section = InitSection(from_pretrained=str(tmp_path / "hf"), keep_layers=3)
    settings = config(tmp_path, tmp_path / "d.jsonl", model=None, tokenizer=None, init=section)
    start = init.build(settings)
    assert start.student.config.num_hidden_layers == 3 == memory.model_config(settings).num_hidden_layers
    for new, old in enumerate((0, 2, 4)):
        ours, theirs = start.student.model.layers[new].state_dict(), whole.model.layers[old].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert start.student.lm_head.weight is start.student.model.embed_tokens.weight
    assert sum(p.numel() for p in start.student.parameters()) == start.student.config.n_params()


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    small = msgspec.structs.replace(toy_model(32, 1), vocab_size=100)
    with pytest.raises(Exception, match="vocab_size 100 is smaller than the tokenizer's"):
        init.build(config(tmp_path, tmp_path / "d.jsonl", model=small))


def test_fingerprint_ignores_where_things_are_written_and_nothing_else(tmp_path: Path) -> None:
    base = config(tmp_path, tmp_path / "d.jsonl")
    moved = msgspec.structs.replace(base, checkpoints="elsewhere", runs="r", save_every=7, eval_every=3)
    assert fingerprint(identity(base, {})) == fingerprint(identity(moved, {}))
    assert fingerprint(identity(base, {})) != fingerprint(identity(base, {"data": "x"}))
    assert fingerprint(identity(base, {})) != fingerprint(identity(msgspec.structs.replace(base, lr=2.0), {}))
