"""A Scorer as a model of lm-evaluation-harness (its interface LM, release 0.4.13), which must be installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from distill import chat
from distill.errors import InputError
from distill.evaluate.harness_scorers import Scorer
from distill.tokenizer import TURN_END

_MAX_GEN_TOKS = 256
"""The harness's own default where a task sets none."""


class HarnessModel(TemplateLM):
    """One sequence at a time, greedily. What does not fit the context is cut off on the left, as in the harness's own
    models."""

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self._scorer = scorer

    @property
    def eot_token_id(self) -> int:
        """The end of a turn, at which generation stops."""
        return self._scorer.tokenizer.turn_end

    @property
    def prefix_token_id(self) -> int:
        """What a text without anything before it is conditioned on."""
        return self._scorer.first

    @property
    def max_length(self) -> int:
        """Tokens that the model can read."""
        return self._scorer.model.capacity

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of prompts."""
        return self._scorer.tokenizer.sha256

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **options: Any) -> list[int]:
        """Ids; nothing is ever added to a text."""
        return self._scorer.tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation in the student's template."""
        messages = [chat.Message(turn["role"], turn["content"]) for turn in chat_history]
        text = chat.render(messages, add_generation_prompt=add_generation_prompt)
        # the beginning of an answer that the harness itself writes is left open
        return text if add_generation_prompt else text.removesuffix("\n").removesuffix(TURN_END)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **options: Any
    ) -> list[tuple[float, bool]]:
        """For each (text, context, continuation): the continuation's log-likelihood, and whether it is greedy."""
        groups: dict[tuple[int, ...], list[int]] = {}  # the choices of a question often differ in the last token only
        for index, (_, context, continuation) in enumerate(requests):
            if not 0 < len(continuation) <= self.max_length:
                raise InputError(f"a continuation of {len(continuation)} tokens does not fit the {self.max_length}")
            context = context or [self.prefix_token_id]  # of a prompt of spaces, which go to the continuation
            read = (context + continuation)[-(self.max_length + 1) : -1]
            groups.setdefault(tuple(read), []).append(index)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        for ids, indices in groups.items():
            table_NV = self._scorer.log_probabilities(ids)
            for index in indices:
                text, _, continuation = requests[index]
                rows = table_NV[-len(continuation) :]
                score = float(rows[np.arange(len(continuation)), continuation].sum())
                found[index] = score, bool((rows.argmax(-1) == continuation).all())
                if text is not None:
                    self.cache_hook.add_partial("loglikelihood", text, found[index])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, in windows that each see as much as the context holds."""
        totals = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(self.tok_encode(text), self.prefix_token_id, self.max_length, 1)
            parts = self._loglikelihood_tokens([(None, *make_disjoint_window(window)) for window in windows])
            totals.append(sum(score for score, _ in parts))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy texts up to the first of a request's stop sequences. InputError where it asks for sampling."""
        texts = []
        for prompt, asked in (request.args for request in requests):
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(asked, _MAX_GEN_TOKS))
            if kwargs["do_sample"] or kwargs.get("num_beams", 1) != 1:
                raise InputError(f"a task asks for {dict(asked)}: only greedy decoding is offered")
            most, room = kwargs["max_gen_toks"], self.max_length - kwargs["max_gen_toks"]
            if room < 1:
                raise InputError(f"a task generates {most} tokens, and the model reads {self.max_length} in all")
            stops = [stop for stop in handle_stop_sequences(kwargs["until"], TURN_END) if stop]
            texts.append(self._generate(self.tok_encode(prompt)[-room:], most, stops))
            self.cache_hook.add_partial("generate_until", (prompt, asked), texts[-1])
        return texts

    def _generate(self, ids: Sequence[int], most: int, stops: Sequence[str]) -> str:
        out: list[int] = []
        text = ""
        for token in self._scorer.model.generate(ids, most, self._scorer.tokenizer.stop_ids):
            out.append(token)
            text = self._scorer.decode(out)
            if any(stop in text for stop in stops):
                break
        return min((text.split(stop)[0] for stop in stops), key=len, default=text)
