"""How a model is evaluated, and what a model offers that answers several conversations at once. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec

from distill.evaluate.episode import Request
from distill.evaluate.transcripts import Model, ProviderFault, Reply


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How a model decodes, and how it is reached. Each is recorded in `identity()` of the models that it concerns."""

    max_new_tokens: int = 512
    """Of one turn."""
    formats: str | dict[str, str] | None = None
    """Weight formats to evaluate a checkpoint or folder in: `int8` for all its matrices, `blocks=int4/32,head=int8`, or
    the same as a mapping. None: those that it was trained in, else its weights as they are."""
    constrained: bool = False
    """Let a turn hold calls of offered tools, with arguments that their schemas allow, and no others."""
    must_call: bool = False
    """With `constrained`: every turn is at least one call."""
    tools: tuple[dict[str, Any], ...] = ()
    """Functions that will be offered: `identity()` says from the start which of them cannot be constrained."""
    together: int = 8
    """Conversations at a time: in one pass over a student's weights, or in flight to an endpoint."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where a checkpoint or folder runs; `auto`: on CUDA or Metal where PyTorch has them."""
    backend: Literal["executor", "coreml"] = "executor"
    """What runs a package."""
    policy: str = "ieee16"
    """The executor's numeric policy."""
    model_id: str = ""
    """The endpoint's model; empty: the only one that it lists."""
    form: Literal["chat", "completions"] = "chat"
    """The endpoint's own chat template with tools, or our rendering of the conversation sent to /completions."""
    temperature: float | None = 0.0
    """Of an endpoint; None leaves it to the server. Everything else decodes greedily."""
    seed: int = 0
    """Sent to an endpoint."""
    attempts: int = 6
    """At one request to an endpoint, before it is a fault of the provider."""
    patience_s: float = 300.0
    """Of nothing but HTTP 429 from an endpoint, before it is one."""
    timeout_s: float = 120.0
    """Longest silence of an endpoint."""
    deadline_s: float = 1800.0
    """Longest answer of an endpoint."""

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "together", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.must_call and not self.constrained:
            raise ValueError("must_call needs constrained")


@runtime_checkable
class BatchModel(Model, Protocol):
    """A model that is faster where several conversations go on at once."""

    together: int
    """How many are worth having at a time."""

    def replies(self, batch: Sequence[Request]) -> list[Reply | ProviderFault]:
        """The next turn of each conversation, as `reply` gives it; a fault concerns its own conversation only."""
        ...
