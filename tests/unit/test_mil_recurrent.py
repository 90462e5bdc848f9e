"""distill.mil: rnn, gru and lstm against torch, numpy and values worked by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from coremltools.converters.mil import Builder as mb

from distill.errors import PackageError
from distill.mil.ops.registry import TABLE
from distill.mil.policy import Policy, make_policy
from distill.mil.run import Run
from tests.unit import mil_build as b

S, B, D, H = 5, 3, 4, 2  # steps, batch, input size, hidden size
X = b.random((S, B, D), 1)
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "hard_sigmoid": lambda x: np.clip(0.2 * x + 0.5, 0, 1),
    "linear": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "scaled_tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


def predict(
    tmp_path, body: Callable[..., Any], *inputs: np.ndarray, precision: str = "fp32", policy: str = "ieee16"
) -> list[np.ndarray]:
    """The outputs of a program over inputs that `body` calls x, initial_h and initial_c."""
    names = ["x", "initial_h", "initial_c"][: len(inputs)]
    program = b.load(tmp_path / f"{policy}.mlpackage", [b.tensor(v.shape) for v in inputs], body, precision)
    return list(program.predict(dict(zip(names, inputs, strict=True)), policy=policy).values())


def call(name: str, policy: str = "ieee16", **arguments: Any) -> list[np.ndarray]:
    """The operator alone."""
    tensors = {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in arguments.items()}
    return [v.numpy() for v in TABLE[name].function(run=Run(make_policy(policy), None), **tensors)]


def close(actual: list[np.ndarray], expected: list[np.ndarray], **tolerance: float) -> None:
    assert [a.shape for a in actual] == [np.shape(e) for e in expected]
    for a, e in zip(actual, expected):
        np.testing.assert_allclose(a, e, **{"rtol": 1e-5, "atol": 1e-6, **tolerance})


def weights(layer: torch.nn.Module, order: list[int], suffix: str = "l0") -> dict[str, np.ndarray]:
    """A torch layer's parameters with the gates in another order."""
    found = {}
    for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
        chunks = getattr(layer, f"{name}_{suffix}").detach().chunk(len(order))
        found[name] = torch.cat([chunks[n] for n in order]).numpy()
    return found


def torch_outputs(layer: torch.nn.Module, reverse: bool, every: bool, *state: np.ndarray) -> list[np.ndarray]:
    """What a forward torch layer gives; `reverse` feeds it the sequence from the end."""
    x, first = torch.from_numpy(X), tuple(torch.from_numpy(s)[None] for s in state)
    with torch.no_grad():
        hidden, last = layer(x.flip(0) if reverse else x, first if len(first) > 1 else first[0])
    final = [v[0].numpy() for v in (last if isinstance(last, tuple) else (last,))]
    return [(hidden if every else hidden[-1:]).numpy(), *final]


DIRECTIONS = [("forward", True), ("forward", False), ("reverse", True), ("reverse", False)]


@pytest.mark.parametrize("activation", ["tanh", "relu"])
def test_rnn_agrees_with_torch_in_each_direction(tmp_path, activation):
    torch.manual_seed(0)
    layer = torch.nn.RNN(D, H, nonlinearity=activation)
    w, h = weights(layer, [0]), b.random((B, H), 2)

    def body(x, initial_h):
        given = {"weight_ih": w["weight_ih"], "weight_hh": w["weight_hh"], "bias": w["bias_ih"] + w["bias_hh"]}
        results = []
        for direction, every in DIRECTIONS:
            given |= {"direction": direction, "output_sequence": every, "activation": activation}
            results += mb.rnn(x=x, initial_h=initial_h, **given)
        return tuple(results)

    expected = [o for d, every in DIRECTIONS for o in torch_outputs(layer, d == "reverse", every, h)]
    close(predict(tmp_path, body, X, h), expected)


def test_gru_with_reset_after_agrees_with_torch_in_each_direction(tmp_path):
    torch.manual_seed(1)
    layer = torch.nn.GRU(D, H)
    w, h = weights(layer, [0, 2, 1]), b.random((B, H), 2)  # r z n -> r n z

    def body(x, initial_h):
        given = {"weight_ih": w["weight_ih"], "weight_hh": w["weight_hh"], "reset_after": True}
        given |= {"input_bias": w["bias_ih"], "bias": w["bias_hh"]}
        results = []
        for direction, every in DIRECTIONS:
            results += mb.gru(x=x, initial_h=initial_h, direction=direction, output_sequence=every, **given)
        return tuple(results)

    expected = [o for d, every in DIRECTIONS for o in torch_outputs(layer, d == "reverse", every, h)]
    close(predict(tmp_path, body, X, h), expected)


def test_lstm_agrees_with_torch_in_each_direction(tmp_path):
    torch.manual_seed(2)
    layer = torch.nn.LSTM(D, H)
    w, h, c = weights(layer, [0, 1, 3, 2]), b.random((B, H), 2), b.random((B, H), 3)  # i f g o -> i f o g

    def body(x, initial_h, initial_c):
        given = {"weight_ih": w["weight_ih"], "weight_hh": w["weight_hh"], "bias": w["bias_ih"] + w["bias_hh"]}
        given |= {"initial_h": initial_h, "initial_c": initial_c}
        results = []
        for direction, every in DIRECTIONS:
            results += mb.lstm(x=x, direction=direction, output_sequence=every, **given)
        return tuple(results)

    expected = [o for d, every in DIRECTIONS for o in torch_outputs(layer, d == "reverse", every, h, c)]
    close(predict(tmp_path, body, X, h, c), expected)


def test_a_bidirectional_lstm_agrees_with_torch(tmp_path):
    torch.manual_seed(3)
    layer = torch.nn.LSTM(D, H, bidirectional=True)
    order = [0, 1, 3, 2]
    ahead, behind = weights(layer, order), weights(layer, order, "l0_reverse")
    h, c = b.random((2, B, H), 2), b.random((2, B, H), 3)

    def body(x, initial_h, initial_c):
        given = {"x": x, "initial_h": initial_h, "initial_c": initial_c, "direction": "bidirectional"}
        for suffix, w in (("", ahead), ("_back", behind)):
            given |= {f"weight_ih{suffix}": w["weight_ih"], f"weight_hh{suffix}": w["weight_hh"]}
            given[f"bias{suffix}"] = w["bias_ih"] + w["bias_hh"]
        return (*mb.lstm(output_sequence=True, **given), *mb.lstm(output_sequence=False, **given))

    with torch.no_grad():
        hidden, (last_h, last_c) = layer(torch.from_numpy(X), (torch.from_numpy(h), torch.from_numpy(c)))
    final_h, final_c = (np.concatenate([*v.numpy()], -1) for v in (last_h, last_c))
    expected = [hidden.numpy(), final_h, final_c, final_h[None], final_h, final_c]
    close(predict(tmp_path, body, X, np.concatenate([*h], -1), np.concatenate([*c], -1)), expected)


def test_gru_resets_the_state_before_its_product_unless_told_otherwise():
    w_ih, w_hh, bias = b.random((3 * H, D), 4), b.random((3 * H, H), 5), b.random((3 * H,), 6)
    h = start = b.random((B, H), 7)
    sigmoid = ACTIVATIONS["sigmoid"]
    for t in range(S):
        (x_r, x_o, x_z), (u_r, u_o, u_z) = np.split(X[t] @ w_ih.T + bias, 3, -1), np.split(w_hh, 3)
        r, z = sigmoid(x_r + h @ u_r.T), sigmoid(x_z + h @ u_z.T)
        h = (1 - z) * np.tanh(x_o + (r * h) @ u_o.T) + z * h
    close(call("gru", x=X, initial_h=start, weight_ih=w_ih, weight_hh=w_hh, bias=bias), [h[None], h])
    halves = {"bias": bias / 4, "input_bias": bias * 3 / 4}
    close(call("gru", x=X, initial_h=start, weight_ih=w_ih, weight_hh=w_hh, **halves), [h[None], h])


def test_gates_of_gru_by_hand():
    """Linear gates r = 2, z = 0.5 from the biases; W_ho = 1, W_io = 0, h = 4."""
    one = np.ones((1, 1, 1), np.float32)
    given = {"x": one, "initial_h": one[0] * 4, "recurrent_activation": "linear", "activation": "linear"}
    given |= {"weight_ih": np.zeros((3, 1), np.float32), "weight_hh": np.float32([[0], [1], [0]])}
    biases = {"input_bias": np.float32([2, 10, 0.5]), "bias": np.float32([0, 3, 0])}
    before = 10 + 2 * 4 + 3
    close(call("gru", **given, **biases), [[[[0.5 * before + 0.5 * 4]]], [[0.5 * before + 0.5 * 4]]])
    after = 10 + 2 * (4 + 3)
    close(call("gru", **given, **biases, reset_after=True), [[[[0.5 * after + 2]]], [[0.5 * after + 2]]])


def test_gates_peepholes_and_clip_of_lstm_by_hand():
    """Linear gates i = 2, f = 3, o = 5, z = 7 from the biases, c = 1."""
    one = np.ones((1, 1, 1), np.float32)
    given = {"x": one, "initial_h": one[0], "initial_c": one[0], "bias": np.float32([2, 3, 5, 7])}
    given |= {"weight_ih": np.zeros((4, 1), np.float32), "weight_hh": np.zeros((4, 1), np.float32)}
    given |= dict.fromkeys(("recurrent_activation", "cell_activation", "activation"), "linear")
    assert [v.item() for v in call("lstm", **given)] == [85, 85, 17]  # c = 3 * 1 + 2 * 7
    peephole = np.float32([10, 100, 50])
    c = (3 + 100) * 1 + (2 + 10) * 7
    assert [v.item() for v in call("lstm", **given, peephole=peephole)] == [(5 + 50 * c) * c] * 2 + [c]
    clipped = call("lstm", **given, peephole=peephole, clip=20.0)  # the output gate sees the clipped cell
    assert [v.item() for v in clipped] == [(5 + 50 * 20) * 20] * 2 + [20]


def numpy_lstm(
    x: np.ndarray, w: dict[str, np.ndarray], acts: list[str], clip: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From a state of zeros, one example at a time, in float64."""
    gate, cell, out = (ACTIVATIONS[a] for a in acts)
    hidden, cells = np.zeros((S, B, H)), np.zeros((B, H))
    for n in range(B):
        h, c = np.zeros(H), np.zeros(H)
        for t in range(S):
            total = w["weight_ih"].astype(float) @ x[t, n] + w["weight_hh"].astype(float) @ h + w["bias"]
            p = w["peephole"].astype(float)
            i = gate(total[:H] + p[:H] * c)
            f = gate(total[H : 2 * H] + p[H : 2 * H] * c)
            c = np.clip(f * c + i * cell(total[3 * H :]), -clip, clip)
            o = gate(total[2 * H : 3 * H] + p[2 * H :] * c)
            h = hidden[t, n] = o * out(c)
        cells[n] = c
    return hidden, hidden[-1], cells


def lstm_weights(seed: int) -> dict[str, np.ndarray]:
    shapes = {"weight_ih": (4 * H, D), "weight_hh": (4 * H, H), "bias": (4 * H,), "peephole": (3 * H,)}
    return {name: b.random(shape, seed + n) for n, (name, shape) in enumerate(shapes.items())}


@pytest.mark.parametrize("clip", [50.0, 0.2])
@pytest.mark.parametrize("out", ACTIVATIONS)
def test_lstm_with_peepholes_and_clip_agrees_with_numpy(out, clip):
    w, zero, acts = lstm_weights(20), np.zeros((B, H), np.float32), ["sigmoid", "tanh", out]
    names = dict(zip(("recurrent_activation", "cell_activation", "activation"), acts))
    actual = call("lstm", x=X, initial_h=zero, initial_c=zero, **w, **names, clip=clip, output_sequence=True)
    close(actual, list(numpy_lstm(X, w, acts, clip)))


@pytest.mark.parametrize("gate", ACTIVATIONS)
def test_lstm_takes_each_activation_at_its_gates(gate):
    w, zero, acts = lstm_weights(30), np.zeros((B, H), np.float32), [gate, "hard_sigmoid", "scaled_tanh"]
    names = dict(zip(("recurrent_activation", "cell_activation", "activation"), [a.upper() for a in acts]))
    actual = call("lstm", x=X, initial_h=zero, initial_c=zero, **w, **names, clip=9.0, output_sequence=True)
    close(actual, list(numpy_lstm(X, w, acts, 9.0)))


def test_peepholes_of_the_backward_half_are_its_own():
    ahead, behind, acts = lstm_weights(40), lstm_weights(50), ["sigmoid", "tanh", "tanh"]
    zero = np.zeros((B, 2 * H), np.float32)
    back = {f"{name}_back": v for name, v in behind.items()}
    given = {"x": X, "initial_h": zero, "initial_c": zero, "direction": "bidirectional", "output_sequence": True}
    hidden, last_h, last_c = numpy_lstm(X, ahead, acts, 9.0)
    hidden_back, h_back, c_back = numpy_lstm(X[::-1], behind, acts, 9.0)
    expected = [np.concatenate([hidden, hidden_back[::-1]], -1)]
    expected += [np.concatenate([last_h, h_back], -1), np.concatenate([last_c, c_back], -1)]
    close(call("lstm", **given, **ahead, **back, clip=9.0), expected)


@pytest.mark.parametrize("name", ["hard_sigmoid", "linear", "scaled_tanh", "sigmoid", "sigmoid_hard"])
def test_rnn_takes_each_activation_by_name(name):
    act = ACTIVATIONS["hard_sigmoid" if name == "sigmoid_hard" else name]
    w_ih, w_hh, h = b.random((H, D), 8), b.random((H, H), 9), np.zeros((B, H), np.float32)
    first = act(X[0] @ w_ih.T)
    expected = [first, act(X[1] @ w_ih.T + first @ w_hh.T)]
    given = {"weight_ih": w_ih, "weight_hh": w_hh, "initial_h": h, "output_sequence": True, "activation": name}
    close(call("rnn", x=X[:2], **given), [np.stack(expected), expected[1]])


def test_a_reverse_layer_gives_its_outputs_in_the_order_in_which_it_made_them():
    one = np.ones((1, 1), np.float32)
    x = np.float32([1, 10, 100]).reshape(3, 1, 1)
    given = {"weight_ih": one, "weight_hh": one, "initial_h": one, "activation": "linear", "output_sequence": True}
    assert call("rnn", x=x, **given)[0].ravel().tolist() == [2, 12, 112]
    assert call("rnn", x=x, **given, direction="reverse")[0].ravel().tolist() == [101, 111, 112]


def test_a_recurrence_rounds_its_outputs_and_nothing_within(tmp_path):
    x = b.random((40, 2, D), 10).astype(np.float16).astype(np.float32)
    zero = np.zeros((2, H), np.float32)
    w = lstm_weights(60)

    def body(x, initial_h, initial_c):
        return mb.lstm(x=x, initial_h=initial_h, initial_c=initial_c, **w, output_sequence=True)

    free, rounded, pessimist = (
        predict(tmp_path, body, x, zero, zero, precision="fp16", policy=policy)
        for policy in ("fp32", "ieee16", "acc16")
    )
    for f, r, p in zip(free, rounded, pessimist):
        np.testing.assert_array_equal(r, f.astype(np.float16))
        np.testing.assert_allclose(p, f, atol=1e-2)
    assert any((p != r).any() for p, r in zip(pessimist, rounded))


@pytest.mark.parametrize("place", ["x", "initial_h"])
@pytest.mark.parametrize("name", GATES)
def test_products_with_input_and_state_accumulate_as_the_policy_says(name, place):
    given: dict[str, Any] = {"x": np.zeros((1, 1, 64), np.float32), "initial_h": np.zeros((1, 64), np.float32)}
    given[place][..., [0, -1]] = 2048, 1  # in two blocks of 32; beyond 2048 fp16 counts in twos
    given |= dict.fromkeys(("weight_ih", "weight_hh"), np.ones((GATES[name] * 64, 64), np.float32))
    if name == "lstm":
        given |= {"initial_c": given["initial_h"] * 0, "cell_activation": "linear"}
    given |= {"activation": "linear"} | ({} if name == "rnn" else {"recurrent_activation": "linear"})
    exact, blocks = call(name, **given)[1], call(name, policy="acc16", **given)[1]
    assert (exact != blocks).all()
    if name == "rnn":
        assert set(exact.ravel()) == {2049} and set(blocks.ravel()) == {2048}


@pytest.mark.parametrize("name", GATES)
def test_outputs_of_a_layer_share_no_memory(name):
    given = {"x": torch.ones(1, B, D), "initial_h": torch.ones(B, H)}
    given |= {"weight_ih": torch.ones(GATES[name] * H, D), "weight_hh": torch.ones(GATES[name] * H, H)}
    if name == "lstm":
        given["initial_c"] = torch.ones(B, H)
    results = TABLE[name].function(run=Run(Policy(), None), **given)
    storages = {v.untyped_storage().data_ptr() for v in (*given.values(), *results)}
    assert len(storages) == len(given) + len(results)


GOOD = {
    "x": X,
    "initial_h": np.zeros((B, H), np.float32),
    "initial_c": np.zeros((B, H), np.float32),
    **lstm_weights(70),
}
TWO_WAYS = {
    "direction": "bidirectional",
    "initial_h": np.zeros((B, 2 * H), np.float32),
    "initial_c": np.zeros((B, 2 * H), np.float32),
    "weight_hh_back": GOOD["weight_hh"],
}
LONG = torch.zeros(1, 1, 1).expand(2_000_000, B, D)


@pytest.mark.parametrize(
    ("spoilt", "message"),
    [
        ({"x": X[0]}, r"x has shape \[3, 4\]"),
        ({"x": X[:0]}, r"x has shape \[0, 3, 4\]"),
        ({"x": X[:, :, :0]}, r"x has shape \[5, 3, 0\]"),
        ({"x": X[:, :, :3]}, "weight_ih has shape"),
        ({"x": LONG}, "too many loop iterations"),
        ({"initial_h": GOOD["initial_h"][:1]}, r"initial_h, per direction, has shape \[1, 2\], not \[3, 2\]"),
        ({"initial_c": GOOD["initial_c"][:, :1]}, r"initial_c, per direction, has shape \[3, 1\], not \[3, 2\]"),
        ({"weight_hh": GOOD["weight_hh"][:6]}, r"weight_hh has shape \[6, 2\], not \[8, 2\]"),
        ({"weight_hh": np.zeros((0, 0), np.float32)}, r"weight_hh has shape \[0, 0\]"),
        ({"weight_hh": np.array(1, np.float32)}, r"weight_hh has shape \[\]"),
        ({"bias": GOOD["bias"][:1]}, r"bias has shape \[1\], not \[8\]"),
        ({"peephole": GOOD["bias"]}, r"peephole has shape \[8\], not \[6\]"),
        ({"direction": "sideways"}, "unknown direction 'sideways'"),
        ({"activation": "softmax"}, "unknown activation 'softmax'; there are hard_sigmoid, linear"),
        ({"direction": "bidirectional"}, "needs weight_ih_back and weight_hh_back"),
        (TWO_WAYS | {"weight_ih_back": GOOD["weight_ih"][:, :3]}, "weight_ih_back has shape"),
    ],
)
def test_a_malformed_lstm_is_refused_by_name(spoilt, message):
    with pytest.raises(ValueError, match=message):
        call("lstm", **(GOOD | spoilt))


def test_gates_too_large_to_hold_are_refused_before_they_are_made():
    x = torch.zeros(1, 1, 1).expand(50_000, 200_000, 1)
    given = {"initial_h": torch.zeros(200_000, 1), "weight_ih": torch.ones(3, 1), "weight_hh": torch.ones(3, 1)}
    with pytest.raises(PackageError, match="refusing to allocate"):
        call("gru", x=x, **given)


@pytest.mark.parametrize("name", ["rnn", "gru"])
def test_rnn_and_gru_know_no_bidirectional(name):
    given = {"x": X, "initial_h": np.zeros((B, H), np.float32), "weight_ih": np.ones((GATES[name] * H, D), np.float32)}
    with pytest.raises(ValueError, match="unknown direction 'bidirectional'"):
        call(name, **given, weight_hh=np.ones((GATES[name] * H, H), np.float32), direction="bidirectional")


def test_a_state_of_the_wrong_batch_in_a_package_is_one_error_that_names_the_operation(tmp_path):
    def body(x, initial_h, initial_c):
        return mb.lstm(x=x, initial_h=initial_h, initial_c=initial_c, **lstm_weights(80), name="cell")

    with pytest.raises(PackageError, match=r"lstm 'cell_0' failed: initial_h.* has shape \[1, 2\], not \[3, 2\]"):
        predict(tmp_path, body, X, np.zeros((1, H), np.float32), np.zeros((1, H), np.float32))


def test_a_first_state_of_zeros_serves_any_batch():
    """What coremltools writes for a packed sequence."""
    rng = np.random.default_rng(0)
    x, w_ih, w_hh = (torch.from_numpy(rng.standard_normal(s).astype(np.float32)) for s in ((4, 3, 2), (5, 2), (5, 5)))
    run = Run(make_policy("fp32"), None)
    wrong, _ = TABLE["rnn"].function(run, x, torch.zeros(7, 5), w_ih, w_hh)
    right, _ = TABLE["rnn"].function(run, x, torch.zeros(3, 5), w_ih, w_hh)
    assert torch.equal(wrong, right)
    with pytest.raises(ValueError, match="initial_h has shape"):
        TABLE["rnn"].function(run, x, torch.arange(35.0).reshape(7, 5), w_ih, w_hh)
