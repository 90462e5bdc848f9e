"""The one place where the extra `teacher` (transformers, accelerate, gguf, xllamacpp) is imported."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from distill.errors import InputError

# tqdm reads its variable when it is imported, which torch does, too: so before that
for _name, _value in (
    ("TRANSFORMERS_VERBOSITY", "error"), ("TQDM_DISABLE", "1"), ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
):  # fmt: skip
    os.environ.setdefault(_name, _value)


def teacher_extra(name: str) -> ModuleType:
    """Import a module of the extra `teacher`; where it is absent, one line says how to get it."""
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"this needs {name}: pip install 'distill[teacher]' ({error})") from error
    if name == "transformers":
        module.utils.logging.disable_progress_bar()
    return module
