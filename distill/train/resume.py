"""A run on disk: <stage>.step_000120.pt while it works, <stage>.pt, its report and latest.pt once it is finished.

A resumable checkpoint has its sha256 beside it; the last `keep_checkpoints` are kept. Of several processes each writes
its own shards, <stage>.step_000120.0of2.pt: beside the loop, waiting for nobody. The checkpoint is there once all parts
are, and any number of processes can go on from it.
"""

from __future__ import annotations

import glob
import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from distill import checkpoint
from distill.artifacts import atomic_file, provenance, sweep, write_json
from distill.config import as_dict
from distill.errors import CheckpointError, ConfigError, InputError
from distill.model import Student
from distill.train.adapters import adapters, plain
from distill.train.fake_quantisation import FakeQuantised
from distill.train.optimiser import optimiser_state, restore_optimiser
from distill.train.prepare import Run, State
from distill.train.sharded import Sharded, local, rows, trained


class _Saved(NamedTuple):
    """A resumable checkpoint: a file from each of the processes that wrote it, by rank."""

    step: int
    paths: list[Path]


def _require_ours(path: Path, data: dict[str, Any], it: Run) -> dict[str, Any]:
    """What `data`, read from `path`, holds for going on; ConfigError if it is another run's."""
    found = data.get("resume")
    if not isinstance(found, dict) or found.get("fingerprint") != it.mark:
        raise ConfigError(
            f"{path} was made with {_difference(found, it)}; --restart trains anew over it, "
            f"another `stage` or `checkpoints` keeps it"
        )
    return found


def _difference(found: Any, it: Run) -> str:
    """In what another run differs, by its keys, where its checkpoint says so."""
    made_of = found.get("made_of") if isinstance(found, dict) else None
    named = []
    for section in ("config", "inputs"):
        theirs, ours = (x.get(section) if isinstance(x, dict) else None for x in (made_of, it.made_of))
        if isinstance(theirs, dict) and isinstance(ours, dict):
            named.append(
                [key for key in ours if theirs.get(key) != ours[key]] + [key for key in theirs if key not in ours]
            )
        else:
            return "another configuration or other data"
    settings, inputs = (", ".join(map(str, keys)) for keys in named)
    return " and ".join(f"other {kind}: {keys}" for kind, keys in (("settings", settings), ("inputs", inputs)) if keys)


def _saved(it: Run) -> list[_Saved]:
    """The resumable checkpoints of which every part is there, newest first."""
    found: dict[tuple[int, int], dict[int, Path]] = {}
    for path, (step, rank, size) in _parts(it).items():
        found.setdefault((step, size), {})[rank] = path
    every = [_Saved(step, [parts[rank] for rank in sorted(parts)]) for (step, size), parts in found.items()
             if sorted(parts) == list(range(size))]  # fmt: skip
    return sorted(every, key=lambda saved: (saved.step, len(saved.paths)), reverse=True)


def _parts(it: Run) -> dict[Path, tuple[int, int, int]]:
    """Every file of a resumable checkpoint: its step, its process and how many there were."""
    name = re.compile(re.escape(it.final.stem) + r"\.step_(\d{6,})(?:\.(\d+)of(\d+))?\.pt")
    found = {path: name.fullmatch(path.name) for path in it.final.parent.glob(f"{_stem(it)}.step_*.pt")}
    return {path: (int(m[1]), int(m[2] or 0), int(m[3] or 1)) for path, m in found.items() if m}


def _stem(it: Run) -> str:
    return glob.escape(it.final.stem)


def finished(it: Run) -> dict[str, Any] | None:
    """The report of this run if it is finished."""
    if not it.final.exists() or _saved(it):
        return None
    report = _require_ours(it.final, checkpoint.read(it.final, mmap=True), it).get("report")
    if not isinstance(report, dict):
        raise CheckpointError(f"{it.final}: has no report; --restart trains anew over it")
    return report


def find(it: Run, say: Callable[[str], None]) -> list[dict[str, Any]] | None:
    """The newest resumable checkpoint of this run that is sound, part by part; a damaged one is told, and the one
    before it taken. All processes call it.

    CheckpointError if all are damaged, ConfigError if it is another run's.
    """
    every = it.world.from_first(lambda: _saved(it))
    for saved in every:
        damage = [error for found in it.world.gather(_damage(it, it.world.mine(saved.paths))) for error in found]
        if not damage:
            parts = [checkpoint.read(path, mmap=True) for path in saved.paths]
            for path, part in zip(saved.paths, parts):
                _require_ours(path, part, it)
            return parts
        say(f"{damage[0]}; it is left aside, and the one before it is used")
    if every:
        raise CheckpointError(f"{every[0].paths[0]}: no resumable checkpoint of this run is sound; --restart trains "
                              f"anew")  # fmt: skip
    return None


def _damage(it: Run, paths: Sequence[Path]) -> list[str]:
    """What is wrong with files."""
    found, parts = [], _parts(it)
    for path in paths:
        try:
            checkpoint.require_seal(path)
            data = checkpoint.read(path, mmap=True)
            if (data.get("step"), *data.get("part", (0, 1))) != parts[path]:
                raise CheckpointError(f"{path}: damaged: holds another part than its name says")
        except InputError as error:
            found.append(str(error))
    return found


def clean(it: Run) -> None:
    """Remove what a killed process left half done. Only for the one process that trains this run."""
    folder = it.final.parent
    whole = {path for saved in _saved(it) for path in saved.paths}
    _remove([path for path in _parts(it) if path not in whole])
    alone = (seal for seal in folder.glob(f"{_stem(it)}.step_*.pt.sha256") if not seal.with_suffix("").exists())
    for path in (*folder.glob(f".{_stem(it)}.step_*.tmp"), *alone):
        path.unlink(missing_ok=True)
    for path in (it.final, it.beside(".report.json"), _latest(it)):
        sweep(path)


def drop(it: Run) -> None:
    """Remove the resumable checkpoints."""
    _remove(_parts(it))


def _remove(paths: Iterable[Path]) -> None:
    """The checkpoint first: one without its sha256 would look damaged."""
    for path in paths:
        path.unlink(missing_ok=True)
        checkpoint.seal_of(path).unlink(missing_ok=True)


def snapshot(it: Run, optimiser: torch.optim.Optimizer, state: State, fake: FakeQuantised | None) -> dict[str, Any]:
    """A resumable checkpoint of this moment, on the CPU: what training changes next does not change it. Of several
    processes, this one's part."""
    resume = {
        "fingerprint": it.mark,
        "made_of": it.made_of,
        "optimiser": optimiser_state(optimiser),
        "rng": _random_state(it.device),
        "tokens": state.tokens,
        "first_loss": state.first_loss,
        "before": state.before,
        "unquantised": state.unquantised,
    }
    if isinstance(it.model, Sharded):
        data: dict[str, Any] = {"step": state.step, "loss": state.loss, "part": list(it.world),
                                "model": trained(it.model), "resume": resume}  # fmt: skip
    else:
        resume["adapters"] = adapters(it.model)
        if fake is not None:
            resume["importance"] = fake.importance
        data = checkpoint.contents(plain(it.model), it.start.tokenizer, step=state.step, loss=state.loss,
                                   stage=it.config.stage, lineage=_lineage(it, state), resume=resume,
                                   **_formats(it, fake))  # fmt: skip
    return _copied(data)


def _formats(it: Run, fake: FakeQuantised | None) -> dict[str, Any]:
    """What a checkpoint holds of the weights as deployed."""
    if fake is None or it.config.quantisation is None:
        return {}
    return {"formats": it.config.quantisation.formats, "tables": fake.tables}


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return local(value).detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(inner) for key, inner in value.items()}
    return [_copied(inner) for inner in value] if isinstance(value, list) else value


def write(it: Run, data: dict[str, Any]) -> None:
    """Write a snapshot, and then remove those that are not to be kept."""
    process = "" if it.world.size == 1 else f".{it.world.rank}of{it.world.size}"
    checkpoint.write_sealed(it.beside(f".step_{data['step']:06d}{process}.pt"), data)
    if it.world.size == 1:
        thin(it, data["step"])


def thin(it: Run, step: int) -> None:
    """Remove all but the last checkpoints up to this step that are to be kept; a later one was found damaged. Of
    several processes the first does it, once they all have written; others may be writing this step's by then."""
    kept = [saved for saved in _saved(it) if saved.step <= step][: it.config.keep_checkpoints]
    if it.world.first and kept:
        paths = {path for saved in kept for path in saved.paths}
        _remove([path for path, part in _parts(it).items() if path not in paths and part[0] != step])


def _random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Of PyTorch's generators; training draws from no other."""
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state()
    return states


def restore(it: Run, optimiser: torch.optim.Optimizer, parts: list[dict[str, Any]]) -> State:
    """Put weights, optimiser and random state back; returns where the run stands."""
    try:
        resume = parts[min(it.world.rank, len(parts) - 1)]["resume"]
        _restore_weights(it, parts)
        restore_optimiser(optimiser, [part["resume"]["optimiser"] for part in parts])
        torch.set_rng_state(resume["rng"]["cpu"])
        if it.device.type in resume["rng"] and it.device.type != "cpu":
            torch.get_device_module(it.device).set_rng_state(resume["rng"][it.device.type])
        step, loss = int(parts[0]["step"]), float(parts[0]["loss"])
        if not 0 < step <= len(it.steps):
            raise ValueError(f"step {step} of {len(it.steps)}")
        before, unquantised = ({str(name): float(value) for name, value in resume.get(key, {}).items()}
                               for key in ("before", "unquantised"))  # fmt: skip
        return State(step, float(resume["first_loss"]), loss, int(resume["tokens"]), before, unquantised)
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{it.final}: its run cannot be continued: {reason}; --restart trains anew") from error


@torch.no_grad()
def _restore_weights(it: Run, parts: list[dict[str, Any]]) -> None:
    """What trains; what is frozen is as the run built it. ValueError where they are other weights."""
    own = trained(it.model)
    saved = [part["resume"].get("adapters") or part["model"] for part in parts]
    if any(set(weights) != set(own) for weights in saved):
        raise ValueError("its weights are not those of this run")
    for name, value in own.items():
        value.copy_(rows([weights[name] for weights in saved], value))


def _lineage(it: Run, state: State) -> list[dict[str, Any]]:
    c = it.config
    entry = {
        "stage": c.stage, "step": state.step, "fingerprint": it.mark, "init": as_dict(c.init),
        "data_run_id": it.train.dataset.header.run_id,
    }  # fmt: skip
    return [*it.start.lineage, entry]


def _latest(it: Run) -> Path:
    return it.final.with_name("latest.pt")


def finish(
    it: Run, student: Student, state: State, after: dict[str, float], speed: float, fake: FakeQuantised | None = None
) -> dict[str, Any]:
    """Write latest.pt, the report and, last, the stage's checkpoint; drop the resumable ones. Returns the report."""
    c = it.config
    report = _report(it, state, after)
    header = it.train.dataset.header
    dataset = {"run_id": header.run_id, "kind": header.config.get("kind"), "teacher": header.teacher.model}
    made = provenance(as_dict(c), {"data": c.data}) | {"dataset": dataset}

    def beside(whole: Path) -> None:
        if c.out is None:
            with atomic_file(_latest(it)) as temporary:
                shutil.copyfile(whole, temporary)
        write_json(it.beside(".report.json"), report | {"tokens_per_second": round(speed, 1), "provenance": made})

    data = checkpoint.contents(plain(student), it.start.tokenizer, step=state.step, loss=state.loss,
                               stage=c.stage, lineage=_lineage(it, state), provenance=made,
                               resume={"fingerprint": it.mark, "made_of": it.made_of, "report": report},
                               **_formats(it, fake))  # fmt: skip
    checkpoint.write(it.final, data, beside=beside)
    drop(it)
    return report


def _report(it: Run, state: State, after: dict[str, float]) -> dict[str, Any]:
    c = it.config
    held_out = {"records": len({e.record for e in it.val.items}), "target_tokens": it.val.carried}
    if c.quantisation is not None:
        held_out["unquantised"] = state.unquantised
    return {
        "stage": c.stage,
        "fingerprint": it.mark,
        "parameters": it.start.student.config.n_params(),
        "steps": state.step,
        "tokens": state.tokens,
        "first_loss": state.first_loss,
        "loss": state.loss,
        "sequences": len(it.train),
        "too_long": it.train.too_long,
        "loss_weights": it.weights,
        "held_out": held_out | {"before": state.before, "after": after},
        "absent": [name for name, weight in as_dict(c.loss_weights).items() if weight and name not in it.weights],
    }  # fmt: skip
