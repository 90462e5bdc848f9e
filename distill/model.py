"""The student: a Llama-family decoder. Llama, SmolLM2, Qwen2, Qwen3 and Mistral checkpoints load into it.

RMSNorm (Zhang & Sennrich 2019), RoPE (Su et al. 2021) with scaling, grouped-query attention (Ainslie et al.
2023), SwiGLU (Shazeer 2020), optional QK-norm and biases, tied or untied head. Parameter names are Hugging
Face's, so weights pass in and out unrenamed (distill/pretrained.py).

Shapes: B batch, T tokens, D hidden, H query heads, K key-value heads, N head width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RopeScaling(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """RoPE scaling, with Hugging Face's names. `linear` divides the frequencies by `factor`; `llama3` does so
    smoothly below a wavelength (Llama 3.1); `yarn` follows Peng et al. 2023."""

    rope_type: str
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def __post_init__(self) -> None:
        if self.rope_type not in ("linear", "llama3", "yarn"):
            raise ValueError(f"rope_scaling.rope_type {self.rope_type!r} is not one of linear, llama3, yarn")
        for name in ("factor", "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow"):
            _require_positive(f"rope_scaling.{name}", getattr(self, name))
        if self.factor < 1:
            raise ValueError(f"rope_scaling.factor {self.factor} is below 1")
        if self.rope_type == "llama3" and self.high_freq_factor <= self.low_freq_factor:
            raise ValueError("rope_scaling.high_freq_factor must be above low_freq_factor")
        if self.rope_type != "linear" and self.original_max_position_embeddings < 1:
            raise ValueError("rope_scaling.original_max_position_embeddings is needed for llama3 and yarn")


def _require_positive(name: str, value: float | None) -> None:
    if value is not None and not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, not {value}")


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The student's dimensions, with Hugging Face's names."""

    vocab_size: int
    """Rows of the embedding; may exceed the tokenizer's."""
    hidden_size: int
    intermediate_size: int
    """Width of the MLP."""
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 0
    """Width of a head; 0 derives hidden_size / num_attention_heads."""
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    """Bias on q, k and v (Qwen2)."""
    output_bias: bool = False
    """Bias on o_proj (Llama with attention_bias)."""
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k (Qwen3)."""
    sliding_window: int | None = None
    """Keys a query sees, itself included (Mistral); None: all before it."""

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "max_position_embeddings",
        ):
            if not 1 <= getattr(self, name) < 1 << 31:
                raise ValueError(f"{name} must be at least 1 and below 2^31, not {getattr(self, name)}")
        _require_positive("rms_norm_eps", self.rms_norm_eps)
        _require_positive("rope_theta", self.rope_theta)
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "yarn" and self.rope_theta <= 1:
            raise ValueError(f"rope_theta must be above 1 for yarn, not {self.rope_theta}")
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window must be at least 1, not {self.sliding_window}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if not self.head_dim:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                    f"{self.num_attention_heads}; give head_dim"
                )
            msgspec.structs.force_setattr(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if not 2 <= self.head_dim < 1 << 31 or self.head_dim % 2:
            raise ValueError(f"head_dim must be even and positive, not {self.head_dim}")

    def n_params(self) -> int:
        """Number of trainable parameters, counted without building the model."""
        d, n = self.hidden_size, self.head_dim
        q, kv = self.num_attention_heads * n, self.num_key_value_heads * n
        layer = 2 * d * q + 2 * d * kv + 3 * d * self.intermediate_size + 2 * d
        layer += (q + 2 * kv) * self.attention_bias + d * self.output_bias
        layer += (2 * self.intermediate_size + d) * self.mlp_bias + 2 * n * self.qk_norm
        embeddings = self.vocab_size * d * (1 if self.tie_word_embeddings else 2)
        return embeddings + self.num_hidden_layers * layer + d


class RMSNorm(nn.Module):
    """y = x / rms(x) * weight over the last axis, computed in fp32 and rounded before the gain, as in Llama."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        return self.weight * (x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def rope_frequencies(config: ModelConfig) -> tuple[Tensor, float]:
    """Inverse frequencies [N/2] in fp32 and the factor on cos and sin (1 but for yarn)."""
    n = config.head_dim
    inverse = 1.0 / config.rope_theta ** (torch.arange(0, n, 2, dtype=torch.float32) / n)
    scaling = config.rope_scaling
    if scaling is None:
        return inverse, 1.0
    if scaling.rope_type == "linear":
        return inverse / scaling.factor, 1.0
    if scaling.rope_type == "llama3":
        return _llama3_frequencies(inverse, scaling), 1.0
    return _yarn_frequencies(inverse, scaling, config)


def _llama3_frequencies(inverse: Tensor, scaling: RopeScaling) -> Tensor:
    context = scaling.original_max_position_embeddings
    wavelength = 2 * math.pi / inverse
    smooth = (context / wavelength - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blended = (1 - smooth) * inverse / scaling.factor + smooth * inverse
    out = torch.where(wavelength > context / scaling.low_freq_factor, inverse / scaling.factor, inverse)
    between = (wavelength <= context / scaling.low_freq_factor) & (wavelength >= context / scaling.high_freq_factor)
    return torch.where(between, blended, out)


def _yarn_frequencies(inverse: Tensor, scaling: RopeScaling, config: ModelConfig) -> tuple[Tensor, float]:
    n, context = config.head_dim, scaling.original_max_position_embeddings

    def dimension(rotations: float) -> float:
        return n * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dimension(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension(scaling.beta_slow)), n - 1)
    ramp = (torch.arange(n // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    keep = 1 - ramp.clamp(0, 1)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return inverse / scaling.factor * (1 - keep) + inverse * keep, factor


def rope_tables(config: ModelConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin in fp32, [..., N], for integer positions [...]; the two halves of N are equal."""
    inverse, factor = rope_frequencies(config)
    angles = positions.float()[..., None] * inverse.to(positions.device)
    angles = torch.cat([angles, angles], -1)
    return angles.cos() * factor, angles.sin() * factor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split form: x [..., N] with cos, sin broadcast to it."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat([-b, a], -1) * sin


class LayerCache(NamedTuple):
    """Keys (after RoPE) and values of the tokens seen so far, each [B, K, T, N]."""

    keys: Tensor
    values: Tensor


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Queries [B, H, T, N], keys and values [B, K, S, N] -> [B, H, T, N]: who sees whom."""


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, n = config.hidden_size, config.head_dim
        self.n_heads, self.n_kv, self.head_dim = config.num_attention_heads, config.num_key_value_heads, n
        self.q_proj = nn.Linear(d, self.n_heads * n, bias=config.attention_bias)
        self.k_proj = nn.Linear(d, self.n_kv * n, bias=config.attention_bias)
        self.v_proj = nn.Linear(d, self.n_kv * n, bias=config.attention_bias)
        self.o_proj = nn.Linear(self.n_heads * n, d, bias=config.output_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(n, config.rms_norm_eps)
            self.k_norm = RMSNorm(n, config.rms_norm_eps)
        self.qk_norm = config.qk_norm

    def forward(
        self, x_BTD: Tensor, cos: Tensor, sin: Tensor, attend: Attend, cache: LayerCache | None
    ) -> tuple[Tensor, LayerCache]:
        b, t, _ = x_BTD.shape
        q = self.q_proj(x_BTD).view(b, t, self.n_heads, self.head_dim)
        k = self.k_proj(x_BTD).view(b, t, self.n_kv, self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)  # [B,H,T,N], [B,K,T,N]
        v = self.v_proj(x_BTD).view(b, t, self.n_kv, self.head_dim).transpose(1, 2)
        if cache is not None:
            k, v = torch.cat([cache.keys, k], 2), torch.cat([cache.values, v], 2)
        y = attend(q, k, v)
        return self.o_proj(y.transpose(1, 2).reshape(b, t, -1)), LayerCache(k, v)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d, f = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(d, f, bias=config.mlp_bias)
        self.up_proj = nn.Linear(d, f, bias=config.mlp_bias)
        self.down_proj = nn.Linear(f, d, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, cache: LayerCache | None
    ) -> tuple[Tensor, LayerCache]:
        y, cache = self.self_attn(self.input_layernorm(x), cos, sin, attend, cache)
        x = x + y
        return x + self.mlp(self.post_attention_layernorm(x)), cache


class Blocks(nn.ModuleList):
    """A ModuleList that knows what it holds."""

    def __getitem__(self, index: int) -> Block:  # type: ignore[override]
        return super().__getitem__(index)  # type: ignore[return-value]

    def __iter__(self) -> Iterator[Block]:
        return super().__iter__()  # type: ignore[return-value]


class _Trunk(nn.Module):
    """Embedding, blocks and final norm: named as in Hugging Face's `model.` prefix."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = Blocks(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Student(nn.Module):
    """The decoder. `forward` gives logits; `hidden` stops before the head, for losses that fuse it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Trunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.gradient_checkpointing = False

    @torch.no_grad()
    def init_weights(self, seed: int = 0) -> Student:
        """Normal(0, sqrt(2/5D)) weights (Nguyen & Salazar 2019), residual outputs scaled by 1/sqrt(2L) (GPT-2), from
        `seed`; returns self. A fixed 0.02 suits D = 768: at D = 64 attention learns several times slower."""
        generator = torch.Generator().manual_seed(seed)
        normal = math.sqrt(2 / (5 * self.config.hidden_size))
        scale = normal / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            else:
                std = scale if name.endswith(("o_proj.weight", "down_proj.weight")) else normal
                parameter.normal_(0.0, std, generator=generator)
        return self

    def hidden(
        self, input_ids_BT: Tensor, *, cache: list[LayerCache] | None = None, lengths: Sequence[int] | None = None
    ) -> Tensor:
        """Hidden states after the final norm, [B, T, D].

        `cache`, one entry a layer (or empty to begin), is extended in place. `lengths`: one row holds so many tokens of
        each of several documents, end to end; each starts at position 0 and sees itself only. Padding on the right
        needs neither.
        """
        t = input_ids_BT.shape[1]
        past = cache[0].keys.shape[2] if cache else 0
        positions = torch.arange(past, past + t, device=input_ids_BT.device)
        if lengths is None:
            attend = self.causal(t, past)
        else:
            if cache is not None or len(input_ids_BT) != 1 or sum(lengths) != t or min(lengths) < 1:
                raise ValueError(f"documents of {list(lengths)} tokens do not make up a row of {t}")
            positions = torch.cat([positions[:n] for n in lengths])
            attend = self._by_document(lengths)
        x = self.model.embed_tokens(input_ids_BT)
        cos, sin = rope_tables(self.config, positions[None])
        cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)  # [B,1,T,N]
        grown: list[LayerCache] = []
        for index, block in enumerate(self.model.layers):
            layer_cache = cache[index] if cache else None
            if self.gradient_checkpointing and self.training:
                x, kv = torch.utils.checkpoint.checkpoint(block, x, cos, sin, attend, layer_cache, use_reentrant=False)
            else:
                x, kv = block(x, cos, sin, attend, layer_cache)
            if cache is not None:
                grown.append(kv)
        if cache is not None:
            cache[:] = grown
        return self.model.norm(x)

    def forward(self, input_ids_BT: Tensor, *, cache: list[LayerCache] | None = None) -> Tensor:
        """Logits [B, T, V]."""
        return self.lm_head(self.hidden(input_ids_BT, cache=cache))

    def causal(self, t: int, past: int = 0) -> Attend:
        """Each of t tokens after `past` sees those before it, and itself."""
        mask, causal = self._causal_mask(t, past, self.lm_head.weight.device), past == 0 and t > 1
        grouped = self.config.num_attention_heads != self.config.num_key_value_heads

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped
            )

        return attend

    def _by_document(self, lengths: Sequence[int]) -> Attend:
        """The same within each document: no mask, no padding, no work between documents."""
        each = {n: self.causal(n) for n in set(lengths)}

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = zip(lengths, q.split(lengths, 2), k.split(lengths, 2), v.split(lengths, 2))
            return torch.cat([each[n](*part) for n, *part in parts], 2)

        return attend

    def _causal_mask(self, t: int, past: int, device: torch.device) -> Tensor | None:
        """None where scaled_dot_product_attention's own causal rule is enough."""
        window = self.config.sliding_window
        if (past == 0 or t == 1) and (window is None or past + t <= window):
            return None
        query = torch.arange(past, past + t, device=device)[:, None]
        key = torch.arange(past + t, device=device)[None]
        allowed = key <= query
        if window is not None:
            allowed &= key > query - window
        return allowed[None, None]

    @torch.no_grad()
    def generate(self, prompt_ids: list[int], max_new_tokens: int, stop_ids: set[int]) -> list[int]:
        """Greedy continuation of one prompt, without the stop token; ties go to the lowest id."""
        cache: list[LayerCache] = []
        ids = torch.tensor([prompt_ids], device=self.lm_head.weight.device)
        out: list[int] = []
        for _ in range(max_new_tokens):
            logits_V = self.lm_head(self.hidden(ids, cache=cache)[:, -1])[0]
            token = int(logits_V.float().argmax())
            if token in stop_ids:
                break
            out.append(token)
            ids = ids.new_tensor([[token]])
        return out
