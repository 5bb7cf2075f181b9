"""What a latent student is taught by a batch: its chunks, what a teacher went on with, a teacher's rows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.kernels.targets import Targets
from latentforge.spec.latent import LatentSpec
from latentforge.students.latent.chunks import chunked, valid
from latentforge.students.latent.codec import Codec
from latentforge.students.latent.original import VectorSignal
from latentforge.students.latent.signals import continuation_signal, text_signal
from latentforge.students.latent.student import EnergySignal, TokenSignal, predicted
from latentforge.targets.continuations import ContinuationStore
from latentforge.teachers.store import StoreTeacher

TEXT, SAMPLE, TEMPERED = "text", "sample", "tempered"


def row_seeds(seed: int, step: int, rows: int) -> Tensor:
    """The seeds of the noise of a step's rows, int64 [rows]: of ``seed``, ``step`` and place alone, so that a resumed
    run, and one of other micro-batches, draws the same. ``step`` -1 is the held-out text's.
    """
    keys = (hashlib.sha256(f"latent noise {seed} {step} {row}".encode()).digest() for row in range(rows))
    return torch.tensor([int.from_bytes(key[:8], "big") >> 1 for key in keys])


@dataclass(frozen=True)
class Drawn:
    """Continuations int64 [B, C-1, r, K] of a batch's rows where ``given`` bool [B, C-1], drawn at ``temperature``."""

    ids: Tensor
    given: Tensor
    temperature: float


@dataclass(frozen=True)
class Lesson:
    """Some rows of a batch as ``LatentStudent.forward`` takes them."""

    chunks: Tensor
    valid: Tensor
    seeds: Tensor
    energy: dict[str, EnergySignal]
    tokens: TokenSignal | None
    vector: VectorSignal | None

    @property
    def teaches(self) -> bool:
        """Whether there is a signal in it: rows that nothing was drawn for may have none."""
        return bool(self.energy) or self.tokens is not None or self.vector is not None


@dataclass(frozen=True)
class Counts:
    """What a whole batch has: ``tokens`` in the ``chunks`` that are predicted, ``padding`` places beside them, and the
    chunks of each energy signal by name."""

    tokens: int
    chunks: int
    padding: int
    energy: dict[str, int]

    def of(self, part: str) -> int:
        """What the mean of a part of the loss is over."""
        return self.energy.get(part, self.chunks if part == "mse" else self.tokens)


class Teaching:
    """The signals of a run, each switched on by its weight.

    ``rows`` are a teacher's stored rows, ``continued`` its continuations of the first ``covered`` training rows (None:
    of all) and of the held-out ones; ``notes`` are sentences about both for the log.
    """

    def __init__(
        self,
        spec: LatentSpec,
        codec: Codec,
        *,
        eos_id: int,
        kernel: str,
        rows: StoreTeacher | None,
        continued: ContinuationStore | None,
        covered: int | None,
        notes: tuple[str, ...] = (),
    ) -> None:
        self.spec, self.codec, self.eos_id, self.kernel = spec, codec, eos_id, kernel
        self.rows, self.continued, self.covered, self.notes = rows, continued, covered, notes
        self.weights: dict[str, float] = {}
        self.temperatures: dict[str, float] = {}
        if spec.text_weight > 0:
            self.weights[TEXT] = spec.text_weight
        if spec.sample_weight > 0:
            self.weights[SAMPLE], self.temperatures[SAMPLE] = spec.sample_weight, 1.0
        if spec.tempered_weight > 0:
            assert continued is not None
            below = [one for one in continued.made.temperatures if one < 1.0]
            for one in below:
                # All of them at each visit: one head learns every temperature, and none comes more often.
                self.weights[f"{TEMPERED}_{one}"] = spec.tempered_weight / len(below)
                self.temperatures[f"{TEMPERED}_{one}"] = one
        self.used = 0
        if self.temperatures:
            assert continued is not None
            self.used = spec.sample_continuations or continued.made.count

    @property
    def has_tokens(self) -> bool:
        """Whether the token head is trained."""
        return self.spec.token_ce_weight > 0 or self.spec.token_kd_weight > 0

    @property
    def decodes(self) -> bool:
        """Whether a drawn latent is held to tokens."""
        return self.spec.ce_weight > 0 or self.spec.kl_weight > 0

    @property
    def has_vector(self) -> bool:
        """Whether there is a signal of the first LatentForge: a latent is drawn for it."""
        return self.spec.mse_weight > 0 or self.decodes

    @property
    def parts(self) -> frozenset[str]:
        """The parts of the loss that are switched on, by name."""
        others = ("token_ce", "token_kd", "mse", "ce", "kl")
        return frozenset({*self.weights, *(name for name in others if self.weight_of(name) > 0)})

    def weight_of(self, part: str) -> float:
        """The weight of a part of the loss by its name."""
        return self.weights[part] if part in self.weights else float(getattr(self.spec, f"{part}_weight"))

    def continued_share(self, rows: int) -> float:
        """The share of ``rows`` training rows that were continued."""
        return 1.0 if self.covered is None else self.covered / rows

    def drawn(self, tokens: Tensor, *, visits: Tensor | None = None, covered: Tensor | None = None) -> dict[str, Drawn]:
        """The continuations of ``tokens`` int64 [B, L] by signal: those whose turn it is, ``used`` of each context.

        ``visits`` int64 [B] says how often each row was here before (None: never), so that all of its continuations are
        used before one comes again; ``covered`` bool [B] which rows were continued (None: all).
        """
        if not self.temperatures:
            return {}
        assert self.continued is not None  # a signal of continuations was switched on: open_teaching opened them
        made = self.continued.made
        size = (len(tokens), tokens.shape[1] // made.chunk - 1)
        there = torch.ones(len(tokens), dtype=torch.bool) if covered is None else covered
        at = there.nonzero().squeeze(-1).to(tokens.device)
        told = self.continued.of_each(tokens[at], list(self.temperatures.values())) if len(at) else {}
        first = torch.zeros(len(tokens), dtype=torch.int64) if visits is None else visits
        turns = (first[:, None] * self.used + torch.arange(self.used)) % made.count
        whose = turns.to(tokens.device)[at, None, :, None].expand(-1, size[1], -1, made.chunk)
        found: dict[str, Drawn] = {}
        for name, temperature in self.temperatures.items():
            ids = torch.full((*size, self.used, made.chunk), self.eos_id, device=tokens.device)
            given = torch.zeros(size, dtype=torch.bool, device=tokens.device)
            if len(at):
                ids[at], given[at] = told[temperature].ids.gather(2, whose), told[temperature].given
            found[name] = Drawn(ids, given, temperature)
        return found

    def counts(self, tokens: Tensor, drawn: dict[str, Drawn]) -> Counts:
        """What of a whole batch ``tokens`` int64 [B, L] goes into each signal."""
        chunks = chunked(tokens, self.codec.shape.chunk)
        there = valid(chunks, self.eos_id)
        places = there[:, 1:]
        count, chunks_here = int(places.sum()), int(predicted(there).sum())
        each = {TEXT: chunks_here} if TEXT in self.weights else {}
        each |= {name: int(one.given.sum()) for name, one in drawn.items()}
        return Counts(count, chunks_here, places.numel() - count, each)

    def lesson(
        self, tokens: Tensor, seeds: Tensor, drawn: dict[str, Drawn], counts: Counts, *, together: bool = False
    ) -> Lesson:
        """The signals of ``tokens`` int64 [b, L], some rows of a batch, divided by what the batch's ``counts`` say.

        Several processes train ``together``: each pass then has every signal that the batch has, with or without a row
        of it here, since they wait for each other in every layer.
        """
        chunks = chunked(tokens, self.codec.shape.chunk)
        there = valid(chunks, self.eos_id)
        energy: dict[str, EnergySignal] = {}
        if TEXT in self.weights:
            energy[TEXT] = text_signal(
                self.codec, chunks, there, denominator=counts.energy[TEXT], weight=self.weights[TEXT]
            )
        for name, one in drawn.items():
            if not (counts.energy[name] if together else bool(one.given.any())):
                continue  # nothing here was continued
            told = None if one.temperature == 1.0 else torch.full(one.given.shape, one.temperature)
            energy[name] = continuation_signal(
                self.codec,
                one.ids,
                valid(one.ids, self.eos_id),
                given=one.given,
                denominator=counts.energy[name],
                weight=self.weights[name],
                temperature=None if told is None else told.to(tokens.device),
            )
        targets = self._targets(tokens)
        tokens_told = self._token_signal(targets, counts)
        return Lesson(chunks, there, seeds, energy, tokens_told, self._vector(chunks, there, targets, counts))

    def lessons(
        self,
        tokens: Tensor,
        seeds: Tensor,
        drawn: dict[str, Drawn],
        counts: Counts,
        size: int,
        *,
        rows: slice = slice(None),
        together: bool = False,
    ) -> Iterator[Lesson]:
        """``rows`` of a batch, all if not given, in parts of at most ``size``."""
        first, last, _ = rows.indices(len(tokens))
        for at in range(first, last, size):
            part = slice(at, min(at + size, last))
            some = {name: Drawn(one.ids[part], one.given[part], one.temperature) for name, one in drawn.items()}
            yield self.lesson(tokens[part], seeds[part], some, counts, together=together)

    def _targets(self, tokens: Tensor) -> Targets | None:
        if self.rows is None:
            return None
        return self.rows.targets(tokens, temperature=self.spec.token_temperature)

    def _token_signal(self, targets: Targets | None, counts: Counts) -> TokenSignal | None:
        spec = self.spec
        if not self.has_tokens:
            return None
        return TokenSignal(
            targets if spec.token_kd_weight > 0 else None,
            counts.tokens,
            spec.token_ce_weight,
            spec.token_kd_weight,
            spec.token_temperature,
        )

    def _vector(self, chunks: Tensor, there: Tensor, targets: Targets | None, counts: Counts) -> VectorSignal | None:
        spec = self.spec
        if not self.has_vector:
            return None
        with torch.no_grad():
            found = self.codec.encode(chunks[:, 1:].flatten(0, 1), there[:, 1:].flatten(0, 1))
        given = predicted(there)
        return VectorSignal(
            self.codec,
            found.mean.unflatten(0, given.shape),
            given,
            targets,
            counts.chunks,
            counts.tokens,
            spec.mse_weight,
            spec.ce_weight,
            spec.kl_weight,
            spec.token_temperature,
        )
