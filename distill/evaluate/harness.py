"""Any task of lm-evaluation-harness on a checkpoint, a Hugging Face folder or a Core ML package.

distill harness --model M --tasks TASK [TASK ...] [--include-path DIR] [--report eval/reports/harness.json]

Tasks with data on the Hugging Face Hub need the network or its cache; those in DIR may have theirs in local files. A
task is code where its YAML says `!function`: DIR is trusted as the command line is.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from distill.artifacts import atomic_file, code_version, require_replaceable_file, write_json
from distill.errors import InputError, stage_main
from distill.evaluate.runners import Settings

REPORT = Path("eval/reports/harness.json")
_COPIED = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better")


class HarnessConfig(NamedTuple):
    """What to evaluate, and on what."""

    model: str
    tasks: tuple[str, ...]
    report: Path = REPORT
    include_path: Path | None = None
    num_fewshot: int | None = None
    """None: as the task says."""
    limit: int | None = None
    """Documents of each task; None: all."""
    chat: bool = False
    """Whether prompts are user turns of the chat template."""
    settings: Settings = Settings()


def run(config: HarnessConfig) -> dict[str, Any]:
    """Evaluate, write the report and, beside it as .jsonl, every answer. InputError names a task that is not there."""
    try:
        installed = version("lm_eval")
    except PackageNotFoundError as error:
        raise InputError("lm-evaluation-harness is not installed: pip install 'distill[benchmarks]'") from error
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from distill.evaluate.harness_model import HarnessModel
    from distill.evaluate.harness_scorers import open_scorer

    answers = config.report.with_suffix(".jsonl")
    for path in (config.report, answers):
        require_replaceable_file(path)
    if config.include_path is not None and not config.include_path.is_dir():
        raise InputError(f"--include-path {config.include_path}: no such folder")
    scorer, identity = open_scorer(config.model, config.settings)
    tasks = TaskManager(include_path=str(config.include_path) if config.include_path else None)
    for name in config.tasks:
        if name not in tasks.all_tasks:
            raise InputError(f"--tasks {name}: lm-evaluation-harness {installed} has none of this name")
    found = simple_evaluate(
        HarnessModel(scorer), tasks=list(config.tasks), num_fewshot=config.num_fewshot, limit=config.limit,
        task_manager=tasks, apply_chat_template=config.chat, log_samples=True,
    )  # fmt: skip
    assert found is not None  # only other processes than the first get nothing
    header = {
        "model": identity, "lm_eval": installed, "tasks": list(config.tasks), "num_fewshot": config.num_fewshot,
        "limit": config.limit, "chat": config.chat, "code": code_version(),
    }  # fmt: skip
    report = {"schema": "harness-report/1", "header": header, **{key: _plain(found.get(key, {})) for key in _COPIED}}
    with atomic_file(answers) as temporary:
        temporary.write_bytes(b"".join(_lines(found["samples"])))
    write_json(config.report, report)
    return report


def _lines(samples: dict[str, list[dict[str, Any]]]) -> list[bytes]:
    return [
        msgspec.json.encode(_plain({"task": task, **sample})) + b"\n"
        for task, rows in samples.items() for sample in rows
    ]  # fmt: skip


def _plain(value: Any) -> Any:
    """As JSON has it: no NaN, and text for what it has no form of."""
    if isinstance(value, dict):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if hasattr(value, "item"):  # NumPy's
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def table(report: dict[str, Any]) -> str:
    """Every metric of every task, a line each."""
    lines = []
    for task, row in report["results"].items():
        for key, value in row.items():
            metric = key.split(",")[0]
            if "," in key and not metric.endswith("_stderr") and isinstance(value, (int, float)):
                error = row.get(key.replace(metric, f"{metric}_stderr", 1))
                spread = f" +- {error:.4f}" if isinstance(error, float) else ""
                lines.append(f"{task:32s} {metric:20s} {value:.4f}{spread}")
    return "\n".join(lines)


@stage_main
def main(argv: Sequence[str] | None = None) -> int:
    """Parse, evaluate, print the table."""
    parser = argparse.ArgumentParser(prog="distill harness", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--model", required=True, help="checkpoint .pt, Hugging Face folder or .mlpackage")
    add("--tasks", required=True, nargs="+", metavar="TASK", help="names of tasks or groups")
    add("--include-path", type=Path, metavar="DIR", help="folder with more tasks, as YAML files")
    add("--report", type=Path, default=REPORT, help=f"default: {REPORT}")
    add("--num-fewshot", type=int, help="worked examples in a prompt (default: as the task says)")
    add("--limit", type=int, help="the first so many documents of each task")
    add("--chat", action="store_true", help="prompts as user turns of the chat template")
    add("--formats", help="weights as deployed in this format: int8, or blocks=int4/32,embedding=int8")
    args = parser.parse_args(argv)
    settings = Settings(formats=args.formats)
    report = run(HarnessConfig(args.model, tuple(args.tasks), args.report, args.include_path, args.num_fewshot,
                               args.limit, args.chat, settings))  # fmt: skip
    print(table(report))
    print(f"harness: {len(args.tasks)} tasks; report: {args.report}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
