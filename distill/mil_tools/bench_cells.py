"""What `distill mil bench` measures: the package, PyTorch's own model, and one function a cell.

Speed is that of a package of the prefill alone, memory that of one with prefill at two lengths and decode.
"""

from __future__ import annotations

import contextlib
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from distill.errors import DistillError
from distill.model import ModelConfig, Student

CONFIG = ModelConfig(
    vocab_size=49152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    rope_theta=100000.0,
    tie_word_embeddings=True,
)
LENGTHS = (128, 256)
CONTEXT = 256
EMBEDDING = "model.embed_tokens.weight"
PREFILL, ALL, WEIGHTS = "prefill.mlpackage", "all.mlpackage", "model.safetensors"


def make(out: Path) -> None:
    """The weights and the two packages, all or none."""
    from distill.versions import import_coremltools, quiet

    ct = import_coremltools()
    out.mkdir(parents=True, exist_ok=True)
    student = Student(CONFIG).init_weights(0).eval()
    weights = {name: value for name, value in student.state_dict().items() if name != "lm_head.weight"}
    with tempfile.TemporaryDirectory(dir=out) as folder, quiet():
        descriptor = ct.utils.MultiFunctionDescriptor()
        for name, model in _functions(ct, student):
            path = f"{folder}/{name}.mlpackage"
            model.save(path)
            descriptor.add_function(path, "main", name)
        descriptor.default_function_name = f"prefill_{LENGTHS[0]}"
        ct.utils.save_multifunction(descriptor, f"{folder}/{ALL}")
        save_file(weights, out / WEIGHTS)
        shutil.move(f"{folder}/prefill_{LENGTHS[0]}.mlpackage", out / PREFILL)
        shutil.move(f"{folder}/{ALL}", out / ALL)  # last: it says that all is there


def _functions(ct: Any, student: Student) -> Iterator[tuple[str, Any]]:
    """(name, converted model) of each function."""
    import numpy as np

    from distill.export.twin import CachedTwin, PrefillTwin

    def convert(twin: torch.nn.Module, shapes: dict[str, tuple[int, ...]], states: Any = None) -> Any:
        example = tuple(torch.zeros(shape, dtype=torch.int32) for shape in shapes.values())
        return ct.convert(
            torch.jit.trace(twin, example, check_trace=False),
            source="pytorch",
            inputs=[ct.TensorType(name, shape=shape, dtype=np.int32) for name, shape in shapes.items()],
            outputs=[ct.TensorType("logits", dtype=np.float16)],
            states=states,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT16,
            skip_model_load=True,
        )

    with torch.no_grad():
        for length in LENGTHS:
            yield f"prefill_{length}", convert(PrefillTwin(student, length), {"input_ids": (1, length)})
        twin = CachedTwin(student, CONTEXT)
        kv = ct.StateType(wrapped_type=ct.TensorType(shape=tuple(twin.kv.shape), dtype=np.float16), name="kv")
        yield "decode", convert(twin, {"input_ids": (1, 1), "position": (1,)}, [kv])


def eager(out: Path) -> Student:
    """The training model, its weights mapped from the safetensors file."""
    with torch.device("meta"):
        student = Student(CONFIG)
    student.load_state_dict(load_file(out / WEIGHTS), strict=False, assign=True)
    student.lm_head.weight = student.model.embed_tokens.weight
    return student.eval()


def prompt(length: int) -> torch.Tensor:
    ids = torch.randint(CONFIG.vocab_size, (1, length), generator=torch.Generator().manual_seed(0))
    return ids.to(torch.int32)


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def run_eager(out: Path) -> Callable[[], object]:
    """Everything but the call happens at the first call."""
    kept: list[Student] = []

    @torch.inference_mode()
    def call() -> object:
        if not kept:
            kept.append(eager(out))
        return kept[0](prompt(LENGTHS[0]))

    return call


def run_executor(out: Path, policy: str) -> Callable[[], object]:
    from distill import mil

    kept: list[mil.Program] = []

    def call() -> object:
        if not kept:
            kept.append(mil.load(out / PREFILL))
        return kept[0].predict({"input_ids": prompt(LENGTHS[0]).numpy()}, policy=policy)

    return call


def cell_speed(out: Path, policy: str, repetitions: int) -> dict[str, float]:
    """Steady calls, alternating."""
    ours, theirs = run_executor(out, policy), run_eager(out)
    for call in (ours, theirs, ours, theirs):
        call()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(repetitions)]
    a, b = ([pair[i] for pair in pairs] for i in (0, 1))
    return {
        "executor": statistics.median(a),
        "eager": statistics.median(b),
        "ratio": statistics.median(x / y for x, y in pairs),
        "ratio of minima": min(a) / min(b),
    }


def cell_first(out: Path, policy: str, repetitions: int) -> dict[str, float]:
    """The first call in a fresh process: reading the package, planning, decoding the weights, running."""
    import numpy  # noqa: F401  (imports are not what is measured)

    import distill.mil.interpreter
    import distill.mil.parse  # noqa: F401

    return {"seconds": seconds(run_executor(out, policy))}


def cell_memory(out: Path, policy: str, repetitions: int) -> dict[str, float]:
    """The most private memory while every function runs, in bytes; `empty` is that of torch alone."""
    from distill import mil

    with peak() as most:
        empty = most[0]
        program = mil.load(out / ALL)
        for length in LENGTHS:
            program.predict({"input_ids": prompt(length).numpy()}, f"prefill_{length}", policy=policy)
        state = program.make_state("decode")
        for position in range(3):
            one = {"input_ids": prompt(1).numpy(), "position": torch.tensor([position], dtype=torch.int32).numpy()}
            program.predict(one, "decode", state, policy)
    return {"peak": most[0], "empty": empty}


@contextlib.contextmanager
def peak() -> Iterator[list[int]]:
    """The largest private memory so far, sampled every 2 ms."""
    most, done = [private()], threading.Event()

    def watch() -> None:
        while not done.wait(0.002):
            most[0] = max(most[0], private())

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield most
    finally:
        done.set()
        thread.join()


def private() -> int:
    """Bytes of this process that no file backs."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise DistillError("memory: /proc/self/status has no RssAnon here")


CELLS = {"speed": cell_speed, "first": cell_first, "memory": cell_memory}
