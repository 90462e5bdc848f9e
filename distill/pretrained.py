"""Hugging Face folders in and out: config.json, model.safetensors (or its shards) and tokenizer.json.

Nothing is unpickled: only safetensors files are read.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from distill.artifacts import atomic_dir, read_json, require_regular
from distill.errors import CheckpointError
from distill.model import ModelConfig, RopeScaling, Student

_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
)
_TIED_BY_DEFAULT = {"llama": False, "mistral": False, "qwen2": False, "qwen3": False}
_ROPE_THETA_DEFAULT = 10000.0
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def config_from_huggingface(data: dict[str, Any], source: str) -> ModelConfig:
    """A ModelConfig from the contents of a config.json; CheckpointError for a family or feature we do not have."""
    family = data.get("model_type")
    if family not in _TIED_BY_DEFAULT:
        raise CheckpointError(f"{source}: model_type {family!r} is not one of {', '.join(_TIED_BY_DEFAULT)}")
    missing = [key for key in _SHARED if key not in data and key != "num_key_value_heads"]
    if missing:
        raise CheckpointError(f"{source}: lacks {', '.join(missing)}")
    if data.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"{source}: hidden_act {data['hidden_act']!r} is not silu")
    theta, scaling = _rope(data, source)
    bias = family == "qwen2" or bool(data.get("attention_bias", False))
    values: dict[str, Any] = {key: data[key] for key in _SHARED if key in data}
    values.setdefault("num_key_value_heads", data["num_attention_heads"])
    values |= {
        "head_dim": data.get("head_dim") or 0,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "tie_word_embeddings": data.get("tie_word_embeddings", _TIED_BY_DEFAULT[family]),
        "attention_bias": bias,
        "output_bias": bias and family in ("llama", "qwen3"),
        "mlp_bias": bool(data.get("mlp_bias", False)),
        "qk_norm": family == "qwen3",
        "sliding_window": _window(data, family, source),
    }
    try:
        return msgspec.convert(values, ModelConfig)
    except (msgspec.ValidationError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def config_to_huggingface(config: ModelConfig, *, bos: int | None = None, eos: int | None = None) -> dict[str, Any]:
    """The config.json that `transformers` reads as the same model."""
    if config.qk_norm:
        family, name = "qwen3", "Qwen3ForCausalLM"
    elif config.attention_bias and not config.output_bias:
        family, name = "qwen2", "Qwen2ForCausalLM"
    elif config.sliding_window is not None:
        family, name = "mistral", "MistralForCausalLM"
    else:
        family, name = "llama", "LlamaForCausalLM"
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_scaling is not None:
        used = _ROPE_KEYS[config.rope_scaling.rope_type]
        rope |= {k: v for k, v in msgspec.structs.asdict(config.rope_scaling).items() if k in used and v is not None}
    out: dict[str, Any] = {"architectures": [name], "model_type": family, "hidden_act": "silu"}
    out |= {key: getattr(config, key) for key in _SHARED}
    out |= {
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_parameters": rope,
        "rope_scaling": None if config.rope_scaling is None else {k: v for k, v in rope.items() if k != "rope_theta"},
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }
    if config.sliding_window is not None:
        out["sliding_window"] = config.sliding_window
    return out


_ROPE_KEYS = {
    "linear": {"rope_type", "factor"},
    "llama3": {"rope_type", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"rope_type", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow"},
}


def from_pretrained(folder: str | Path, *, dtype: torch.dtype | None = None) -> Student:
    """Read a Hugging Face folder. `dtype` None keeps the stored one. CheckpointError names what does not fit."""
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    data = read_json(folder / "config.json")
    if not isinstance(data, dict):
        raise CheckpointError(f"{folder / 'config.json'}: expected an object")
    config = config_from_huggingface(data, str(folder / "config.json"))
    weights = _read_weights(folder)
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    with torch.device("meta"):
        student = Student(config)
    _load(student, weights, dtype, str(folder))
    return student


def save_pretrained(
    student: Student,
    folder: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    bos: int | None = None,
    eos: int | None = None,
) -> Path:
    """Write config.json and model.safetensors (and the tokenizer's files from another folder), whole or not at all."""
    with atomic_dir(folder) as temporary:
        write_pretrained(student, temporary, bos=bos, eos=eos)
        for name in TOKENIZER_FILES if tokenizer_from else ():
            source = Path(tokenizer_from or "") / name
            if source.is_file():
                shutil.copyfile(source, temporary / name)
    return Path(folder)


def write_pretrained(
    student: Student, folder: Path, *, bos: int | None = None, eos: int | None = None, pad: int | None = None
) -> None:
    """Write config.json and model.safetensors into a folder that is there."""
    weights = {name: value.detach().contiguous().cpu() for name, value in student.state_dict().items()}
    if student.config.tie_word_embeddings:
        del weights["lm_head.weight"]
    values = config_to_huggingface(student.config, bos=bos, eos=eos)
    values["pad_token_id"] = pad
    values["dtype"] = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _rope(data: dict[str, Any], source: str) -> tuple[float, RopeScaling | None]:
    """theta and scaling from transformers 5's `rope_parameters` or the older `rope_theta` and `rope_scaling`."""
    rope = dict(data.get("rope_parameters") or data.get("rope_scaling") or {})
    theta = rope.pop("rope_theta", None) or data.get("rope_theta") or _ROPE_THETA_DEFAULT
    kind = rope.get("rope_type") or rope.pop("type", "default")
    if kind == "default":
        return float(theta), None
    if kind not in _ROPE_KEYS:
        raise CheckpointError(f"{source}: rope_type {kind!r} is not one of default, {', '.join(_ROPE_KEYS)}")
    values = {key: rope[key] for key in _ROPE_KEYS[kind] if rope.get(key) is not None} | {"rope_type": kind}
    if kind != "linear":
        values.setdefault("original_max_position_embeddings", data.get("max_position_embeddings", 0))
    try:
        return float(theta), msgspec.convert(values, RopeScaling)
    except (msgspec.ValidationError, ValueError) as error:
        raise CheckpointError(f"{source}: {error}") from error


def _window(data: dict[str, Any], family: str, source: str) -> int | None:
    if family == "mistral":
        return data.get("sliding_window")
    if data.get("use_sliding_window"):
        raise CheckpointError(f"{source}: use_sliding_window on some layers is not supported")
    return None


def _read_weights(folder: Path) -> dict[str, Tensor]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        listed = read_json(index).get("weight_map", {})
        names = sorted(set(listed.values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index}: names a file outside its folder")
        files = [folder / name for name in names]
    else:
        files = [folder / "model.safetensors"]
    weights: dict[str, Tensor] = {}
    for file in files:
        require_regular(file)
        try:
            with safe_open(file, framework="pt") as tensors:
                weights |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cannot read {file}: {error}") from error
    return weights


def _load(student: Student, weights: dict[str, Tensor], dtype: torch.dtype | None, source: str) -> None:
    """Assign weights to a model on the meta device, naming every tensor that is missing, left over or misshapen."""
    expected = {name: value.shape for name, value in student.state_dict().items()}
    if student.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    weights = {name: value for name, value in weights.items() if not name.endswith("rotary_emb.inv_freq")}
    wrong = [f"missing {name}" for name in expected if name not in weights]
    wrong += [f"unexpected {name}" for name in weights if name not in expected]
    wrong += [
        f"{name} has shape {list(weights[name].shape)}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != shape
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise CheckpointError(f"{source}: weights do not fit the configuration: {'; '.join(wrong[:3])}{more}")
    weights = {name: value.to(dtype) if dtype else value for name, value in weights.items()}
    student.load_state_dict(weights, strict=not student.config.tie_word_embeddings, assign=True)
    if student.config.tie_word_embeddings:
        student.lm_head.weight = student.model.embed_tokens.weight
