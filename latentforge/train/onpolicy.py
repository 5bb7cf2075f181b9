"""The share of a run's batches whose text the student writes itself, for the teacher to judge (GKD)."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from latentforge.students.causal import RowUse, Student


@dataclass(frozen=True)
class OnPolicy:
    """How much of each batch is the student's own text: Agarwal et al. 2024, arXiv:2306.13649 (GKD).

    ``share`` of the sequences keep their beginning and are continued by the student: its ``tokens`` last tokens are
    drawn at ``temperature``. What is drawn depends on the student's weights, ``seed``, step and place in the batch
    alone, so a resumed run draws the same; ``kernel`` is the backend that draws.
    """

    share: float
    tokens: int
    temperature: float
    seed: int
    kernel: str = "auto"

    def count(self, step: int, batch_size: int) -> int:
        """How many sequences of the batch of ``step`` (from 0): their share of all steps until then, rounded down."""
        share = Fraction(self.share).limit_denominator(10**9)
        return int(share * batch_size * (step + 1)) - int(share * batch_size * step)

    def write(self, student: Student, tokens: Tensor, step: int, first: int) -> Tensor:
        """``tokens`` int64 [n, L] with their ends written by the student; they stand from place ``first`` on in the
        batch of ``step``. The student is left in training mode, and no generator of torch is touched.
        """
        places = range(first, first + len(tokens))
        seeds = torch.tensor([draw_seed(self.seed, step, place) for place in places], device=tokens.device)
        student.eval()
        written = student.sample(
            tokens[:, : -self.tokens], self.tokens, temperature=self.temperature, seeds=seeds, backend=self.kernel
        )
        student.train()
        return written

    def use(self, tokens: Tensor, ce_alone: float) -> RowUse:
        """Sequences int64 [n, L] that end in the student's text: the teacher's targets everywhere, labels before it."""
        n, length = tokens.shape
        labelled = torch.ones(n, length - 1, dtype=torch.bool, device=tokens.device)
        # Row i predicts token i + 1.
        labelled[:, length - 1 - self.tokens :] = False
        flat = labelled.reshape(-1)
        return RowUse(flat, torch.ones_like(flat), ce_alone)


def draw_seed(seed: int, step: int, place: int) -> int:
    """The seed, below 2^63, of one sequence's draws."""
    digest = hashlib.sha256(f"on-policy {seed} {step} {place}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def written_fields(text: Tensor, new_tokens: int, eos_id: int) -> dict[str, Any]:
    """What an event says of the student's text int64 [n, L]: its lengths up to its first end of text, its digest."""
    own = text[:, -new_tokens:].cpu()
    ends = own == eos_id
    lengths = torch.where(ends.any(1), ends.int().argmax(1) + 1, new_tokens).tolist()
    return {
        "on_policy_tokens": own.numel(),
        "on_policy_length_min": min(lengths),
        "on_policy_length_mean": round(sum(lengths) / len(lengths), 3),
        "on_policy_length_max": max(lengths),
        "on_policy_sha256": hashlib.sha256(own.numpy().tobytes()).hexdigest(),
    }
