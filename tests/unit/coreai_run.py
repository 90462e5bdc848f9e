"""Modules and twins through Core AI's runtime, for tests: float tensors in the precision asked for, fp32 back."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("coreai_torch", reason="coreai-torch is not installed: pip install 'distill[coreai]'")

from distill.convert.coreai import lower, quiet
from distill.verify.coreai import native_quiet


class Functions:
    """The functions of a loaded program."""

    def __init__(self, model: Any, loop: asyncio.AbstractEventLoop) -> None:
        self.model, self.loop = model, loop
        self.loaded = {name: model.load_function(name) for name in model.function_names}

    def __call__(self, name: str, inputs: dict[str, np.ndarray], state: Any = None) -> np.ndarray:
        from coreai.runtime import NDArray

        feed = {key: NDArray(value) for key, value in inputs.items()}
        call = self.loaded[name](feed, {"kv": state}) if state is not None else self.loaded[name](feed)
        (out,) = self.loop.run_until_complete(call).values()
        return out.numpy().astype(np.float32)


@contextlib.contextmanager
def loaded(programs: dict[str, Any], folder: Path, names: list[str], states: list[str]) -> Iterator[Functions]:
    """Exported programs by function, as one asset on disk, loaded from there."""
    import coreai_torch

    converter = coreai_torch.TorchConverter(mode=coreai_torch.TorchConverter.Mode.RELEASE)
    with quiet():
        for name, program in programs.items():
            converter.add_exported_program(
                program, input_names=names, output_names=["y"], state_names=states, entrypoint_name=name
            )
        asset = converter.to_coreai().save_asset(folder / "m.aimodel")
    loop, stack = asyncio.new_event_loop(), contextlib.AsyncExitStack()
    with native_quiet():
        functions = Functions(loop.run_until_complete(stack.enter_async_context(asset.executable())), loop)
    try:
        yield functions
    finally:
        functions.loaded.clear()
        loop.run_until_complete(stack.aclose())
        loop.close()


def run_module(
    module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], dtype: torch.dtype, folder: Path
) -> np.ndarray:
    """A module's one output."""
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs)
    names = [f"x{i}" for i in range(len(inputs))]
    with quiet():
        program = lower(module.to(dtype).eval(), inputs, dtype)
    with loaded({"main": program}, folder, names, []) as functions:
        return functions("main", {name: x.numpy() for name, x in zip(names, inputs)})
