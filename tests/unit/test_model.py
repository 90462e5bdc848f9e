"""The student against `transformers` on random weights, and against itself with a cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from distill.errors import CheckpointError
from distill.model import ModelConfig, Student
from distill.pretrained import from_pretrained, save_pretrained

BASE = dict(vocab_size=131, hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip


def _rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5e5} | values}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, biases, tied": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama, one KV head": ("Llama", {"num_key_value_heads": 1}),
    "llama, wide heads": ("Llama", {"head_dim": 24}),
    "llama3 rope": ("Llama", _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
                                   original_max_position_embeddings=32)),
    "linear rope": ("Llama", _rope("linear", factor=4.0)),
    "yarn rope": ("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "qwen2": ("Qwen2", {}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, yarn": ("Qwen3", {"head_dim": 16} | _rope("yarn", factor=2.0, original_max_position_embeddings=128)),
    "mistral": ("Mistral", {"head_dim": 10, "sliding_window": 9}),
    "mistral, no window": ("Mistral", {"head_dim": 8, "sliding_window": None}),
}  # fmt: skip


@pytest.fixture(params=CASES, ids=list(CASES))
def theirs(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A random transformers model, and the folder it was saved in."""
    transformers = pytest.importorskip("transformers")
    family, changes = CASES[request.param]
    config = getattr(transformers, f"{family}Config")(**BASE | changes)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0.0, 0.2)
    model.save_pretrained(tmp_path / "theirs")
    return model, tmp_path / "theirs"


@torch.no_grad()
def test_logits_are_those_of_transformers(theirs: tuple[Any, Path]) -> None:
    model, folder = theirs
    ids = torch.randint(0, 131, (2, 37), generator=torch.Generator().manual_seed(1))
    ours = from_pretrained(folder).eval()
    error = (model(ids).logits - ours(ids)).abs().max()
    assert float(error) <= 1e-4
    assert sum(p.numel() for p in ours.parameters()) == ours.config.n_params()


@torch.no_grad()
def test_weights_come_back_bit_equal_and_mean_the_same_model(theirs: tuple[Any, Path], tmp_path: Path) -> None:
    model, folder = theirs
    save_pretrained(from_pretrained(folder), tmp_path / "ours")
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "ours/model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    again = type(model).from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    ids = torch.arange(40)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_tokens_fed_in_pieces_give_the_logits_of_the_whole(theirs: tuple[Any, Path]) -> None:
    student = from_pretrained(theirs[1]).eval()
    ids = torch.randint(0, 131, (2, 37), generator=torch.Generator().manual_seed(2))
    cache: list[Any] = []
    pieces = [(0, 11), (11, 20), *((i, i + 1) for i in range(20, 37))]
    hidden = torch.cat([student.hidden(ids[:, a:b], cache=cache) for a, b in pieces], 1)
    torch.testing.assert_close(student.lm_head(hidden), student(ids), rtol=1e-4, atol=1e-4)


def _toy(**changes: Any) -> ModelConfig:
    return ModelConfig(**{"vocab_size": 40, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
                          "num_attention_heads": 4, "num_key_value_heads": 2} | changes)  # fmt: skip


@torch.no_grad()
def test_padding_on_the_right_changes_nothing_before_it() -> None:
    student = Student(_toy()).init_weights(0).eval()
    ids = torch.arange(10)[None]
    padded = torch.cat([ids, torch.full((1, 6), 39)], 1)
    torch.testing.assert_close(student(padded)[:, :10], student(ids), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window", [None, 5])
def test_documents_end_to_end_are_each_on_their_own(window: int | None) -> None:
    config = ModelConfig(64, 32, 48, 2, 4, 2, sliding_window=window)
    student = Student(config).init_weights(3)
    ids = torch.randint(0, 64, (1, 24), generator=torch.Generator().manual_seed(0))
    lengths = [7, 1, 12, 4]
    packed = student.hidden(ids, lengths=lengths)
    alone = torch.cat([student.hidden(part) for part in ids.split(lengths, 1)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="do not make up a row of 24"):
        student.hidden(ids, lengths=[7, 1])


def test_generation_is_the_argmax_of_the_full_forward_pass() -> None:
    student = Student(_toy()).init_weights(3).eval()
    found = student.generate([1, 2, 3], 8, set())
    ids = [1, 2, 3]
    for token in found:
        with torch.no_grad():
            assert int(student(torch.tensor([ids]))[0, -1].argmax()) == token
        ids.append(token)
    assert student.generate([1, 2, 3], 8, {found[0]}) == []


def test_the_documented_sizes_have_the_documented_number_of_parameters() -> None:
    toy = ModelConfig(32000, 64, 256, 2, 2, 1)
    assert toy.n_params() == 4_219_200 == sum(p.numel() for p in Student(toy).parameters())
    smollm2 = ModelConfig(49152, 576, 1536, 30, 9, 3, tie_word_embeddings=True)
    assert smollm2.n_params() == 134_515_008


def test_first_weights_depend_on_the_seed_alone() -> None:
    a, b, c = (torch.cat([p.flatten() for p in Student(_toy()).init_weights(s).parameters()]) for s in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 3}, "not a multiple of num_key_value_heads"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "give head_dim"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"head_dim": 5}, "head_dim must be even"),
    ],
)
def test_impossible_dimensions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _toy(**changes)


def _folder(tmp_path: Path) -> Path:
    return save_pretrained(Student(_toy()).init_weights(0), tmp_path / "hf")


def test_a_folder_with_other_weights_names_what_does_not_fit(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    text = (folder / "config.json").read_text()
    for old, new, message in (
        ('"hidden_size": 32', '"hidden_size": 64', "has shape"),
        ('"num_hidden_layers": 2', '"num_hidden_layers": 3', "missing model.layers.2"),
        ('"num_hidden_layers": 2', '"num_hidden_layers": 1', "unexpected model.layers.1"),
        ('"model_type": "llama"', '"model_type": "mamba"', "model_type 'mamba'"),
        ('"vocab_size": 40,', "", "lacks vocab_size"),
        ("{", "[", "not valid JSON"),
    ):
        assert old in text
        (folder / "config.json").write_text(text.replace(old, new, 1))
        with pytest.raises(Exception, match=message) as caught:
            from_pretrained(folder)
        assert caught.value.exit_code == 2  # type: ignore[attr-defined]


def test_a_truncated_or_missing_weights_file_is_refused(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        from_pretrained(folder)
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        from_pretrained(folder)
    with pytest.raises(CheckpointError, match="no such folder"):
        from_pretrained(tmp_path / "none")


def test_a_shard_index_cannot_name_files_outside_its_folder(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(CheckpointError, match="outside its folder"):
        from_pretrained(folder)


def test_gradient_checkpointing_gives_the_same_gradient() -> None:
    student, ids = Student(_toy(sliding_window=5)).init_weights(0).train(), torch.arange(12)[None]
    found = []
    for recompute in (False, True):
        student.gradient_checkpointing = recompute
        student.zero_grad()
        student(ids).square().sum().backward()
        found.append(torch.cat([p.grad.flatten() for p in student.parameters() if p.grad is not None]))
    assert torch.equal(found[0], found[1])


def test_configuration_survives_a_round_trip_as_plain_values() -> None:
    config = _toy(head_dim=8, qk_norm=True, sliding_window=7)
    assert msgspec.convert(msgspec.to_builtins(config), ModelConfig) == config
