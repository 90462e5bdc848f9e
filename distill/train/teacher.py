"""A white-box teacher beside the student: what a batch's targets are compared with, computed as training goes.

Nothing is stored. Shapes: N target tokens, D the teacher's width, V vocabulary.
"""

from __future__ import annotations

import torch

from distill import pretrained
from distill.checkpoint import weights_sha256
from distill.data.batches import Batch
from distill.errors import ConfigError
from distill.tokenizer import Tokenizer
from distill.train.config import TeacherSection
from distill.train.step import precision
from distill.train.targets import Dense, Target, sampled, top_k

_CHUNK = 256
"""Tokens whose whole distributions exist at one time."""


class OnlineTeacher:
    """A frozen model of the student's family."""

    def __init__(
        self, section: TeacherSection, tokenizer: Tokenizer, device: torch.device, seed: int, dtype: str = "fp32"
    ) -> None:
        """ConfigError where its tokenizer is not the student's."""
        assert section.folder is not None
        theirs = Tokenizer.from_file(f"{section.folder}/tokenizer.json")
        if theirs.sha256 != tokenizer.sha256:
            raise ConfigError(
                f"teacher.folder {section.folder}: its tokenizer is not the student's ({tokenizer.source}); "
                f"set target: aligned, or make a dataset of its text"
            )
        if section.target == "top_k" and section.k > tokenizer.vocab_size:
            raise ConfigError(f"teacher.k {section.k}: there are {tokenizer.vocab_size} ids")
        model = pretrained.from_pretrained(section.folder)
        self.sha256 = weights_sha256(model)
        self._model = model.to(device).eval().requires_grad_(False)
        self._head_VD = self._model.lm_head.weight[: tokenizer.vocab_size]  # rows from there on are padding
        self._section, self._dtype, self._seed = section, dtype, seed

    def __str__(self) -> str:
        k = "" if self._section.target == "dense" else f" {self._section.k}"
        return f"from {self._section.folder} beside the student, {self._section.target}{k}"

    @torch.no_grad()
    def dense(self, batch: Batch) -> Dense:
        """Its whole distributions."""
        with precision(self._dtype, batch.ids_T.device):
            hidden_TD = self._model.hidden(batch.ids_T[None], lengths=batch.lengths)[0]
        return Dense(hidden_TD.index_select(0, batch.positions_N), self._head_VD)

    @torch.no_grad()
    def target(self, batch: Batch) -> Target:
        """What the batch's targets are compared with. Draws depend on the seed and on the sequence alone."""
        whole = self.dense(batch)
        if self._section.target == "dense":
            return whole
        ends = torch.tensor(batch.lengths).cumsum(0)
        each = torch.bucketize(batch.positions_N.cpu(), ends, right=True).bincount(minlength=len(ends)).tolist()
        head_DV = self._head_VD.T.float()
        parts: list[Target] = []
        for record, sequence_ND in zip(batch.records, whole.hidden_NE.split(each)):
            generator = torch.Generator(sequence_ND.device)
            generator.manual_seed(self._seed * 1_000_003 + record)
            for chunk_ND in sequence_ND.float().split(_CHUNK):
                log_p_NV = (chunk_ND @ head_DV).log_softmax(1)
                if self._section.target == "top_k":
                    parts.append(top_k(log_p_NV, self._section.k))
                else:
                    parts.append(sampled(log_p_NV, self._section.k, generator))
        return type(parts[0])(*(torch.cat(columns) for columns in zip(*parts)))
