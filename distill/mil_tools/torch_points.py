"""A PyTorch module run with every intermediate tensor recorded under a name.

Of a plain module, what each submodule returns; of an exported or traced graph, what each node computes.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from distill.artifacts import require_regular
from distill.errors import CheckpointError, InputError, describe_os_error


class Points(NamedTuple):
    """Intermediate tensors in the order of execution, floats only, and the outputs; (name, array) each."""

    inner: list[tuple[str, np.ndarray]]
    outputs: list[tuple[str, np.ndarray]]


def load_module(spec: str, sha256: str | None) -> nn.Module:
    """`package.module:callable`, `file.py:callable`, or a TorchScript file whose sha256 is known."""
    path = Path(spec)
    if path.is_file():
        if path.suffix == ".py":
            raise InputError(f"--module {spec}: a Python file needs the name of a callable in it: {spec}:NAME")
        return _load_file(path, sha256)
    source, colon, name = spec.rpartition(":")
    if not colon or not source or not name:
        raise InputError(f"--module {spec}: neither a file nor package.module:callable")
    found = _attribute(spec, _import(spec, source), name)
    if isinstance(found, type) or not isinstance(found, nn.Module | torch.export.ExportedProgram):
        if not callable(found):
            raise InputError(f"--module {spec}: {name} is a {type(found).__name__}, neither a module nor a callable")
        found = _theirs(spec, found)
    if isinstance(found, torch.export.ExportedProgram):
        found = found.module()
    if not isinstance(found, nn.Module):
        raise InputError(f"--module {spec}: gave a {type(found).__name__}, not a torch.nn.Module")
    return found


def _load_file(path: Path, sha256: str | None) -> nn.Module:
    if path.suffix == ".pt2":
        raise InputError(
            f"--module {path}: torch.export.load unpickles what it reads, so it is not called here; "
            "give package.module:callable, a function of yours that loads it"
        )
    require_regular(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {describe_os_error(error, path)}") from error
    digest, known = hashlib.sha256(data).hexdigest(), sha256 or _contract_sha256(path)
    if known is None:
        raise InputError(
            f"--module {path}: a TorchScript file is code; if it is yours, say so with --sha256 (this one is {digest})"
        )
    if known.lower() != digest:
        raise CheckpointError(f"{path}: its sha256 is {digest}, not {known}; not loaded, since it is code")
    try:
        # TorchScript's own reader knows tensors and its own classes; no Python object is unpickled
        return torch.jit.load(str(path), map_location="cpu")
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path}: not a TorchScript program (a pickled module is never loaded): {str(error).splitlines()[0]}"
        ) from error


def _contract_sha256(path: Path) -> str | None:
    """What `<name>_contract.json` beside an exported program says of it."""
    contract = path.with_name(f"{path.stem}_contract.json")
    try:
        data = json.loads(contract.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    file = data.get("file") if isinstance(data, dict) else None
    found = file.get("sha256") if isinstance(file, dict) else None
    return found if isinstance(found, str) else None


def _import(spec: str, source: str) -> Any:
    """The user's own code, named on his own command line; the current folder is looked in first."""
    if source.endswith(".py"):
        place = importlib.util.spec_from_file_location(Path(source).stem, source)
        if place is None or place.loader is None or not Path(source).is_file():
            raise InputError(f"--module {spec}: no file {source}")
        if (folder := str(Path(source).resolve().parent)) not in sys.path:
            sys.path.insert(0, folder)  # what it imports from beside itself, as `python file.py` would
        module = importlib.util.module_from_spec(place)
        sys.modules[place.name] = module
        loader = place.loader
        _theirs(spec, lambda: loader.exec_module(module))
        return module
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    return _theirs(spec, lambda: importlib.import_module(source))


def _attribute(spec: str, module: Any, name: str) -> Any:
    for part in name.split("."):
        if not hasattr(module, part):
            raise InputError(f"--module {spec}: {module.__name__} has no {part!r}")
        module = getattr(module, part)
    return module


def _theirs(spec: str, call: Any) -> Any:
    """Call the user's code: whatever it raises is told in one line (DISTILL_DEBUG=1 shows where)."""
    try:
        return call()
    except Exception as error:
        raise InputError(f"--module {spec}: {type(error).__name__}: {_telling_line(str(error))}") from error


def _telling_line(text: str) -> str:
    """The line that says what went wrong: the first, but TorchScript puts its traceback before it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or [""]
    if "failed in the TorchScript interpreter" not in lines[0]:
        return lines[0]
    return next((line for line in lines if re.match(r"\w*(Error|Exception):", line)), lines[-1])


def round_to_half(module: nn.Module) -> None:
    """Round float parameters and buffers to the nearest fp16 in place, as a package of fp16 stores them."""
    with torch.no_grad():
        for tensor in [*module.parameters(), *module.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(tensor.half())


def record(spec: str, module: nn.Module, inputs: Mapping[str, np.ndarray]) -> Points:
    """Run the module in evaluation mode on a package's inputs, by name where it has such parameters."""
    if not isinstance(module, torch.fx.GraphModule):  # an exported one refuses, and has no mode
        module.eval()
    tensors = {name: _tensor(value) for name, value in inputs.items()}
    names = list(tensors) if set(tensors) <= set(_parameters(module)) else None
    arguments = () if names else tuple(tensors.values())
    keywords = tensors if names else {}
    with torch.no_grad():
        if isinstance(module, torch.jit.ScriptModule):
            ordered = tuple(tensors[n] for n in _parameters(module) if n in tensors) if names else arguments
            return _theirs(spec, lambda: _record_script(module, ordered))
        if isinstance(module, torch.fx.GraphModule):
            return _theirs(spec, lambda: _record_graph(module, tensors))
        return _theirs(spec, lambda: _record_hooks(module, arguments, keywords))


def _tensor(value: np.ndarray) -> Tensor:
    array = np.ascontiguousarray(value)
    kind = array.dtype.kind
    return torch.from_numpy(array.astype(np.float32 if kind == "f" else np.int64 if kind in "iu" else array.dtype))


def _parameters(module: nn.Module) -> list[str]:
    if isinstance(module, torch.jit.ScriptModule):
        schema: Any = module.forward
        return [argument.name for argument in schema.schema.arguments[1:]]
    return list(inspect.signature(module.forward).parameters)


def _record_hooks(module: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Tensor]) -> Points:
    """What each submodule returns, and what it is given where no submodule returned that."""
    inner: list[tuple[str, np.ndarray]] = []
    calls: dict[str, int] = {}
    known: dict[int, Any] = {id(x): x for x in (*arguments, *keywords.values())}  # held: an id is used only once

    def before(name: str) -> Any:
        def hook(_module: nn.Module, given: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            inner.extend(_flat(f"{_label(name, calls[name])} (input)", [x for x in given if id(x) not in known]))
            known.update({id(x): x for x in given})

        return hook

    def after(name: str) -> Any:
        def hook(_module: nn.Module, _given: Any, out: Any) -> None:
            inner.extend(_flat(_label(name, calls[name]), out))
            known.update({id(x): x for x in (out if isinstance(out, list | tuple) else (out,))})

        return hook

    parts = [(name, part) for name, part in module.named_modules() if name]
    handles = [part.register_forward_pre_hook(before(name)) for name, part in parts]
    handles += [part.register_forward_hook(after(name)) for name, part in parts]
    try:
        out = module(*arguments, **keywords)
    finally:
        for handle in handles:
            handle.remove()
    return Points(inner, list(_flat("output", out, any_number=True)))


def _label(name: str, call: int) -> str:
    return name if call == 1 else f"{name}#{call}"


class _Recorder(torch.fx.Interpreter):
    """Runs a graph node by node and keeps every tensor under its node's name."""

    def __init__(self, module: torch.fx.GraphModule) -> None:
        super().__init__(module)
        self.found: list[tuple[str, np.ndarray]] = []

    def run_node(self, n: torch.fx.Node) -> Any:
        out = super().run_node(n)
        if n.op not in ("placeholder", "get_attr", "output"):
            self.found.extend(_flat(n.name, out))
        return out


def _record_graph(module: torch.fx.GraphModule, tensors: dict[str, Tensor]) -> Points:
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    if len(nodes) != len(tensors):
        raise ValueError(f"the graph takes {len(nodes)} inputs, the package {len(tensors)}")
    named = {node.name for node in nodes} == set(tensors)
    flat = [tensors[node.name] if named else given for node, given in zip(nodes, tensors.values())]
    typed = [x.to(node.meta["val"].dtype) if "val" in node.meta else x for node, x in zip(nodes, flat)]
    recorder = _Recorder(module)
    out = recorder.run(*typed, enable_io_processing=False)
    return Points(recorder.found, list(_flat("output", out, any_number=True)))


def _record_script(module: Any, arguments: tuple[Tensor, ...]) -> Points:
    """Every tensor that the inlined graph computes, copied at once since later nodes may write to it."""
    graph = module.inlined_graph.copy()
    paths = {graph_input.debugName(): "" for graph_input in graph.inputs()}
    names = []
    count = len(list(graph.outputs()))
    for node in list(graph.nodes()):
        if node.kind() == "prim::GetAttr":
            owner, attribute = next(iter(node.inputs())).debugName(), node.s("name")
            path = paths.get(owner, "")
            paths[node.output().debugName()] = f"{path}.{attribute}" if path else attribute
            continue
        owner = next((paths[v.debugName()] for v in node.inputs() if v.debugName() in paths), "")
        for value in node.outputs():
            if value.type().kind() == "TensorType" and not node.kind().startswith("prim::"):
                graph.setInsertPoint(node)
                none = graph.insertConstant(None)
                clone = graph.create("aten::clone", [value, none], 1)
                clone.insertAfter(node)
                graph.registerOutput(clone.output())
                kind = node.kind().removeprefix("aten::")
                module_path = owner.rpartition(".")[0]
                names.append(f"{module_path or kind} %{value.debugName()}")
    if names:
        graph.makeMultiOutputIntoTuple()
    function = torch._C._create_function_from_graph("points", graph)
    results = function(module._c, *arguments)
    values = results if names else (results,)
    inner = [pair for name, value in zip(names, values[count:]) for pair in _flat(name, value)]
    outputs = _flat("output", values[0] if count == 1 else values[:count], any_number=True)
    return Points(inner, list(outputs))


def _flat(name: str, value: Any, any_number: bool = False) -> Iterator[tuple[str, np.ndarray]]:
    """The float tensors in what a module returned; of its outputs those of integers and booleans too."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value.detach().float().cpu().numpy().copy()
        elif any_number and not value.is_complex():
            yield name, value.detach().cpu().numpy().copy()
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flat(f"{name}.{key}", part, any_number)
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from _flat(f"{name}.{index}" if len(value) > 1 else name, part, any_number)
