"""Is a bundle whole and unaltered, and does it answer? Everything is read as a stranger's.

distill deploy verify DIR [--manifest-sha256 HEX] [--all-gates]
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import msgspec

from distill import chat, config, gates
from distill.artifacts import read_json, sha256_file
from distill.contract import SIDECAR_NAMES
from distill.convert.package import sidecar_folder
from distill.deploy import judge
from distill.deploy.card import CARD, model_card
from distill.deploy.config import DeployConfig
from distill.deploy.manifest import Manifest, dump, file_faults, read_manifest
from distill.deploy.quickstart import QUICKSTART, quickstart
from distill.deploy.runtime import RUNTIME, runtime_config
from distill.errors import DistillError, InputError, Skipped
from distill.gates import Gate
from distill.verify import contracts, integrity
from distill.verify.runner import PackageRunner

EXECUTOR = contracts.EXECUTOR
SMOKE_TOKENS = 16
QUESTION = "What can you do?"
GATES = ("files", "manifest_pinned", "contract", "program_unaltered", "weights_unaltered", "sidecar_unaltered",
         "interface", "facts", "runtime", "pages", "verdicts", "smoke")  # fmt: skip


class Verified(NamedTuple):
    """What was found."""

    manifest: Manifest
    manifest_sha256: str
    gates: dict[str, Gate]
    answer: str
    """What the package wrote."""


class _Bundle(NamedTuple):
    folder: Path
    manifest: Manifest
    runner: PackageRunner


def run(folder: Path, pinned: str | None = None, *, all_gates: bool = False) -> Verified:
    """Verify a bundle. InputError where there is none, its manifest is malformed, or is not the pinned one."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such bundle")
    manifest, digest = read_manifest(folder, pinned)
    found: dict[str, Gate] = {}
    faults = file_faults(folder, manifest) + foreign_files(manifest)
    found["files"] = gates.holds(
        not faults, observed=len(manifest.files), reason=f"{len(faults)} faults: {faults[0]}" if faults else None
    )
    # a pinned manifest of another sha256 was refused above
    found["manifest_pinned"] = gates.holds(True) if pinned else gates.skipped("no --manifest-sha256 was given")
    answer: list[str] = []
    if faults:
        for name in GATES:
            found.setdefault(name, gates.failed("not reached: the files are not the manifest's"))
    else:
        _look_inside(folder, manifest, found, answer, all_gates)
    return Verified(manifest, digest, found, "".join(answer))


def foreign_files(manifest: Manifest) -> list[str]:
    """Files that the manifest lists and no build writes."""
    sidecar = f"{sidecar_folder(Path(manifest.package))}"
    own = {RUNTIME, CARD, QUICKSTART, *(f"reports/{name}.json" for name in judge.REPORTS)}
    own |= {SIDECAR_NAMES[role] for role in ("tokenizer", "chat_template")}
    own |= {f"{sidecar}/{name}" for name in ("contract.json", *SIDECAR_NAMES.values())}
    return [f"{path!a}: no file of a bundle" for path in manifest.files
            if path not in own and not path.startswith(f"{manifest.package}/")]  # fmt: skip


def _look_inside(folder: Path, manifest: Manifest, found: dict[str, Gate], answer: list[str], all_gates: bool) -> None:
    def gate(name: str, check: Callable[[], Gate]) -> None:
        try:
            found[name] = check()
        except Skipped as skipped:
            found[name] = gates.skipped(skipped.reason)
        except DistillError as error:
            found[name] = gates.failed(str(error))

    try:
        runner = PackageRunner(folder / manifest.package, checked=False)
    except DistillError as error:
        for name in GATES:
            found.setdefault(name, gates.failed(f"the package does not load: {error}"))
        return
    bundle = _Bundle(folder, manifest, runner)
    gate("contract", lambda: integrity.contract_gate(runner))
    gate("program_unaltered", lambda: integrity.program_gate(runner))
    gate("weights_unaltered", lambda: integrity.weights_gate(runner))
    gate("sidecar_unaltered", lambda: integrity.sidecar_gate(runner))
    gate("interface", lambda: integrity.interface_gate(runner))
    gate("facts", lambda: _facts(bundle))
    gate("runtime", lambda: _runtime(bundle))
    gate("pages", lambda: _pages(bundle))
    gate("verdicts", lambda: _verdicts(bundle))
    gate("smoke", lambda: _smoke(bundle, answer))
    if all_gates:
        report = contracts.run(contracts.ContractsConfig(runner.path))
        found |= {f"contracts: {name}": made for name, made in judge.gates_of(report, "contracts").items()}


def _facts(bundle: _Bundle) -> Gate:
    """Manifest, package and the files beside it tell of the same student."""
    contract, student = bundle.runner.contract, bundle.manifest.student
    faults = [
        f"{name} is not the package's"
        for name in ("weights_sha256", "tokenizer_sha256", "chat_template_sha256")
        if getattr(student, name) != getattr(contract, name)
    ]
    if student.parameters != contract.model_config.n_params():
        faults.append("parameters is not the package's")
    for role in ("tokenizer", "chat_template"):
        path = bundle.folder / SIDECAR_NAMES[role]
        if role not in contract.sidecar or sha256_file(path) != contract.sidecar[role].sha256:
            faults.append(f"{path.name} is not the one that the package was made with")
    return gates.holds(not faults, reason="; ".join(faults) or None)


def _settings(bundle: _Bundle) -> DeployConfig:
    return config.build(bundle.manifest.configuration, DeployConfig, "deployment_manifest.json: configuration")


def _runtime(bundle: _Bundle) -> Gate:
    """runtime_config.json is what the package's contract and the recorded sampling give."""
    runner = bundle.runner
    derived = runtime_config(runner.contract, bundle.manifest.package, runner.tokenizer(), _settings(bundle).sampling)
    if (bundle.folder / RUNTIME).read_bytes() == dump(derived):
        return gates.holds(True)
    stored = read_json(bundle.folder / RUNTIME)
    keys = stored.keys() if isinstance(stored, dict) else set()
    wrong = sorted(key for key in derived.keys() | keys if not keys or stored.get(key) != derived.get(key))
    return gates.failed(f"{RUNTIME}: {', '.join(wrong) or 'its bytes'}: not what the package gives")


def _pages(bundle: _Bundle) -> Gate:
    """The card and the quick start say what the manifest says."""
    runner = bundle.runner
    runtime = runtime_config(runner.contract, bundle.manifest.package, runner.tokenizer(), _settings(bundle).sampling)
    pages = {CARD: model_card, QUICKSTART: quickstart}
    wrong = [
        name
        for name, render in pages.items()
        if (bundle.folder / name).read_bytes() != render(bundle.manifest, runtime).encode()
    ]
    return gates.holds(not wrong, reason=f"{', '.join(wrong)}: not what the manifest says" if wrong else None)


def _verdicts(bundle: _Bundle) -> Gate:
    """The manifest's gates are those of the reports, and what it lets through is what did not pass."""
    manifest = bundle.manifest
    for name in judge.REPORTS:
        stored = judge.gates_of(read_json(bundle.folder / "reports" / f"{name}.json"), f"reports/{name}.json")
        if stored != manifest.gates.get(name):
            raise InputError(f"reports/{name}.json: its gates are not the manifest's")
    if judge.unmet(manifest.gates) != manifest.overridden:
        raise InputError("the gates that did not pass are not those that the manifest calls overridden")
    return gates.holds(True, observed=sum(map(len, manifest.gates.values())))


class _Greedy(msgspec.Struct, frozen=True):
    tokens: list[int]
    margins: list[float]
    tolerance: list[float]


class _Item(msgspec.Struct, frozen=True):
    prompt_ids: list[int]
    greedy: _Greedy


class _Evaluation(msgspec.Struct, frozen=True):
    items: list[_Item]


def _smoke(bundle: _Bundle, answer: list[str]) -> Gate:
    """The package writes what PyTorch wrote when it was exported, up to a tie within the derived fp16 error; without
    such a record, it writes something."""
    runner, tokenizer = bundle.runner, bundle.runner.tokenizer()
    item = _first_item(runner)
    if item is None:
        prompt = chat.encode(tokenizer, [chat.Message("user", QUESTION)], add_generation_prompt=True).ids
    else:
        prompt = item.prompt_ids
    count = SMOKE_TOKENS if item is None else min(SMOKE_TOKENS, len(item.greedy.tokens))
    tokens = list(runner.generate(prompt, count, tokenizer.stop_ids))
    answer.append(tokenizer.decode(tokens))
    if item is None:
        return gates.holds(bool(tokens), observed=len(tokens), backend=EXECUTOR, reason=None if tokens else "no text")
    expected = [token for token in item.greedy.tokens[:count] if token not in tokenizer.stop_ids]
    pairs = zip_longest(tokens, expected)
    step = next((i for i, (found, wanted) in enumerate(pairs) if found != wanted), None)
    tie = step is not None and item.greedy.margins[step] < item.greedy.tolerance[step]
    why = (
        None if step is None else f"step {step}: {'a tie within' if tie else 'another token than PyTorch, beyond'} fp16"
    )
    return gates.holds(step is None or tie, observed=len(tokens), threshold=len(expected), backend=EXECUTOR, reason=why)


def _first_item(runner: PackageRunner) -> _Item | None:
    """The first prompt that travelled with the package, with PyTorch's tokens."""
    path = runner.sidecar("evaluation")
    try:
        items = msgspec.convert(read_json(path), _Evaluation).items
    except msgspec.ValidationError as error:
        raise InputError(f"{path}: {error}") from error
    if not items:
        return None
    greedy, vocab = items[0].greedy, runner.contract.model_config.vocab_size
    if not 0 < len(greedy.tokens) == len(greedy.margins) == len(greedy.tolerance):
        raise InputError(f"{path}: the first greedy lists are empty or of unequal length")
    if not all(0 <= token < vocab for token in items[0].prompt_ids):
        raise InputError(f"{path}: a prompt holds a token beyond the vocabulary")
    return items[0]
