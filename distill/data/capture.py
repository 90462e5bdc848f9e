"""A white-box teacher's distributions over completions, as the student's template renders them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np

from distill import chat
from distill.data.distributions import Distribution, capture
from distill.data.local_teachers import WhiteBox
from distill.data.schema import Record, completion_ids
from distill.errors import InputError


def teacher_distributions(
    box: WhiteBox, records: Iterable[Record], k: int, *, on_tokens: Callable[[int], None] = lambda n: None
) -> Iterator[Distribution]:
    """The teacher's distribution of each completion token, a record at a time: logits exist for one record only.

    `on_tokens` hears how many completion tokens each record had.
    """
    import torch

    for record in records:
        context = chat.encode(box.tokenizer, record.context, record.tools, add_generation_prompt=True).ids
        completion = completion_ids(record, box.tokenizer)
        limit = getattr(box.model.config, "max_position_embeddings", None)
        if limit and len(context) + len(completion) > limit:
            raise InputError(f"record {record.id}: {len(context) + len(completion)} tokens, the teacher reads {limit}")
        ids_1T = torch.tensor([context + completion], device=box.device)
        # the logits that predict completion token j stand one place before it
        before = torch.arange(len(completion), device=box.device) + len(context) - 1
        with torch.inference_mode():
            logits_NV = box.model(ids_1T, logits_to_keep=before, use_cache=False).logits[0]
            kept = capture(logits_NV[:, : box.tokenizer.vocab_size], k)  # rows beyond it are padding
        on_tokens(len(completion))
        yield Distribution(np.asarray(completion, np.int32), kept.ids, kept.logprobs, kept.tail)
