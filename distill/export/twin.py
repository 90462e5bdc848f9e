"""The static inference twin: the student's function in the form that Core ML and the Neural Engine like.

Layout (1, C, 1, S) with 1x1 convolutions, RMSNorm as the layer norm of [x, -x], attention per key-value head,
static shapes, additive finite masks, RoPE tables and the embedding inside the graph
(sources: apple/ml-ane-transformers; 0seba/coremlmodels RMSNORM_PATCHING). `PrefillTwin` takes `input_ids` (1, S) and
remembers nothing; `CachedTwin` takes them with their `position` and keeps keys and values in one state.

Shapes: S tokens, D hidden, H query heads, K key-value heads, G = H / K, N head width, V vocabulary, C context.
"""

from __future__ import annotations

from copy import deepcopy
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distill.model import ModelConfig, Student, rope_tables

M = TypeVar("M", bound=nn.Module)
MASKED = -1e4
"""Additive mask: finite, since an IEEE infinity in a softmax mask is not safe on every compute unit."""
HEAD_SLICE = 16384
"""Rows of the output matrix in one convolution: the Neural Engine's documented limit on a dimension."""


class ChannelRMSNorm(nn.Module):
    """RMSNorm over the channel axis: [x, -x] has zero mean, so its layer norm is the RMS norm of x.

    coremltools fuses the arithmetic below into one `layer_norm`, which keeps its sums from overflowing in fp16.
    """

    def __init__(self, weight: Tensor, eps: float, axis: int) -> None:
        super().__init__()
        shape = [1, 1, 1, 1]
        shape[axis] = -1
        self.weight = nn.Parameter(weight.reshape(shape))
        self.eps = eps
        self.axis = axis

    def forward(self, x: Tensor) -> Tensor:
        z = torch.cat([x, -x], self.axis)
        z = z - z.mean(self.axis, keepdim=True)
        z = z * ((z * z).mean(self.axis, keepdim=True) + self.eps).rsqrt()
        return z.narrow(self.axis, 0, x.shape[self.axis]) * self.weight


def _conv(weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None, device="meta")
    conv.weight = nn.Parameter(weight[:, :, None, None])
    if bias is not None:
        conv.bias = nn.Parameter(bias)
    return conv


class Rope(NamedTuple):
    """Tables of the rotation. Those of the queries carry the 1/sqrt(N) of attention: no weight changes for it, so a
    compressed one is stored as it was trained."""

    cos: Tensor
    sin: Tensor
    q_cos: Tensor
    q_sin: Tensor

    @staticmethod
    def of(config: ModelConfig, positions: Tensor) -> Rope:
        """[S, N] each."""
        cos, sin = rope_tables(config, positions)
        scale = config.head_dim**-0.5
        return Rope(cos, sin, cos * scale, sin * scale)


class TwinAttention(nn.Module):
    """Attention of one block."""

    def __init__(self, student: Student, layer: int) -> None:
        super().__init__()
        config, source = student.config, student.model.layers[layer].self_attn
        self.n_kv, self.head_dim = config.num_key_value_heads, config.head_dim
        self.n_heads, self.group = config.num_attention_heads, config.num_attention_heads // config.num_key_value_heads
        self.layer = layer
        self.q = _conv(source.q_proj.weight, source.q_proj.bias)
        self.k = _conv(source.k_proj.weight, source.k_proj.bias)
        self.v = _conv(source.v_proj.weight, source.v_proj.bias)
        self.o = _conv(source.o_proj.weight, source.o_proj.bias)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm = ChannelRMSNorm(source.q_norm.weight, config.rms_norm_eps, 2)
            self.k_norm = ChannelRMSNorm(source.k_norm.weight, config.rms_norm_eps, 2)

    def project(self, x: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """(1,D,1,S) -> q (1,H,N,S), k (1,K,N,S) after RoPE, v (1,K,N,S)."""
        s = x.shape[3]
        q = self.q(x).reshape(1, self.n_heads, self.head_dim, s)
        k = self.k(x).reshape(1, self.n_kv, self.head_dim, s)
        v = self.v(x).reshape(1, self.n_kv, self.head_dim, s)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        return _rotate(q, rope.q_cos, rope.q_sin), _rotate(k, rope.cos, rope.sin), v

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor,
        kv: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        """Without a state: mask (1,1,S,S). With one: mask (1,1,S,C), `kv` written from `position` on, then read."""
        q, k, v = self.project(x, rope)
        if kv is None or position is None:
            heads = self._alone(q, k, v, mask)
        else:
            heads = self._cached(q, k, v, mask, kv, position)
        return self.o(torch.cat(heads, 1).reshape(1, self.n_heads * self.head_dim, 1, x.shape[3]))

    def _alone(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> list[Tensor]:
        heads = []
        for j in range(self.n_kv):
            q_j = q[:, j * self.group : (j + 1) * self.group]  # (1,G,N,S)
            weights = (torch.matmul(q_j.transpose(2, 3), k[:, j : j + 1]) + mask).softmax(-1)  # (1,G,S,S)
            heads.append(torch.matmul(v[:, j : j + 1], weights.transpose(2, 3)))  # (1,G,N,S)
        return heads

    def _cached(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, kv: Tensor, position: Tensor) -> list[Tensor]:
        s, key_row, value_row = int(q.shape[3]), 2 * self.layer, 2 * self.layer + 1  # int: else tracing computes it
        q = _positions_first(q)
        kv[key_row : key_row + 1, :, position : position + s, :] = _positions_first(k)
        kv[value_row : value_row + 1, :, position : position + s, :] = _positions_first(v)
        heads = []
        for j in range(self.n_kv):
            q_j = q[:, j * self.group : (j + 1) * self.group]  # (1,G,S,N)
            keys, values = kv[key_row : key_row + 1, j : j + 1], kv[value_row : value_row + 1, j : j + 1]  # (1,1,C,N)
            weights = (torch.matmul(q_j, keys.transpose(2, 3)) + mask).softmax(-1)  # (1,G,S,C)
            if s == 1:
                heads.append(torch.matmul(weights, values))  # (1,G,1,N)
            else:
                heads.append(torch.matmul(values.transpose(2, 3), weights.transpose(2, 3)))  # (1,G,N,S)
        return heads


class TwinMLP(nn.Module):
    """SwiGLU as convolutions."""

    def __init__(self, student: Student, layer: int) -> None:
        super().__init__()
        source = student.model.layers[layer].mlp
        self.gate = _conv(source.gate_proj.weight, source.gate_proj.bias)
        self.up = _conv(source.up_proj.weight, source.up_proj.bias)
        self.down = _conv(source.down_proj.weight, source.down_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class TwinBlock(nn.Module):
    """One block."""

    def __init__(self, student: Student, layer: int) -> None:
        super().__init__()
        source, eps = student.model.layers[layer], student.config.rms_norm_eps
        self.attention_norm = ChannelRMSNorm(source.input_layernorm.weight, eps, 1)
        self.attention = TwinAttention(student, layer)
        self.mlp_norm = ChannelRMSNorm(source.post_attention_layernorm.weight, eps, 1)
        self.mlp = TwinMLP(student, layer)

    def forward(
        self,
        x: Tensor,
        rope: Rope,
        mask: Tensor,
        kv: Tensor | None = None,
        position: Tensor | None = None,
    ) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rope, mask, kv, position)
        return x + self.mlp(self.mlp_norm(x))


class Twin(nn.Module):
    """What the twins share: embedding, blocks, final norm, head in slices."""

    def __init__(self, student: Student, *, copy: bool = False) -> None:
        """`copy` gives the twin weights of its own; else it shares the student's."""
        super().__init__()
        if copy:
            student = deepcopy(student)
        config = student.config
        self.config: ModelConfig = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, device="meta")
        self.embed.weight = nn.Parameter(student.model.embed_tokens.weight.detach())
        # attributes rather than a ModuleList: their names are the scopes that the converter records for probes
        for layer in range(config.num_hidden_layers):
            self.add_module(f"block_{layer}", TwinBlock(student, layer))
        self.final_norm = ChannelRMSNorm(student.model.norm.weight, config.rms_norm_eps, 1)
        for index, part in enumerate(student.lm_head.weight.split(HEAD_SLICE)):
            self.add_module(f"head_{index}", _conv(part, None))
        self.requires_grad_(False)
        self.eval()

    def blocks(self) -> list[TwinBlock]:
        """The blocks in order."""
        return [module for module in self.children() if isinstance(module, TwinBlock)]

    def rope(self) -> Rope:
        """The tables, as this twin keeps them."""
        return Rope(*(getattr(self, name) for name in Rope._fields))

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """(1,S) ids -> (1,D,1,S)."""
        return self.embed(input_ids).transpose(1, 2).unsqueeze(2)

    def logits(self, x: Tensor) -> Tensor:
        """(1,D,1,S) -> (1,S,V)."""
        x = self.final_norm(x)
        parts = [module(x) for name, module in self.named_children() if name.startswith("head_")]
        return torch.cat(parts, 1).squeeze(2).transpose(1, 2)


class PrefillTwin(Twin):
    """`input_ids` (1,S) int -> logits (1,S,V); tokens right of the prompt do not change those inside it."""

    mask: Tensor

    def __init__(self, student: Student, seq: int, *, copy: bool = False) -> None:
        super().__init__(student, copy=copy)
        for name, table in Rope.of(student.config, torch.arange(seq))._asdict().items():
            self.register_buffer(name, table.T[None, None].contiguous())  # (1,1,N,S)
        self.register_buffer("mask", _causal(seq, student.config.sliding_window))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for block in self.blocks():
            x = block(x, self.rope(), self.mask)
        return self.logits(x)


class CachedTwin(Twin):
    """`input_ids` (1,S), `position` (1,) int of the first of them -> logits (1,S,V); keys and values in the state `kv`
    (2L,K,C,N). S = 1 is decode; position + S must not exceed C.

    A token sees the rows up to its own: what lies after them, or behind a chunk's last true token, counts for nothing
    and may be overwritten.
    """

    kv: Tensor
    steps: Tensor
    offsets: Tensor

    def __init__(self, student: Student, context: int, seq: int = 1, *, copy: bool = False) -> None:
        super().__init__(student, copy=copy)
        config = student.config
        self.seq = seq
        for name, table in Rope.of(config, torch.arange(context))._asdict().items():
            self.register_buffer(name, table)
        self.register_buffer("steps", torch.arange(context, dtype=torch.int32)[None, None, None])
        self.register_buffer("offsets", torch.arange(seq, dtype=torch.int32))
        shape = (2 * config.num_hidden_layers, config.num_key_value_heads, context, config.head_dim)
        self.register_buffer("kv", torch.zeros(shape))

    def forward(self, input_ids: Tensor, position: Tensor) -> Tensor:
        return self.logits(self.states(input_ids, position))

    def states(self, input_ids: Tensor, position: Tensor) -> Tensor:
        """What leaves the last block, (1,D,1,S)."""
        x = self.embed_tokens(input_ids)
        at = position if self.seq == 1 else position + self.offsets  # (S,)
        rope = Rope(*(table[at].transpose(0, 1)[None, None] for table in self.rope()))  # (1,1,N,S)
        at = at if self.seq == 1 else at[None, None, :, None]
        allowed = self.steps <= at  # (1,1,S,C)
        if self.config.sliding_window is not None:
            allowed = allowed & (self.steps > at - self.config.sliding_window)
        if self.seq == 1:
            mask = torch.where(allowed, 0.0, MASKED)
        else:
            mask = (~allowed).to(x.dtype) * MASKED  # `where` would store both its values S x C times in every function
        for block in self.blocks():
            x = block(x, rope, mask, self.kv, self.first(position))
        return x

    def first(self, position: Tensor) -> Any:
        """The first row of the state that is written: here a tensor, which tracing keeps."""
        return position[0]


def round_to_half(twin: M) -> M:
    """Round every weight, table and epsilon to the nearest fp16 in place (still held in fp32); returns the twin.

    The result computes, in fp32, exactly the function that an fp16 package stores: its difference from the package
    run under the executor's `fp32` policy is fp32 rounding alone.
    """
    for tensor in [*twin.parameters(), *twin.buffers()]:
        if tensor.is_floating_point():
            tensor.copy_(tensor.half().float())
    for module in twin.modules():
        if isinstance(module, ChannelRMSNorm):
            module.eps = float(torch.tensor(module.eps).half())
    return twin


def _positions_first(x: Tensor) -> Tensor:
    """(1,X,N,S) -> (1,X,S,N); of one position a view, which converts to no transpose."""
    return x.reshape(1, int(x.shape[1]), 1, int(x.shape[2])) if x.shape[3] == 1 else x.transpose(2, 3)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[2] // 2
    return x * cos + torch.cat([-x[:, :, half:], x[:, :, :half]], 2) * sin


def _causal(seq: int, window: int | None) -> Tensor:
    query, key = torch.arange(seq)[:, None], torch.arange(seq)[None]
    allowed = key <= query
    if window is not None:
        allowed &= key > query - window
    return torch.where(allowed, 0.0, MASKED)[None, None]
