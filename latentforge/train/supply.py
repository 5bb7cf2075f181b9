"""The teacher's targets as the training loop is given them: asked for once, counted, and never made up."""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets
from latentforge.students.causal import RowUse
from latentforge.targets.row import SequenceTargets
from latentforge.teachers.failures import RETRIED, TeacherFailure
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.protocol import Scorer, behind
from latentforge.teachers.store import StoreTeacher
from latentforge.train.loop import Lesson

OnLoss = Literal["stop", "degrade"]

LOSSES = RETRIED | {"unauthorized", "model-not-found", "budget"}
"""Failures that mean a teacher who is gone. Any other is an answer that cannot be trusted, and always stops the run."""

_LONGEST_REST = 64


class Supply:
    """One teacher's targets at the training temperature.

    ``k`` None asks for dense logits of ``width`` columns; else for top-k rows. With ``on_loss`` "degrade" a teacher
    that is lost leaves sequences without targets, and :meth:`lessons` gives them for cross-entropy alone with the
    weight ``ce_alone``; with "stop" its failure is raised. After a failure the teacher is left alone for 1, 2, 4, … at
    most 64 batches, since each question to a dead one costs all its retries. Called from one thread at a time or from
    several; :attr:`notes` are sentences for the log, to be taken by the thread that writes it.
    """

    def __init__(
        self,
        source: Scorer,
        *,
        temperature: float,
        k: int | None,
        width: int,
        on_loss: OnLoss,
        ce_alone: float,
        live: bool = True,
    ) -> None:
        self.source = source
        self.temperature = float(temperature)
        self.k = k
        self.width = width
        self.on_loss: OnLoss = on_loss
        self.ce_alone = ce_alone
        self.live = live
        self.notes: deque[str] = deque()
        self._resting = 0
        self._rest = 0
        self._known: dict[bytes, SequenceTargets] = {}

    @property
    def stored(self) -> bool:
        """Whether the targets are those of a score run."""
        return isinstance(self.source, StoreTeacher)

    @property
    def elsewhere(self) -> bool:
        """Whether the teacher is asked over a wire, or by a process of its own: it can be waited for, and be lost."""
        return self.k is not None and not self.stored

    def targets(self, tokens: Tensor) -> Targets:
        """The targets of all rows of ``tokens`` int64 [B, L], on their device; TeacherFailure where one is missing."""
        if self.k is None:
            return self._dense(tokens)
        if isinstance(self.source, StoreTeacher):
            return self.source.targets(tokens, temperature=self.temperature, k=self.k)
        found, failure = self._ask(tokens)
        if failure is not None:
            raise failure
        return stack_rows([one for one in found if one is not None], self.temperature, tokens.device)

    def held_out(self, tokens: Tensor) -> Targets:
        """As :meth:`targets`, for rows that are asked for again and again: a teacher elsewhere is asked once."""
        if not self.elsewhere:
            return self.targets(tokens)
        rows = tokens.cpu().numpy()
        keys = [hashlib.sha256(row.tobytes()).digest() for row in rows]
        unknown = [number for number, key in enumerate(keys) if key not in self._known]
        if unknown:
            found, failure = self._ask(tokens[unknown])
            for number, one in zip(unknown, found, strict=True):
                if one is not None:
                    self._known[keys[number]] = one
            if failure is not None:
                raise failure
        return stack_rows([self._known[key] for key in keys], self.temperature, tokens.device)

    def ask(self, tokens: Tensor) -> list[SequenceTargets | None]:
        """What a teacher elsewhere says of each of ``tokens`` int64 [B, L]: None for one that it was lost for."""
        if self._resting:
            self._resting -= 1
            return [None] * len(tokens)
        found, failure = self._ask(tokens)
        if failure is None:
            if self._rest:
                self.notes.append("the teacher answers again")
            self._rest = 0
            return found
        if self.on_loss == "stop" or failure.kind not in LOSSES:
            raise failure
        self._rest = min(2 * self._rest or 1, _LONGEST_REST)
        self._resting = self._rest
        missing = sum(one is None for one in found)
        self.notes.append(
            f"the teacher is lost ({failure}): {missing} of {len(tokens)} sequences, and the next {self._rest} "
            "batches, are trained on cross-entropy alone"
        )
        return found

    def lessons(self, tokens: Tensor, size: int) -> Iterator[Lesson]:
        """``tokens`` int64 [B, L] in parts of at most ``size`` sequences, each with what targets could be had for it.

        A teacher elsewhere is asked for all of them at once; one in this process for each part when it comes.
        """
        if not self.elsewhere:
            for part in tokens.split(size):
                yield Lesson(part, self.targets(part))
            return
        found = self.ask(tokens)
        for at in range(0, len(tokens), size):
            yield self.lesson(tokens[at : at + size], found[at : at + size])

    def lesson(self, tokens: Tensor, found: Sequence[SequenceTargets | None]) -> Lesson:
        """Sequences int64 [n, L] with their targets; those that have none are for cross-entropy alone."""
        given = [one for one in found if one is not None]
        targets = stack_rows(given, self.temperature, tokens.device) if given else None
        answered = torch.tensor([one is not None for one in found], device=tokens.device)
        taught = answered.repeat_interleave(tokens.shape[1] - 1)
        if bool(taught.all()):
            return Lesson(tokens, targets)
        return Lesson(tokens, targets, RowUse(torch.ones_like(taught), taught, self.ce_alone))

    def give_up(self) -> None:
        """Ask nothing more; what another thread is asking fails at once. Only of a teacher elsewhere.

        What stands before it (a cache, a bridge) stays open: it keeps the answers that have come.
        """
        *_, teacher = behind(self.source)
        teacher.close()

    def metrics(self) -> dict[str, Any]:
        """What the teacher counted of itself, each name with ``teacher_`` before it; empty where it counts nothing."""
        counted = getattr(self.source, "metrics", None)
        return {} if counted is None else {f"teacher_{name}": value for name, value in counted().items()}

    def _dense(self, tokens: Tensor) -> DenseTargets:
        if isinstance(self.source, HFTeacher):
            found = self.source.targets(tokens, temperature=self.temperature, width=self.width)
        else:
            found = self.source.targets(tokens, temperature=self.temperature)
        assert isinstance(found, DenseTargets)
        return found

    def _ask(self, tokens: Tensor) -> tuple[list[SequenceTargets | None], TeacherFailure | None]:
        assert self.k is not None
        found: list[SequenceTargets | None] = [None] * len(tokens)
        try:
            asked = list(tokens.cpu().numpy())
            for number, targets in self.source.score(asked, k=self.k, temperatures=(self.temperature,)):
                found[number] = targets
        except TeacherFailure as failure:
            return found, failure
        return found, None


def stack_rows(found: list[SequenceTargets], temperature: float, device: torch.device) -> TopKTargets:
    """The rows of several sequences as one batch's; where some have fewer entries, the rest of theirs is absent."""
    k = max(one.ids.shape[1] for one in found)
    ids = np.concatenate([_widened(one.ids, k, -1) for one in found])
    logprobs = np.concatenate([_widened(one.logprobs, k, -np.inf) for one in found])
    tail = np.concatenate([one.tails[temperature] for one in found])
    tensors = (torch.from_numpy(np.ascontiguousarray(values)).to(device) for values in (ids, logprobs, tail))
    return TopKTargets(*tensors)


def _widened(values: Any, k: int, absent: float) -> Any:
    if values.shape[1] == k:
        return values
    return np.pad(values, ((0, 0), (0, k - values.shape[1])), constant_values=absent)
