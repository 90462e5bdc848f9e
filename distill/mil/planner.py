"""Make the plan of a function, once: handlers resolved, constants bound, names turned into slots."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.errors import PackageError, UnsupportedOpError
from distill.mil.collection import paused
from distill.mil.guard import Guard, Ledger, OverLimit, tensors
from distill.mil.liveness import STATE_OPS, free_dead, owned_outputs, share_states
from distill.mil.ops.registry import TABLE, UNCONVERTED, Handler, Parameter
from distill.mil.plan import KERNEL_ERRORS, Instruction, Plan, first_line, joined, numbers, settle
from distill.mil.policy import Fp32, Policy, Strict
from distill.mil.program import Binding, Block, Function, Operation, Program, TensorType, Value, ValueType
from distill.mil.run import VALUE, Body, Run
from distill.mil.signature import signature, used_slots
from distill.mil.values import RUNTIME, constant


def single(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return value


# Inputs that an operator may take in fp16, since it only picks elements: an embedding stays in the weight file.
_STORED = frozenset({("gather", "x")})
_WIDEST = 8  # bytes an element takes at most
_NUMBER = 40  # bytes of a Python number in a list

_CONVERT: dict[str, Callable[[Any], Any]] = {
    "int": lambda v: int(single(v)),
    "float": lambda v: float(single(v)),
    "bool": lambda v: bool(single(v)),
    "str": str,
}


def prepare(program: Program, function: Function, policy: Policy) -> Plan:
    """The plan of a function, made on first use and kept with the program."""
    key = ("plan", function.name, policy.rounds, policy.records)
    if key not in program.cache:
        check_operators(program, function)
        with torch.inference_mode(), paused():
            plan = Planner(program, function, policy).top()
        plan.findings = policy.findings if isinstance(policy, Strict) else []
        program.cache[key] = plan
    elif isinstance(policy, Strict):
        for finding in program.cache[key].findings:
            policy.add(finding)
    made: Plan = program.cache[key]
    return made


def ledger(program: Program) -> Ledger:
    """What the program's constants and runs hold."""
    found: Ledger = program.cache.setdefault("ledger", Ledger())
    return found


def check_operators(program: Program, function: Function) -> None:
    """Every operator that is missing anywhere in the program, at once, if this function lacks one."""

    def missing(one: Function) -> set[str]:
        return {op.type for op in one.block.walk()} - TABLE.keys() - {"const"}

    if missing(function):
        every = set().union(*(missing(f) for f in program.functions.values()))
        raise UnsupportedOpError(f"{program.path}: function {function.name}", every, TABLE)


class Planner:
    """Turns blocks into plans. `known` holds constants by name, `slots` the number of each computed value."""

    def __init__(self, program: Program, function: Function, policy: Policy) -> None:
        self.program = program
        self.function = function
        self.policy = policy
        self.size = 0
        self.guard = Guard(ledger(program), program.limits, program.size)
        self.immediates: dict[int, Any] = {}  # decoded constants by the identity of their Value
        self.states = {s.name for s in function.states}

    def top(self) -> Plan:
        known: dict[str, Any] = {name: name for name in self.states}
        slots = {feature.name: self.slot() for feature in self.function.inputs}
        place = f"{self.program.path}: function {self.function.name}"
        plan = self.block(self.function.block, known, slots, place)
        plan.inputs = list(slots.values())[: len(self.function.inputs)]
        names = {name: index for index, name in enumerate(self.function.block.outputs)}
        plan.outputs = [plan.outputs[names[feature.name]] for feature in self.function.outputs]
        plan.size = self.size
        share_states(plan.instructions, plan.inputs, plan.outputs)
        if not self.function.states:
            plan.owned = owned_outputs(plan.instructions, plan.outputs)
        return plan

    def slot(self) -> int:
        self.size += 1
        return self.size - 1

    def block(self, block: Block, known: dict[str, Any], slots: dict[str, int], place: str) -> Plan:
        inputs = []
        for named in block.inputs:
            slots[named.name] = self.slot()
            inputs.append(slots[named.name])
        instructions = []
        for op in block.operations:
            try:
                if op.type == "const":
                    known[op.output_name] = op.attributes["val"]
                elif op.type.startswith("constexpr_"):
                    self.constexpr(op, known, place)
                else:
                    instructions.append(self.instruction(op, known, slots, place))
            except KERNEL_ERRORS as error:
                if isinstance(error, PackageError) and not isinstance(error, OverLimit):
                    raise  # which says where
                raise PackageError(f"{place}: {op.type} {op.output_name!r}: {first_line(error)}") from error
        try:
            outputs = [slots[n] if n in slots else self.decoded(known[n]) for n in block.outputs]
        except OverLimit as error:
            raise PackageError(f"{place}: block outputs: {error}") from error
        plan = Plan(instructions, inputs, outputs, place)
        free_dead(plan.instructions, inputs, [o for o in outputs if type(o) is int])
        return plan

    def nested(self, block: Block, known: dict[str, Any], slots: dict[str, int], place: str) -> Plan:
        """A block that sees the names around it; its own end with it."""
        sizes = len(known), len(slots)
        plan = self.block(block, known, slots, place)
        for names, size in zip((known, slots), sizes):
            while len(names) > size:
                names.popitem()
        return plan

    def instruction(self, op: Operation, known: dict[str, Any], slots: dict[str, int], place: str) -> Instruction:
        handler = TABLE[op.type]
        where = f"{place}: {op.type} {op.output_name!r}"
        made = Instruction(op, handler, handler.function, {}, [], [], [], [], [])
        for name, bindings in self.bindings(op, handler, where).items():
            self.bind(made, name, handler.parameters[name], bindings, known, slots, where)
        if handler.wants_blocks:
            made.bodies = [self.nested(b, known, slots, where) for b in op.blocks]
            made.fixed["blocks"] = [body(plan) for plan in made.bodies]
        elif op.blocks:
            raise PackageError(f"{where}: nested blocks in an operator that takes none")
        if handler.name in STATE_OPS and made.fixed.get("input") not in self.states:
            raise PackageError(f"{where}: input 'input' is not a state")
        made.writes = [self.slot() for _ in op.outputs]
        slots.update({o.name: slot for o, slot in zip(op.outputs, made.writes)})
        made.weight += VALUE * (len(made.writes) + sum(len(parts) for _, parts, _ in made.gathers))
        made.used = used_slots(made)
        made.signature = signature(made)
        return made

    def bindings(self, op: Operation, handler: Handler, where: str) -> dict[str, list[Binding]]:
        """The operator's inputs by parameter; iOS 16 writes a constexpr's as attributes."""
        given: dict[str, list[Binding]] = {k: v for k, v in op.inputs.items() if v}
        if op.type.startswith("constexpr_"):
            given |= {k: [v] for k, v in op.attributes.items()}
        unknown = given.keys() - handler.parameters.keys()
        if unknown:
            raise PackageError(f"{where}: no input {', '.join(sorted(unknown))} in this operator")
        for name, parameter in handler.parameters.items():
            if parameter.required and name not in given:
                raise PackageError(f"{where}: input {name!r} is missing")
            if not parameter.many and len(given.get(name, [])) > 1:
                raise PackageError(f"{where}: input {name!r} takes one value, not {len(given[name])}")
        return given

    def bind(
        self,
        made: Instruction,
        name: str,
        parameter: Parameter,
        bindings: list[Binding],
        known: dict[str, Any],
        slots: dict[str, int],
        where: str,
    ) -> None:
        decode = self.stored if (made.handler.name, name) in _STORED else self.constant
        parts = [slots[b] if isinstance(b, str) and b in slots else decode(b, known) for b in bindings]
        if all(type(p) is not int for p in parts):
            made.fixed[name] = self.fixed(parts, parameter, f"{where}: input {name!r}")
        elif parameter.many and (parameter.kind in UNCONVERTED or len(parts) > 1):
            made.gathers.append((name, parts, parameter.kind not in UNCONVERTED))
        elif parameter.many:
            made.reads.append((name, parts[0], numbers))
        else:
            made.reads.append((name, parts[0], _CONVERT.get(parameter.kind)))

    def fixed(self, parts: list[Any], parameter: Parameter, where: str) -> Any:
        """Constant arguments, converted now."""
        if parameter.kind in UNCONVERTED:
            if parameter.kind == "Tensor" and not all(isinstance(p, Tensor) for p in parts):
                raise PackageError(f"{where}: not a tensor")
            return parts if parameter.many else parts[0]
        if (parameter.kind == "str") != isinstance(parts[0], str):
            raise PackageError(f"{where}: expected {parameter.kind}")
        convert = _CONVERT[parameter.kind]
        try:
            if parameter.many:
                made = [convert(n) for n in joined(parts)]
                ledger(self.program).held += _NUMBER * len(made)  # kept with the plan
                self.guard.admit(0)
                return made
            return convert(parts[0])
        except (ValueError, TypeError, RuntimeError, OverflowError) as error:
            raise PackageError(f"{where}: expected one {parameter.kind}: {error}") from error

    def constant(self, binding: Binding, known: dict[str, Any]) -> Any:
        return self.decoded(known[binding] if isinstance(binding, str) else binding)

    def stored(self, binding: Binding, known: dict[str, Any]) -> Any:
        """A constant as it lies in the mapped weight file, where the operator can take it so."""
        value = known[binding] if isinstance(binding, str) else binding
        if isinstance(value, Value) and value.is_blob and value.type.dtype == "fp16":
            return torch.from_numpy(value.view())
        return self.decoded(value)

    def decoded(self, value: Any) -> Any:
        """A constant at run time; those in a weight file are decoded once for the whole program, whatever shape
        they are given.
        """
        if not isinstance(value, Value):
            return value.value if isinstance(value, _Computed) else value
        if value.key is None:
            if id(value) not in self.immediates:
                self.immediates[id(value)] = self.made(value)
            return self.immediates[id(value)]
        *place, shape = value.key
        key = ("constant", *place)
        if key not in self.program.cache:
            self.program.cache[key] = self.made(value)
        return self.program.cache[key].view([d or 0 for d in shape])

    def made(self, value: Value) -> Any:
        """Decode within the limits. What lies in the program itself is decoded once, and small: the file's size
        is limited.
        """
        if not value.is_blob or not isinstance(value.type, TensorType):
            return constant(value)
        self.guard.admit(_WIDEST * (value.type.count or 0))
        made = constant(value)
        if isinstance(made, Tensor) and value.is_copied:
            ledger(self.program).hold(made)
        return made

    def constexpr(self, op: Operation, known: dict[str, Any], place: str) -> None:
        """Evaluate a compressed constant now, or take it from the cache; its operands are not kept."""
        handler = TABLE[op.type]
        where = f"{place}: {op.type} {op.output_name!r}"
        bindings = self.bindings(op, handler, where)
        operands = {}
        for name, (binding,) in bindings.items():
            if isinstance(binding, str) and binding not in known:
                raise PackageError(f"{where}: input {name!r} is not constant")
            operands[name] = known[binding] if isinstance(binding, str) else binding
        key = (
            "constexpr",
            op.type,
            tuple((n, identity(v)) for n, v in sorted(operands.items())),
            tuple(o.type for o in op.outputs),
        )
        if key not in self.program.cache or self.policy.records:  # what is on record depends on the policy alone
            results = self.evaluate(op, handler, operands, where)
            results = self.program.cache.setdefault(key, results)
            for tensor in tensors(results):
                ledger(self.program).hold(tensor)
        for index, (output, value) in enumerate(zip(op.outputs, self.program.cache[key])):
            known[output.name] = _Computed(value, (key, index))

    def evaluate(self, op: Operation, handler: Handler, operands: dict[str, Any], where: str) -> list[Any]:
        # a weight is what the device holds, whatever the policy makes of arithmetic
        policy = self.policy if self.policy.rounds else Policy()
        arguments = {}
        for name, value in operands.items():
            if isinstance(value, Value):
                self.guard.admit(memory(value.type))
            raw = constant(value) if isinstance(value, Value) else self.decoded(value)
            arguments[name] = self.fixed([raw], handler.parameters[name], f"{where}: input {name!r}")
        if handler.wants_run:
            half = any(isinstance(o.type, TensorType) and o.type.dtype == "fp16" for o in op.outputs)
            arguments["run"] = Run(policy if half else Fp32(), None, guard=self.guard)
        try:
            self.guard.admit(sum(memory(o.type) for o in op.outputs))  # the guard does not see numpy
            with self.guard:
                result = handler.function(**arguments)
                results = result if isinstance(result, tuple) else (result,)
                if len(results) != len(op.outputs):
                    raise ValueError(f"{len(results)} results for {len(op.outputs)} outputs")
                return [settle(v, o.type, policy, handler, o.name) for v, o in zip(results, op.outputs)]
        except KERNEL_ERRORS as error:
            raise PackageError(f"{where} failed: {first_line(error)}") from error


@dataclass(frozen=True, slots=True)
class _Computed:
    """A constant that a constexpr made, with its identity."""

    value: Any
    key: Hashable


def identity(value: Any) -> Hashable:
    """What makes two constants the same."""
    if isinstance(value, _Computed):
        return value.key
    if isinstance(value, Value):
        view = value.view()
        return value.key or (
            value.type.dtype,
            value.type.shape,
            tuple(view.flat) if view.dtype == object else view.tobytes(),
        )
    return str(value)


def memory(kind: ValueType) -> int:
    """Bytes of a decoded constant, as far as its type tells."""
    if not isinstance(kind, TensorType) or kind.dtype not in RUNTIME:
        return 0
    return RUNTIME[kind.dtype].itemsize * (kind.count or 0)


def body(plan: Plan) -> Body:
    return lambda run, arguments: plan.execute(run, arguments, False)
