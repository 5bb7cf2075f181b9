"""A teacher that was scored before: its targets come from the store on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.targets import TopKTargets
from latentforge.targets.row import SequenceTargets
from latentforge.targets.store import TargetStore
from latentforge.teachers.protocol import (
    Capability,
    Limits,
    Scorer,
    TeacherIdentity,
    Tokens,
    check_temperature,
    check_tokens,
)


class StoreTeacher:
    """Targets that a score run wrote, for the temperatures whose tails it stored."""

    def __init__(self, store: TargetStore) -> None:
        self.store = store

    @classmethod
    def open(
        cls, path: Path, *, identity: TeacherIdentity | None = None, clock: Callable[[], float] = time.time
    ) -> StoreTeacher:
        """Open ``targets.sqlite`` for reading; refused where it was made for another teacher than ``identity``.

        ``clock`` (seconds since 1970) says which rows are too old.
        """
        asked = None if identity is None else identity.as_json()
        return cls(TargetStore.open(path, identity=asked, clock=clock))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.store.close()

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Scores only: what is not in the store cannot be asked."""
        return frozenset({"score"})

    @property
    def identity(self) -> TeacherIdentity:
        """The teacher that filled the store."""
        return TeacherIdentity.from_json(self.store.identity)

    @property
    def vocab_size(self) -> int:
        """Number of real tokens."""
        return self.store.vocab_size

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence: how coarse the rows are."""
        mass = self.store.stats()["tail_mass"]
        shown = ", ".join(f"{value:.1%} at T = {t}" for t, value in mass.items() if value is not None)
        if self.store.draws is not None:
            return (f"rows of {self.store.draws} drawn tokens from the store (seed {self.store.seed})",)
        return (f"top-{self.store.k} targets from the store; mass outside: {shown or 'no rows yet'}",)

    @property
    def limits(self) -> Limits:
        """What was stored: its entries a row and its temperatures."""
        return Limits(self.store.k, None, self.store.temperatures)

    def targets(self, tokens: Tensor, *, temperature: float, k: int | None = None) -> TopKTargets:
        """Top-k rows of ``tokens`` int64 ``[B, L]``, on the device of ``tokens``; a ``k`` below the stored is exact.

        Refused for a temperature without stored tails, a larger ``k`` and a sequence that was not scored.
        """
        temperature = float(temperature)
        self._check(k, (temperature,))
        check_tokens(tokens, self.vocab_size)
        found = self.store.get_many(tokens.detach().to("cpu").numpy())
        k = self.store.k if k is None else k
        rows = [self.narrowed(one, k=k, temperatures=(temperature,)) for one in found]
        return stacked(rows, temperature, tokens.device)

    def score(
        self, sequences: Sequence[Tokens], *, k: int, temperatures: tuple[float, ...]
    ) -> Iterator[tuple[int, SequenceTargets]]:
        """Stored targets of each sequence, in order; a smaller ``k`` is exact, a sequence without a row is refused."""
        self._check(k, temperatures)
        for number, tokens in enumerate(sequences):
            yield number, self.narrowed(self.store.get(tokens), k=k, temperatures=temperatures)

    def metrics(self) -> dict[str, Any]:
        """Of its answers, all came from the store: a sequence that is not there is refused."""
        return {"hit_rate": 1.0}

    def narrowed(self, found: SequenceTargets, *, k: int, temperatures: tuple[float, ...]) -> SequenceTargets:
        """A stored row's first ``k`` entries and some of its temperatures: what is cut off counts to the outside."""
        self._check(k, temperatures)
        tails = {t: found.tails[t] for t in temperatures}
        if k == found.ids.shape[1]:
            return SequenceTargets(found.ids, found.logprobs, tails)
        tails = {t: _longer_tail(found.logprobs[:, k:], tail, t) for t, tail in tails.items()}
        ids, logprobs = np.ascontiguousarray(found.ids[:, :k]), np.ascontiguousarray(found.logprobs[:, :k])
        return SequenceTargets(ids, logprobs, tails)

    def close(self) -> None:
        """Close the store."""
        self.store.close()

    def _check(self, k: int | None, temperatures: tuple[float, ...]) -> None:
        for temperature in temperatures:
            check_temperature(temperature)
            if temperature not in self.store.temperatures:
                stored = ", ".join(f"{t:g}" for t in self.store.temperatures)
                raise RefusedError(
                    f"temperature = {temperature:g}: tails are stored for T = {stored} only",
                    next=f'add {temperature:g} to score.temperatures, or set distill.targets = "live"',
                )
        if k is not None and not 1 <= k <= self.store.k:
            raise RefusedError(f"k = {k}: the store holds {self.store.k} entries a row", next="raise score.k")
        if k is not None and k != self.store.k and self.store.draws is not None:
            raise RefusedError(
                f"k = {k}: the store holds drawn rows of {self.store.k} entries, and one that was cut would be biased",
                next=f"ask for k = {self.store.k}",
            )


def scored_batch(teacher: Scorer, tokens: Tensor, *, temperature: float, k: int) -> TopKTargets:
    """What ``teacher`` scores of ``tokens`` int64 ``[B, L]`` as one batch, on the device of ``tokens``."""
    check_temperature(temperature)
    check_tokens(tokens, teacher.vocab_size)
    rows = list(tokens.detach().to("cpu").numpy())
    found = dict(teacher.score(rows, k=k, temperatures=(float(temperature),)))
    return stacked([found[number] for number in range(len(rows))], float(temperature), tokens.device)


def stacked(found: Sequence[SequenceTargets], temperature: float, device: torch.device) -> TopKTargets:
    """The rows of several sequences as one batch, row-major."""
    return TopKTargets(
        torch.from_numpy(np.concatenate([one.ids for one in found])).to(device),
        torch.from_numpy(np.concatenate([one.logprobs for one in found])).to(device),
        torch.from_numpy(np.concatenate([one.tails[temperature] for one in found])).to(device),
    )


def _longer_tail(
    dropped: npt.NDArray[np.float32], tail: npt.NDArray[np.float32], temperature: float
) -> npt.NDArray[np.float32]:
    """The tail with the dropped entries added: log(exp(tail) + Σ exp(dropped / T)), in float64."""
    scaled = dropped.astype(np.float64) / temperature
    # A row may end in absent entries: minus infinity, the whole of what is dropped too.
    top = np.maximum(scaled.max(axis=1), np.finfo(np.float64).min)
    with np.errstate(divide="ignore"):
        inside = top + np.log(np.exp(scaled - top[:, None]).sum(axis=1))
    longer: npt.NDArray[np.float32] = np.logaddexp(inside, tail.astype(np.float64)).astype(np.float32)
    return longer
