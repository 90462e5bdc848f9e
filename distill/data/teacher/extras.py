"""The one place where the extra `teacher` (transformers, accelerate, gguf, xllamacpp) is imported."""

from __future__ import annotations

import importlib
import os
from types import ModuleType

from distill.errors import InputError


def teacher_extra(name: str) -> ModuleType:
    """Import a module of the extra `teacher`; where it is absent, one line says how to get it."""
    if name == "transformers":
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise InputError(f"a local teacher needs {name}: pip install 'distill[teacher]' ({error})") from error
    if name == "transformers":
        module.utils.logging.disable_progress_bar()
    return module
