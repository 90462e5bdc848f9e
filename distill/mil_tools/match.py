"""Which value of one program is which of another: by name, then by the order of operators between names.

Only values of a function's own block are matched, not those inside loops and branches, which no trace shows.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections import Counter
from difflib import SequenceMatcher
from typing import NamedTuple

from distill.mil import Function, Operation

_CAST_SUFFIX = re.compile(r"(_cast)?(_to)?_(fp16|fp32|int16|uint16|int32|int8|uint8)$")
_RELIABLE = 0.8
"""Names are trusted where this share of the common ones belongs to operations of the same type."""
_LARGEST_GAP = 4_000_000
"""Operations of one program times operations of the other that are aligned without a common name."""


class Pairs(NamedTuple):
    """Value of the first program -> value of the second; `by_name` holds the first's names found by name."""

    values: dict[str, str]
    by_name: set[str]


def pair_values(first: Function, second: Function) -> Pairs:
    """Match the computed values of two functions."""
    a, b = computed(first), computed(second)
    named = _by_name(a, b)
    values: dict[str, str] = {}
    for i, j in named:
        values |= _outputs(a[i], b[j])
    by_name = set(values)
    fences = [(-1, -1), *_increasing(named), (len(a), len(b))]
    taken_a, taken_b = {i for i, _ in named}, {j for _, j in named}
    for (i, j), (end_i, end_j) in itertools.pairwise(fences):
        gap_a = [k for k in range(i + 1, end_i) if k not in taken_a]
        gap_b = [k for k in range(j + 1, end_j) if k not in taken_b]
        for k, m in _by_structure(a, b, gap_a, gap_b):
            values |= _outputs(a[k], b[m])
    return Pairs(values, by_name)


def computed(function: Function) -> list[Operation]:
    """The operations that a trace shows: neither constants nor their decompression."""
    return [
        op
        for op in function.block.operations
        if op.outputs and op.type != "const" and not op.type.startswith("constexpr_")
    ]


def plain_name(name: str) -> str:
    """A name without what casting passes append: `linear_0_cast_fp16` is `linear_0`."""
    while (shorter := _CAST_SUFFIX.sub("", name)) not in (name, ""):
        name = shorter
    return name


def _by_name(a: list[Operation], b: list[Operation]) -> list[tuple[int, int]]:
    """Indices of operations with the same first output: the exact name, else the plain one where it is unique."""
    exact = {op.output_name: j for j, op in enumerate(b)}
    found = {i: exact[op.output_name] for i, op in enumerate(a) if op.output_name in exact}
    taken = set(found.values())
    left_a = [i for i, op in enumerate(a) if i not in found and op.type != "cast"]
    left_b = [j for j, op in enumerate(b) if j not in taken and op.type != "cast"]
    count_a = Counter(plain_name(a[i].output_name) for i in left_a)
    count_b = Counter(plain_name(b[j].output_name) for j in left_b)
    plain = {plain_name(b[j].output_name): j for j in left_b}
    for i in left_a:
        name = plain_name(a[i].output_name)
        if count_a[name] == count_b[name] == 1:
            found[i] = plain[name]
    pairs = [(i, j) for i, j in sorted(found.items())]
    told = [(a[i], b[j]) for i, j in pairs if "cast" not in (a[i].type, b[j].type)]
    if told and sum(x.type == y.type for x, y in told) < _RELIABLE * len(told):
        return []  # numbers given in order, not names: one operation more shifts all that follow
    return [(i, j) for i, j in pairs if a[i].type == b[j].type or _same_size(a[i], b[j])]


def _same_size(x: Operation, y: Operation) -> bool:
    return sorted(map(str, x.outputs[0].shape)) == sorted(map(str, y.outputs[0].shape))


def _outputs(x: Operation, y: Operation) -> dict[str, str]:
    return {m.name: n.name for m, n in zip(x.outputs, y.outputs)} if len(x.outputs) == len(y.outputs) else {}


def _increasing(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The longest subsequence in the order of both programs."""
    tails: list[int] = []  # second index that ends the best subsequence of each length
    ends: list[int] = []  # position in pairs of that end
    before: list[int] = []
    for position, (_, j) in enumerate(pairs):
        length = bisect.bisect_left(tails, j)
        before.append(ends[length - 1] if length else -1)
        tails[length : length + 1] = [j]
        ends[length : length + 1] = [position]
    out = []
    position = ends[-1] if ends else -1
    while position >= 0:
        out.append(pairs[position])
        position = before[position]
    return out[::-1]


def _by_structure(a: list[Operation], b: list[Operation], gap_a: list[int], gap_b: list[int]) -> list[tuple[int, int]]:
    """Operations of the same type and size, in the same order."""
    if not gap_a or not gap_b or len(gap_a) * len(gap_b) > _LARGEST_GAP:
        return []
    tokens_a, tokens_b = ([_token(ops[k]) for k in gap] for ops, gap in ((a, gap_a), (b, gap_b)))
    blocks = SequenceMatcher(None, tokens_a, tokens_b, autojunk=False).get_matching_blocks()
    return [(gap_a[m.a + k], gap_b[m.b + k]) for m in blocks for k in range(m.size)]


def _token(op: Operation) -> tuple[str, tuple[str, ...]]:
    return op.type, tuple(sorted(str(n) for n in op.outputs[0].shape if n != 1))
