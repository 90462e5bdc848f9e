"""Run a prepared function: check the inputs, loop over the instructions, hand back the outputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

import distill.mil.ops  # noqa: F401  (fills the operator table)
from distill.errors import InputError
from distill.mil.inputs import check_inputs
from distill.mil.plan import Plan
from distill.mil.planner import prepare
from distill.mil.policy import Policy, Strict, make_policy
from distill.mil.program import Function, Operation, Program
from distill.mil.run import Run
from distill.mil.state import State


class Step(NamedTuple):
    """One operation of a trace with what it computed (fp16 as float32)."""

    op: Operation
    outputs: dict[str, np.ndarray]


def predict(
    program: Program,
    inputs: Mapping[str, Any],
    function: str | None,
    state: State | None,
    policy: str | Policy,
) -> dict[str, np.ndarray]:
    chosen = program.function(function)
    with torch.inference_mode():
        plan, run, arguments = begin(program, chosen, inputs, state, policy)
        results = plan.execute(run, arguments, True)
    return {f.name: exported(value) for f, value in zip(chosen.outputs, results)}


def trace(
    program: Program,
    inputs: Mapping[str, Any],
    function: str | None,
    state: State | None,
    policy: str | Policy,
) -> Iterator[Step]:
    """Everything is checked now; the operations run as the iterator is consumed."""
    with torch.inference_mode():
        plan, run, arguments = begin(program, program.function(function), inputs, state, policy)
    for slot, argument in zip(plan.inputs, arguments):
        run.values[slot] = argument
    return steps(plan, run)


def steps(plan: Plan, run: Run) -> Iterator[Step]:
    for instruction in plan.instructions:
        with torch.inference_mode():
            plan.step(instruction, run, False)
        outputs = zip(instruction.op.outputs, instruction.writes)
        yield Step(instruction.op, {o.name: exported(run.values[slot]) for o, slot in outputs})
        for slot in instruction.frees:
            run.values[slot] = None


def begin(
    program: Program, function: Function, inputs: Mapping[str, Any], state: State | None, policy: str | Policy
) -> tuple[Plan, Run, list[Tensor]]:
    chosen = resolve(program, policy)
    plan = prepare(program, function, chosen)
    check_state(program, function, state)
    arguments = check_inputs(program, function, inputs, chosen)
    return plan, Run(chosen, state, [None] * plan.size), arguments


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


def exported(value: Any) -> np.ndarray:
    """A result for the caller, in memory of its own."""
    return value.numpy().copy() if isinstance(value, Tensor) else np.array(value)
