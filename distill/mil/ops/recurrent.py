"""Recurrent layers: rnn, gru, lstm. Time comes first: x is (s, b, I), a state (b, H).

The input's share of the gates is one product over the whole sequence; only the rest loops over time. MIL says
nothing of rounding inside a recurrence: the state stays float32 from step to step, and the outputs are rounded
(the products of `acc16` accumulate in fp16 by themselves).

Every layer gives the hidden states of all steps (s, b, H), or of the last one (1, b, H), then the final state.
With direction "reverse" they are in the order in which they were made, so the first belongs to the end of x; in a
bidirectional lstm both halves are in the order of x.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distill.mil.ops.activation import sigmoid_hard
from distill.mil.ops.registry import op
from distill.mil.run import Run
from distill.mil.values import check_size

_State = tuple[Tensor, ...]  # the hidden state first, each (b, H)
_Step = Callable[[Tensor, _State], _State]
_Activation = Callable[[Tensor], Tensor]

# MIL gives these no parameters: the scales of linear and scaled_tanh are 1, hard_sigmoid is that of Keras.
_ACTIVATIONS: dict[str, _Activation] = {
    "hard_sigmoid": lambda x: sigmoid_hard(x, 0.2, 0.5),
    "linear": lambda x: x,
    "relu": torch.relu,
    "scaled_tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sigmoid_hard": lambda x: sigmoid_hard(x, 0.2, 0.5),
    "tanh": torch.tanh,
}


@op("rnn", fresh=True)
def rnn(
    run: Run,
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """h = activation(W_ih x + W_hh h + bias)."""
    act = named(activation)
    hidden_size = checked(x, 1, weight_ih, weight_hh, {"bias": bias})
    initial_h = initial("initial_h", initial_h, x.shape[1], hidden_size)
    rows = project(run, x, weight_ih, bias, backwards(direction))
    recurrent = weight_hh.t()

    def step(row: Tensor, state: _State) -> _State:
        return (act(row + run.policy.matmul(state[0], recurrent)),)

    hidden, (last,) = unroll(rows, (initial_h,), step, output_sequence)
    return hidden, last


@op("gru", fresh=True)
def gru(
    run: Run,
    x: Tensor,
    initial_h: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    activation: str = "tanh",
    reset_after: bool = False,
    input_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Gates in the order r, o, z (reset, new, update). The reset gate multiplies the state before its product
    with W_ho; with `reset_after`, as in torch, it multiplies that product and its bias.
    """
    gate, act = named(recurrent_activation), named(activation)
    hidden_size = checked(x, 3, weight_ih, weight_hh, {"bias": bias, "input_bias": input_bias})
    initial_h = initial("initial_h", initial_h, x.shape[1], hidden_size)
    rows = project(run, x, weight_ih, input_bias, backwards(direction))
    w_r, w_o, w_z = weight_hh.t().chunk(3, -1)
    b_r, b_o, b_z = (weight_hh.new_zeros(len(weight_hh)) if bias is None else bias).chunk(3)

    def step(row: Tensor, state: _State) -> _State:
        (h,) = state
        row_r, row_o, row_z = row.chunk(3, -1)
        r = gate(row_r + run.policy.matmul(h, w_r) + b_r)
        z = gate(row_z + run.policy.matmul(h, w_z) + b_z)
        if reset_after:
            o = act(row_o + r * (run.policy.matmul(h, w_o) + b_o))
        else:
            o = act(row_o + run.policy.matmul(r * h, w_o) + b_o)
        return ((1 - z) * o + z * h,)

    hidden, (last,) = unroll(rows, (initial_h,), step, output_sequence)
    return hidden, last


class _Direction(NamedTuple):
    """One direction of an lstm; `suffix` is that of its parameters' names."""

    weight_ih: Tensor
    weight_hh: Tensor
    bias: Tensor | None
    peephole: Tensor | None
    suffix: str = ""


@op("lstm", fresh=True)
def lstm(
    run: Run,
    x: Tensor,
    initial_h: Tensor,
    initial_c: Tensor,
    weight_ih: Tensor,
    weight_hh: Tensor,
    bias: Tensor | None = None,
    peephole: Tensor | None = None,
    weight_ih_back: Tensor | None = None,
    weight_hh_back: Tensor | None = None,
    bias_back: Tensor | None = None,
    peephole_back: Tensor | None = None,
    direction: str = "forward",
    output_sequence: bool = False,
    recurrent_activation: str = "sigmoid",
    cell_activation: str = "tanh",
    activation: str = "tanh",
    clip: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gates in the order i, f, o, z (input, forget, output, cell), peepholes i, f, o. `clip` bounds the new cell
    state, before the output gate looks at it. A bidirectional layer has forward and backward side by side.
    """
    acts = (named(recurrent_activation), named(cell_activation), named(activation))

    def layer(weights: _Direction, h: Tensor, c: Tensor, reverse: bool) -> tuple[Tensor, Tensor, Tensor]:
        hidden_size = check_lstm(x, weights)
        h = initial("initial_h, per direction,", h, x.shape[1], hidden_size)
        c = initial("initial_c, per direction,", c, x.shape[1], hidden_size)
        rows = project(run, x, weights.weight_ih, weights.bias, reverse)
        hidden, (last_h, last_c) = unroll(rows, (h, c), lstm_step(run, weights, acts, clip), output_sequence)
        return hidden, last_h, last_c

    ahead = _Direction(weight_ih, weight_hh, bias, peephole)
    if direction != "bidirectional":
        return layer(ahead, initial_h, initial_c, backwards(direction))
    if weight_ih_back is None or weight_hh_back is None:
        raise ValueError("a bidirectional lstm needs weight_ih_back and weight_hh_back")
    behind = _Direction(weight_ih_back, weight_hh_back, bias_back, peephole_back, "_back")
    (h_ahead, h_behind), (c_ahead, c_behind) = initial_h.tensor_split(2, -1), initial_c.tensor_split(2, -1)
    hidden, h, c = layer(ahead, h_ahead, c_ahead, False)
    hidden_back, h_back, c_back = layer(behind, h_behind, c_behind, True)
    return torch.cat([hidden, hidden_back.flip(0)], -1), torch.cat([h, h_back], -1), torch.cat([c, c_back], -1)


def check_lstm(x: Tensor, weights: _Direction) -> int:
    suffix = weights.suffix
    hidden_size = checked(x, 4, weights.weight_ih, weights.weight_hh, {f"bias{suffix}": weights.bias}, suffix)
    if weights.peephole is not None:
        expect(f"peephole{suffix}", weights.peephole, 3 * hidden_size)
    return hidden_size


def lstm_step(
    run: Run, weights: _Direction, acts: tuple[_Activation, _Activation, _Activation], clip: float | None
) -> _Step:
    gate, cell, out = acts
    recurrent = weights.weight_hh.t()
    peepholes = None if weights.peephole is None else weights.peephole.chunk(3)

    def step(row: Tensor, state: _State) -> _State:
        h, c = state
        i, f, o, z = (row + run.policy.matmul(h, recurrent)).chunk(4, -1)
        if peepholes is not None:
            i, f = i + peepholes[0] * c, f + peepholes[1] * c
        c = gate(f) * c + gate(i) * cell(z)
        if clip is not None:
            c = c.clamp(-clip, clip)
        if peepholes is not None:
            o = o + peepholes[2] * c
        return gate(o) * out(c), c

    return step


def unroll(rows: Tensor, state: _State, step: _Step, every: bool) -> tuple[Tensor, _State]:
    """Run over the rows. The hidden states of every row or of the last (in memory of their own), and the state."""
    kept = []
    for row in rows:
        state = step(row, state)
        if every:
            kept.append(state[0])
    return torch.stack(kept or [state[0]]), state


def project(run: Run, x: Tensor, weight: Tensor, bias: Tensor | None, reverse: bool) -> Tensor:
    """The input's share of the gates of all steps, in the order of the loop: (s, b, gates * H)."""
    run.spend(len(x))
    check_size([*x.shape[:2], len(weight)])
    product = run.policy.matmul(x.flip(0) if reverse else x, weight.t())
    return product if bias is None else product + bias


def checked(
    x: Tensor, gates: int, weight_ih: Tensor, weight_hh: Tensor, biases: dict[str, Tensor | None], suffix: str = ""
) -> int:
    """The hidden size H, if the shapes agree."""
    if x.dim() != 3 or not x.numel():
        raise ValueError(f"x has shape {list(x.shape)}, not (sequence, batch, input)")
    hidden_size = weight_hh.shape[-1] if weight_hh.dim() else 0
    if not hidden_size:
        raise ValueError(f"weight_hh{suffix} has shape {list(weight_hh.shape)}")
    expect(f"weight_hh{suffix}", weight_hh, gates * hidden_size, hidden_size)
    expect(f"weight_ih{suffix}", weight_ih, gates * hidden_size, x.shape[2])
    for name, bias in biases.items():
        if bias is not None:
            expect(name, bias, gates * hidden_size)
    return hidden_size


def expect(name: str, tensor: Tensor, *shape: int) -> None:
    """Refuse what would broadcast into a wrong answer."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, not {list(shape)}")


def initial(name: str, state: Tensor, batch: int, hidden_size: int) -> Tensor:
    """A first state (b, H). coremltools gives a packed sequence one of another batch, all zeros: those serve any."""
    if state.dim() == 2 and len(state) > 1 and len(state) != batch and not state.any():
        state = state.new_zeros(batch, state.shape[1])
    expect(name, state, batch, hidden_size)
    return state


def named(activation: str) -> _Activation:
    """An activation by name; MIL ignores the case."""
    if activation.lower() not in _ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}; there are {', '.join(_ACTIVATIONS)}")
    return _ACTIVATIONS[activation.lower()]


def backwards(direction: str) -> bool:
    if direction not in ("forward", "reverse"):
        raise ValueError(f"unknown direction {direction!r}")
    return direction == "reverse"
