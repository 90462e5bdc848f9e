"""Where a run's numbers and text samples go: TensorBoard, Weights & Biases, or nowhere (the key `tracker`)."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol

from distill.errors import DistillError, InputError

Kind = Literal["tensorboard", "wandb", "none"]


class Tracker(Protocol):
    """Takes what a step shows."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers by name; a name's part before the slash is its group."""

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        """What the student writes, by prompt."""

    def flush(self) -> None:
        """What was given is on disk."""

    def close(self) -> None:
        """No more comes."""


def open_tracker(kind: Kind, folder: Path, title: str, identity: str, done: int) -> Tracker:
    """The tracker of a run that continues after step `done`. InputError where its package is absent."""
    if kind == "wandb":
        return _Wandb(folder, title, identity)
    return _TensorBoard(folder, done) if kind == "tensorboard" else _Nowhere()


class _Nowhere:
    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        pass

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    def __init__(self, folder: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # steps that come again, after a kill or a restart, are shown once
        self._writer = SummaryWriter(str(folder), purge_step=done + 1 if done else 0)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        for number, (prompt, text) in enumerate(texts.items()):
            shown = textwrap.indent(f"{prompt}\n--\n{text}", "    ")  # indented: Markdown shows it as it is
            self._writer.add_text(f"samples/{number}", shown, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """Project and mode (offline, say) come from its own environment variables, WANDB_PROJECT and WANDB_MODE."""

    def __init__(self, folder: Path, title: str, identity: str) -> None:
        try:
            import wandb
        except ImportError:
            raise InputError("tracker: the package wandb is not installed: pip install 'distill[wandb]'") from None
        self._wandb: Any = wandb
        settings = wandb.Settings(console="off", silent=True)
        try:
            self._run = wandb.init(dir=folder, name=title, id=f"{title}-{identity}", resume="allow", settings=settings)
        except wandb.Error as error:
            raise DistillError(f"tracker: wandb: {' '.join(str(error).split())}") from error

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def texts(self, step: int, texts: Mapping[str, str]) -> None:
        table = self._wandb.Table(columns=["prompt", "text"], data=[[prompt, text] for prompt, text in texts.items()])
        self._run.log({"samples": table}, step=step)

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self._run.finish()
