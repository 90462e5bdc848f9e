"""Run a prepared function: check the inputs, loop over the instructions, hand back the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

import distill.mil.ops  # noqa: F401  (fills the operator table)
from distill.errors import InputError
from distill.mil.guard import Guard, nbytes
from distill.mil.inputs import check_inputs
from distill.mil.plan import Plan
from distill.mil.planner import ledger, prepare
from distill.mil.policy import SMALLEST_NORMAL, Policy, Strict, make_policy
from distill.mil.program import Function, Operation, Program
from distill.mil.run import Run
from distill.mil.state import State


class Step(NamedTuple):
    """One operation of a trace with what it computed (fp16 as float32)."""

    op: Operation
    outputs: dict[str, Any]


def predict(
    program: Program,
    inputs: Mapping[str, Any],
    function: str | None,
    state: State | None,
    policy: str | Policy,
) -> dict[str, Any]:
    chosen = program.function(function)
    with torch.inference_mode():
        plan, run, arguments = begin(program, chosen, inputs, state, policy)
        before = {} if state is None else {feature.name: state.get(feature.name) for feature in chosen.states}
        try:
            results = plan.execute(run, arguments, True)
        except BaseException:
            run.restore(before)  # a prediction that fails, or is interrupted, leaves no half-written state
            raise
    owned = plan.owned
    return {f.name: exported(value, i in owned) for i, (f, value) in enumerate(zip(chosen.outputs, results))}


def trace(
    program: Program,
    inputs: Mapping[str, Any],
    function: str | None,
    state: State | None,
    policy: str | Policy,
) -> Iterator[Step]:
    """Everything is checked now; the operations run as the iterator is consumed. A state is read now and written
    when the last operation has run.
    """
    with torch.inference_mode():
        own = None if state is None else state.copy()
        plan, run, arguments = begin(program, program.function(function), inputs, own, policy)
    for slot, argument in zip(plan.inputs, arguments):
        run.values[slot] = argument
    return steps(plan, run, state)


def steps(plan: Plan, run: Run, state: State | None) -> Iterator[Step]:
    for instruction in plan.instructions:
        with torch.inference_mode():
            plan.step(instruction, run, False)
        outputs = zip(instruction.op.outputs, instruction.writes)
        yield Step(instruction.op, {o.name: exported(run.values[slot]) for o, slot in outputs})
        for slot in instruction.frees:
            run.values[slot] = None
    if state is not None and run.state is not None:
        for name in state.names:
            state.set(name, run.state.get(name))


def begin(
    program: Program, function: Function, inputs: Mapping[str, Any], state: State | None, policy: str | Policy
) -> tuple[Plan, Run, list[Tensor]]:
    chosen = resolve(program, policy)
    plan = prepare(program, function, chosen)
    check_state(program, function, state)
    arguments = check_inputs(program, function, inputs, chosen)
    if chosen.records:
        for feature, argument in zip(function.inputs, arguments):
            if feature.type.dtype in SMALLEST_NORMAL and feature.type.dtype != "fp16":  # those are settled already
                chosen.look(argument, feature.type.dtype, "input", feature.name)
    size = program.size + sum(nbytes(a) for a in arguments)
    guard = Guard(ledger(program), program.limits, size)
    return plan, Run(chosen, state, [None] * plan.size, guard, program.limits.iterations), arguments


def resolve(program: Program, policy: str | Policy) -> Policy:
    """A policy by name; `strict` starts with an empty list of findings, kept as program.findings."""
    chosen = make_policy(policy) if isinstance(policy, str) else policy
    if isinstance(chosen, Strict):
        program.cache["policy:strict"] = chosen
    return chosen


def check_state(program: Program, function: Function, state: State | None) -> None:
    if not function.states:
        return
    if state is None:
        names = ", ".join(s.name for s in function.states)
        raise InputError(f"{program.path}: function {function.name} keeps state ({names}); pass make_state()")
    for feature in function.states:
        if tuple(state.get(feature.name).shape) != feature.shape:
            raise InputError(
                f"{program.path}: state {feature.name!r} has shape {list(state.get(feature.name).shape)}, "
                f"function {function.name} needs {list(feature.shape)}"
            )


def exported(value: Any, owned: bool = False) -> Any:
    """A result for the caller, in memory of its own; what `classify` and list operators made as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.numpy() if owned else value.numpy().copy()
