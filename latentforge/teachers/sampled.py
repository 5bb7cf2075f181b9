"""A teacher in this process whose rows are drawn from it, not cut at the top-k: unbiased at any number of draws."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.targets import TopKTargets
from latentforge.targets.row import SequenceTargets
from latentforge.targets.sampling import Sampling
from latentforge.targets.topk import sequence_rows
from latentforge.teachers.protocol import Capability, Limits, Scorer, TeacherIdentity, Tokens


class DenseScorer(Scorer, Protocol):
    """A teacher of the capability *logits*: ``hf``, ``fixture``."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Dense logits ``[B·(L-1), at least vocab_size]`` for ``tokens`` int64 ``[B, L]``."""
        ...


class SampledTeacher:
    """Scores by drawing: the rows of :class:`Sampling` from the dense logits of ``teacher``, which it closes.

    A sequence's draws depend on the seed, its tokens and its logits alone, so a store that is filled in pieces, in any
    order or batch, holds the same rows.
    """

    def __init__(self, teacher: Scorer, sampling: Sampling) -> None:
        if "logits" not in teacher.capabilities:
            raise RefusedError(
                f"rows are drawn from dense logits, and teacher {teacher.identity.model} gives none",
                next='set score.mode = "topk", or score with a teacher in this process (hf)',
            )
        self.teacher = cast(DenseScorer, teacher)
        self.sampling = sampling

    @property
    def capabilities(self) -> frozenset[Capability]:
        """The teacher's."""
        return self.teacher.capabilities

    @property
    def identity(self) -> TeacherIdentity:
        """The teacher's: how rows are drawn is said by what they are stored for."""
        return self.teacher.identity

    @property
    def vocab_size(self) -> int:
        """Number of real tokens."""
        return self.teacher.vocab_size

    @property
    def notes(self) -> tuple[str, ...]:
        """The teacher's, and how rows are drawn."""
        drawn = f"{self.sampling.draws} tokens a position are drawn from the teacher (seed {self.sampling.seed})"
        return (*self.teacher.notes, drawn)

    @property
    def limits(self) -> Limits:
        """T = 1, and rows as wide as there can be distinct tokens."""
        return Limits(self.width, self.teacher.limits.max_tokens, (1.0,))

    @property
    def width(self) -> int:
        """Entries a row, the only ``k`` that can be asked: a row with fewer would be biased."""
        return self.sampling.width(self.vocab_size)

    def logits(self, tokens: Tensor) -> Tensor:
        """The teacher's."""
        return self.teacher.logits(tokens)

    def targets(self, tokens: Tensor, *, temperature: float, k: int | None = None) -> TopKTargets:
        """Rows drawn for ``tokens`` int64 ``[B, L]``, on the device of the teacher's logits; T = 1."""
        self._check((float(temperature),), self.width if k is None else k)
        ids, logprobs = self._rows(tokens)
        return TopKTargets(ids, logprobs, torch.full_like(logprobs[:, 0], -torch.inf))

    def score(
        self, sequences: Sequence[Tokens], *, k: int, temperatures: tuple[float, ...]
    ) -> Iterator[tuple[int, SequenceTargets]]:
        """Drawn rows of each sequence, in order; neighbours of equal length are one forward pass."""
        from latentforge.teachers.hf import equal_lengths

        self._check(temperatures, k)
        for begin, end in equal_lengths(sequences):
            batch = torch.from_numpy(np.stack([np.asarray(tokens, dtype=np.int64) for tokens in sequences[begin:end]]))
            ids, logprobs = self._rows(batch)
            tails = {1.0: torch.full_like(logprobs[:, 0], -torch.inf)}
            yield from enumerate(sequence_rows(ids, logprobs, tails, sequences=end - begin), start=begin)

    def close(self) -> None:
        """Close the teacher."""
        self.teacher.close()

    def differs(self, tokens: Tokens, stored: SequenceTargets, position: int) -> float:
        """The share of a stored row's draws, 0 to 1, that would be other tokens if they were drawn again.

        Asked with the tokens up to ``position`` alone, so that the answer's last row cannot be another position's; the
        same noise is used, so that only the teacher's numbers differ.
        """
        logits = self.teacher.logits(torch.from_numpy(tokens[: position + 2]).unsqueeze(0))[-1:, : self.vocab_size]
        key = torch.tensor([self.sampling.key(tokens)], device=logits.device)
        ids, logprobs = self.sampling.rows(logits, key, torch.full_like(key, position))
        again = _shares(ids[0].cpu().numpy(), logprobs[0].cpu().numpy())
        kept = _shares(stored.ids[position], stored.logprobs[position])
        return 0.5 * sum(abs(again.get(n, 0.0) - kept.get(n, 0.0)) for n in {*again, *kept})

    def _rows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.teacher.logits(tokens)[:, : self.vocab_size]
        count = tokens.shape[1] - 1
        keys = torch.tensor([self.sampling.key(one) for one in tokens.cpu().numpy()], dtype=torch.int64)
        positions = torch.arange(count).repeat(len(tokens))
        return self.sampling.rows(logits, keys.repeat_interleave(count).to(logits.device), positions.to(logits.device))

    def _check(self, temperatures: tuple[float, ...], k: int) -> None:
        if temperatures != (1.0,):
            raise RefusedError(
                f"temperatures {list(temperatures)}: rows are drawn at T = 1, where their counts mean probabilities",
                next="set score.temperatures = [1.0]",
            )
        if k != self.width:
            raise RefusedError(
                f"k = {k}: a row of {self.sampling.draws} draws holds up to {self.width} distinct tokens, and one that "
                "was cut would be biased",
                next=f"ask for k = {self.width}",
            )


def _shares(ids: npt.NDArray[np.int32], logprobs: npt.NDArray[np.float32]) -> dict[int, float]:
    return {int(n): float(np.exp(v)) for n, v in zip(ids, logprobs, strict=True) if n >= 0}
