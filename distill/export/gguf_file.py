"""A student as a GGUF file for llama.cpp: metadata, tokenizer, chat template, weights in F16 or F32.

Written with the package `gguf`, one weight at a time. Names and metadata are those that llama.cpp's own converter
gives the architectures llama, qwen2 and qwen3. No quantised type: Q8_0's blocks could hold int8 codes, but llama.cpp
then rounds activations to 8 bits too, and the product of code and scale is not rounded to fp16 as it is in Core ML. F16
holds every deployed weight exactly.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from distill import chat
from distill.data.teacher.extras import teacher_extra
from distill.errors import CheckpointError
from distill.export.gguf_tokenizer import Vocabulary, vocabulary
from distill.model import ModelConfig, Student, rope_frequencies
from distill.tokenizer import Tokenizer


def write_gguf(student: Student, tokenizer: Tokenizer, path: Path, dtype: torch.dtype) -> list[str]:
    """Write `path`; matrices in `dtype`, the rest in F32. Returns notes: where llama.cpp differs all the same."""
    gguf = teacher_extra("gguf")
    config = student.config
    arch = architecture(config)
    words = vocabulary(tokenizer, config.vocab_size)
    weights = {name: value.detach() for name, value in student.state_dict().items()}
    if config.tie_word_embeddings:
        del weights["lm_head.weight"]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    tensors = {names.get_name(name, try_suffixes=(".weight", ".bias")): name for name in weights}
    extra = _rope_factors(config)
    writer = gguf.GGUFWriter(path, arch)
    try:
        kind = gguf.LlamaFileType.MOSTLY_F16 if dtype == torch.float16 else gguf.LlamaFileType.ALL_F32
        writer.add_file_type(kind)
        _add_model(writer, config, gguf)
        _add_tokenizer(writer, tokenizer, words)
        stored = {name: dtype if weights[name].ndim > 1 else torch.float32 for name in weights}
        for theirs, ours in tensors.items():
            empty = torch.empty(0, dtype=stored[ours]).numpy()
            size = weights[ours].numel() * empty.itemsize
            writer.add_tensor_info(theirs, tuple(weights[ours].shape), empty.dtype, size)
        for theirs, value in extra.items():
            writer.add_tensor_info(theirs, tuple(value.shape), value.numpy().dtype, value.numpy().nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for ours in tensors.values():
            value = weights[ours] if arch != "llama" else interleaved(ours, weights[ours], config)
            writer.write_tensor_data(value.to(stored[ours]).contiguous().numpy())
        for value in extra.values():
            writer.write_tensor_data(value.numpy())
    finally:
        writer.close()
    return words.notes + window_note(config)


def architecture(config: ModelConfig) -> str:
    """llama.cpp's name for a student of this form; CheckpointError where it computes none such."""
    scaling = config.rope_scaling
    llama3 = scaling is not None and scaling.rope_type == "llama3"
    if scaling is not None and scaling.rope_type == "yarn" and (scaling.beta_fast, scaling.beta_slow) != (32.0, 1.0):
        raise CheckpointError("llama.cpp takes YaRN's beta_fast to be 32 and beta_slow to be 1, whatever a file says")
    if config.qk_norm:
        wrong = {"attention_bias": config.attention_bias or config.output_bias, "mlp_bias": config.mlp_bias,
                 "llama3 RoPE scaling": llama3}  # fmt: skip
        if found := [name for name, has in wrong.items() if has]:
            raise CheckpointError(f"llama.cpp computes no model with qk_norm and {found[0]}")
        return "qwen3"
    plain = not (config.output_bias or config.mlp_bias or llama3)
    return "qwen2" if config.attention_bias and plain else "llama"


def context_length(config: ModelConfig) -> int:
    """Tokens for which a runtime without a sliding window computes what the student does."""
    return min(config.max_position_embeddings, config.sliding_window or config.max_position_embeddings)


def window_note(config: ModelConfig) -> list[str]:
    """What to say where the window shortens the context."""
    if context_length(config) == config.max_position_embeddings:
        return []
    return [f"the sliding window is not ported: the context is {context_length(config)} tokens, where it cuts nothing"]


def interleaved(name: str, value: Tensor, config: ModelConfig) -> Tensor:
    """Rows of q and k in the order of llama.cpp's `llama`: RoPE pairs neighbours there, and halves of a head here."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return value
    pairs = value.reshape(heads, 2, config.head_dim // 2, *value.shape[1:])
    return pairs.transpose(1, 2).reshape(value.shape)


def _rope_factors(config: ModelConfig) -> dict[str, Tensor]:
    """llama3's scaling, which llama.cpp reads as a divisor of each frequency [N/2]."""
    if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
        return {}
    plain = rope_frequencies(msgspec.structs.replace(config, rope_scaling=None))[0]
    return {"rope_freqs.weight": plain / rope_frequencies(config)[0]}


def _add_model(writer: Any, config: ModelConfig, gguf: Any) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling
    if scaling is None or scaling.rope_type == "llama3":
        return
    writer.add_rope_scaling_type(gguf.RopeScalingType(scaling.rope_type))
    writer.add_rope_scaling_factor(scaling.factor)
    if scaling.rope_type == "yarn":
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)
        if scaling.attention_factor is not None:  # llama.cpp multiplies its own factor, the default one, by this
            writer.add_rope_scaling_attn_factors(scaling.attention_factor / (0.1 * math.log(scaling.factor) + 1.0))


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, words: Vocabulary) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    writer.add_bos_token_id(tokenizer.end_of_text)  # needed by some readers; nothing is put before a prompt
    writer.add_eos_token_id(tokenizer.turn_end)
    writer.add_eot_token_id(tokenizer.turn_end)
    writer.add_pad_token_id(tokenizer.pad)
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_chat_template(chat.JINJA)
