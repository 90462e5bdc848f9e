"""Whatever can be evaluated, behind one interface: `open_model(spec, settings)`.

model = open_model("models/student/checkpoints/latest.pt", Settings(max_new_tokens=256))
reply = model.reply(item, item.messages, ())
"""

from __future__ import annotations

from pathlib import Path

from distill.errors import InputError
from distill.evaluate.runners.interface import BatchModel, Settings

__all__ = ["BatchModel", "Settings", "open_model"]


def open_model(spec: str, settings: Settings) -> BatchModel:
    """The model that `spec` names: a checkpoint (any file), a Hugging Face folder, `X.mlpackage` or `http(s)://...`.

    InputError names what is missing, unknown or cannot be combined.
    """
    if spec.startswith(("http://", "https://")):
        _refuse(spec, settings, "an endpoint", constrained=True, formats=True)
        from distill.evaluate.runners.endpoint import open_endpoint

        return open_endpoint(spec, settings)
    path = Path(spec)
    if not path.exists():
        raise InputError(f"{spec}: no such checkpoint, Hugging Face folder, package or endpoint (http(s)://...)")
    if path.suffix == ".mlpackage":
        _refuse(spec, settings, "a package", formats=True)
        from distill.evaluate.runners.package import open_package

        return open_package(path, settings)
    if path.is_file() or (path / "config.json").is_file():
        from distill.evaluate.runners.student import open_student

        return open_student(path, settings)
    raise InputError(
        f"{spec}: cannot be evaluated: neither a checkpoint (a file), a Hugging Face folder (with config.json), a Core "
        "ML package (*.mlpackage) nor an endpoint (http(s)://...)"
    )


def _refuse(spec: str, settings: Settings, what: str, *, constrained: bool = False, formats: bool = False) -> None:
    """InputError where a setting is asked for that this kind of model cannot heed."""
    if constrained and settings.constrained:
        raise InputError(f"{spec}: constrained decoding needs the model's logits, which {what} does not give")
    if formats and settings.formats is not None:
        raise InputError(f"{spec}: weight formats are for a checkpoint or folder; {what} has its own")
