"""configs/kd_mix.yaml: what a teacher is asked, and how. Loaded by distill/data/mix.py."""

from __future__ import annotations

from typing import Literal

import msgspec

from distill.data.budget import Limits, Prices
from distill.data.prompts.stream import WEIGHTS, SourceConfig
from distill.data.schema import Licence

OPERATIONAL = {
    "concurrency", "slots", "rpm", "tpm", "timeout_s", "deadline_s", "attempts", "stream", "budget",
}  # fmt: skip
"""Keys that change no answer."""
_LONGEST_CONTEXT = 131_072  # tokens: documents that long take time to make, for whoever validates them, too


class MixConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """configs/kd_mix.yaml: what a teacher is asked, and how. Relative paths start at the working directory."""

    model: str | None = None
    """The endpoint's model id; null takes the only one that it lists."""
    max_tokens: int | None = None
    """Longest answer; one that is cut off is rejected. Null: 16384 for a teacher that reasons, 256 for a local one,
    else 1024."""
    temperature: float = 0.7
    top_p: float = 0.95
    max_turns: int = 6
    """The teacher's turns in an episode with tools."""
    reasoning: Literal["keep", "learn"] = "keep"
    """keep: in the record only; learn: the student writes it too, between <think> and </think>."""
    concurrency: int = 32
    """Most requests in flight at an endpoint; how many really are, AIMD finds out."""
    slots: int = 16
    """Requests that a local teacher works on together."""
    rpm: int | None = None
    """Most requests in any 60 seconds."""
    tpm: int | None = None
    """Most tokens in any 60 seconds, prompts and answers."""
    timeout_s: float = 300.0
    """Longest silence of a server."""
    deadline_s: float = 1800.0
    """Longest wait for one answer."""
    attempts: int = 6
    """Tries at one request before another one is tried instead."""
    stream: bool | None = None
    """Whether answers are streamed; null: where the endpoint can, with usage, and answers may be long."""
    prices: Prices | None = None
    """US dollars a million tokens: input, output, cached_input."""
    budget: Limits = Limits()
    """usd, tokens: never exceeded, whatever is in flight, over all starts of a run."""
    context: int = 2048
    """Tokens of context of each slot of a gguf: teacher."""
    tokenizer: str | None = None
    """The student's tokenizer.json for an endpoint's text; a local teacher brings its own."""
    top_k: int = 50
    """Entries kept of each token's distribution; an endpoint gives at most 20."""
    codec: Literal["compact", "exact"] = "compact"
    """How distributions are stored: quantised and coded, or to the last bit."""
    capture_dtype: Literal["float32", "bfloat16"] = "float32"
    """What a white-box teacher's logits are computed in."""
    val_share: float = 0.1
    """Share of records held out for validation, by a hash of their id."""
    quota_tolerance: float = 0.02
    """Part of a stratum's quota that may be missing before validation fails."""
    strata: dict[str, float] = msgspec.field(default_factory=lambda: dict(WEIGHTS))
    """Weight of each kind of built-in prompt."""
    sources: list[SourceConfig] = []
    """Prompts from files: path, stratum, weight."""
    tools: list[str] = []
    """Files of further tools (JSON schemas, with `returns`) for prompts from files."""
    fixtures: list[str] = []
    """Files of tool results to replay."""
    long_context_tokens: int = 4000
    """About how long the longest prompts of the stratum long_context are."""
    near_duplicates: float = 0.8
    """Jaccard similarity of word 5-shingles from which two prompts count as one."""
    decontaminate: list[str] = []
    """Evaluation sets (JSONL or text): a prompt that shares 13 words in a row with an item is left out."""
    licence: Licence = Licence()
    """teacher_terms_url, accepted_by, reasoning_allowed: on what terms the answers may be learned."""

    def __post_init__(self) -> None:
        for name in ("max_tokens", "concurrency", "slots", "attempts", "context", "top_k", "max_turns", "rpm", "tpm"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if not 1 <= self.long_context_tokens <= _LONGEST_CONTEXT:
            raise ValueError(
                f"long_context_tokens must be from 1 to {_LONGEST_CONTEXT}, not {self.long_context_tokens}"
            )
        if not 0 <= self.val_share < 1 or not 0 < self.top_p <= 1 or not 0 <= self.temperature <= 2:
            raise ValueError("val_share must be in [0, 1), top_p in (0, 1], temperature in [0, 2]")
        if self.timeout_s <= 0 or self.deadline_s <= 0:
            raise ValueError("timeout_s and deadline_s must be above 0")
        if not 0 <= self.quota_tolerance < 1 or not 0 < self.near_duplicates <= 1:
            raise ValueError("quota_tolerance must be in [0, 1), near_duplicates in (0, 1]")
        if self.budget.usd is not None and self.prices is None:
            raise ValueError(
                "budget.usd needs prices, US dollars a million tokens, such as prices: {input: 0.60, output: 2.50}"
            )
        if self.reasoning == "learn" and not self.licence.reasoning_allowed:
            raise ValueError("reasoning: learn needs licence.reasoning_allowed: true")
