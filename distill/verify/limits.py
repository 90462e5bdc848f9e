"""What a package may lose, by weight format: configs/limits.yaml as structs, and which of its rules holds."""

from __future__ import annotations

import math
from fnmatch import fnmatchcase

import msgspec

from distill.errors import ConfigError
from distill.formats import Formats

_UPPER = ("kl_mean", "kl_p99", "perplexity_ratio")
_LOWER = ("top1_agreement", "topk_agreement")


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The most that may be lost in these formats, against the float student (distill/verify/distances.py)."""

    formats: list[str]
    """Patterns as in a shell: int4 is per channel, int4/* in blocks of any size."""
    kl_mean: float
    """Nats a token, at most."""
    kl_p99: float
    """Nats that 99% of tokens do not exceed, at most."""
    top1_agreement: float
    """Share of tokens, at least."""
    topk_agreement: float
    """Share of the k best tokens, at least."""
    perplexity_ratio: float
    """Of the text, at most."""

    def __post_init__(self) -> None:
        if not self.formats:
            raise ValueError("formats: none is named")
        for name in (*_UPPER, *_LOWER):
            value, most = getattr(self, name), 1.0 if name in _LOWER else math.inf
            if not (0 <= value <= most and math.isfinite(value)):
                raise ValueError(f"{name} of {', '.join(self.formats)}: {value} is no limit")

    def require_no_tighter(self, before: Limits) -> None:
        """ValueError where a limit is tighter than that of the rule before."""
        for name in (*_UPPER, *_LOWER):
            mine, theirs = getattr(self, name), getattr(before, name)
            if (mine < theirs) if name in _UPPER else (mine > theirs):
                raise ValueError(f"rules: {name} of {', '.join(self.formats)} is tighter than that of the rule before: "
                                 "they go from the finest format to the coarsest")  # fmt: skip


class LimitsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All rules, and how much text a verdict needs."""

    rules: list[Limits]
    """From the finest format to the coarsest; a format falls under the first that names it."""
    min_records: int = 20
    """Fewer held-out records: inconclusive, since intervals come from how records differ."""
    min_tokens: int = 1000
    """Fewer target tokens: inconclusive. Ten of so many lie above the 99th percentile; and where all agree, up to
    3 / 1000 of other text may not (the rule of three)."""
    top_k: int = 5

    def __post_init__(self) -> None:
        for name in ("min_records", "min_tokens", "top_k"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        for before, rule in zip(self.rules, self.rules[1:]):
            rule.require_no_tighter(before)

    def rule(self, formats: Formats | None) -> Limits:
        """The rule of the coarsest part; ConfigError where no rule names a part's format.

        The parts' errors meet in one distribution, where none can be told from another: what the coarsest may lose, the
        package may.
        """
        formats = formats or Formats()
        parts = {formats.blocks, formats.embedding, formats.head or formats.embedding}
        return self.rules[max(self._index(part) for part in parts)]

    def _index(self, form: str) -> int:
        for index, rule in enumerate(self.rules):
            if any(fnmatchcase(form, pattern) for pattern in rule.formats):
                return index
        raise ConfigError(f"limits: no rule names the weight format {form}")
