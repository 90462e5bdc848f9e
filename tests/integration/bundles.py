"""A toy bundle for the tests of deployment: a student trained on a set with held-out records, built once a session."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import yaml
from rich.console import Console

from distill.deploy.manifest import MANIFEST
from distill.train import loop
from distill.train.toy import PRESETS, toy_config, toy_model
from tests.unit.train_sets import write_set

LIMITS = {
    "min_records": 5,
    "min_tokens": 100,
    "rules": [
        {
            "formats": ["*"],
            "kl_mean": 0.01,
            "kl_p99": 0.1,
            "top1_agreement": 0.9,
            "topk_agreement": 0.8,
            "perplexity_ratio": 1.05,
        }
    ],
}


class Made(NamedTuple):
    """Where things lie. Tests copy what they change."""

    folder: Path
    checkpoint: Path
    bundle: Path
    manifest_sha256: str

    @property
    def package(self) -> Path:
        return self.bundle / "toy.mlpackage"

    def config(self, folder: Path, **keys: Any) -> Path:
        """A configuration whose bundle is `folder`/out."""
        limits = folder / "limits.yaml"
        limits.write_text(yaml.safe_dump(LIMITS))
        settings = {"name": "toy", "checkpoint": str(self.checkpoint), "out": str(folder / "out"),
                    "limits": str(limits), "evaluation": str(folder / "evaluation.json")}  # fmt: skip
        path = folder / "deploy.yaml"
        path.write_text(yaml.safe_dump(settings | keys))
        return path

    def copy(self, folder: Path) -> Path:
        """The bundle, to be altered."""
        return Path(shutil.copytree(self.bundle, folder / "altered"))


def train(folder: Path, *, seed: int = 0) -> Path:
    """A toy student and its dataset in `folder`; returns the checkpoint."""
    folder.mkdir(parents=True, exist_ok=True)
    data = write_set(folder / "kd.jsonl", 168, val=40)
    settings = toy_config(str(data), str(folder / "toy.ckpt"), preset=PRESETS["tools"], model=toy_model(),
                          device="cpu", seed=seed)  # fmt: skip
    export = msgspec.structs.replace(settings.export, seq=[48, 96])
    settings = msgspec.structs.replace(settings, runs=str(folder / "runs"), export=export)
    loop.run(settings, restart=True, console=Console(quiet=True))
    return folder / "toy.ckpt"


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, and its sha256."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a JSON file in the form in which bundles hold JSON."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n")


def reseal(bundle: Path) -> None:
    """Make the manifest's list of files agree with what lies there, as a forger would."""

    def match(manifest: dict[str, Any]) -> None:
        manifest["files"] = {
            path: {"sha256": digest, "bytes": (bundle / path).stat().st_size}
            for path, digest in tree(bundle).items()
            if path != MANIFEST
        }

    edit_json(bundle / MANIFEST, match)
