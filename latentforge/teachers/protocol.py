"""What every source of targets offers, and what it declares that it can do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from latentforge.errors import RefusedError

if TYPE_CHECKING:
    from latentforge.kernels.targets import DenseTargets, TopKTargets
    from latentforge.targets.row import SequenceTargets

Tokens = npt.NDArray[np.int64]
Capability = Literal["score", "sample", "logits", "chat"]


@dataclass(frozen=True)
class TeacherIdentity:
    """Who answers: the same identity gives the same targets.

    ``model`` names the kind (its architecture; no path), ``sha256`` its content, ``quantization`` how its numbers are
    kept and computed (``float32``, ``gptq/float32``), ``tokenizer_sha256`` its tokenizer.json.
    """

    model: str
    sha256: str
    quantization: str
    tokenizer_sha256: str

    def as_json(self) -> dict[str, str]:
        """The value that a store of targets is made for."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: Mapping[str, str]) -> TeacherIdentity:
        """Read :meth:`as_json` back."""
        return cls(**{name: value[name] for name in ("model", "sha256", "quantization", "tokenizer_sha256")})


class Teacher(Protocol):
    """A source of targets.

    ``vocab_size`` counts real tokens; ``notes`` are sentences that a reader should see (padding that is masked).
    """

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this teacher can do: *score* given tokens, *sample*, dense *logits* at any T, *chat*."""
        ...

    @property
    def identity(self) -> TeacherIdentity:
        """Who answers."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of real tokens."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """What the reader of a run should know about this teacher."""
        ...

    def targets(self, tokens: Tensor, *, temperature: float, k: int | None = None) -> DenseTargets | TopKTargets:
        """Targets for ``tokens`` int64 ``[B, L]``: N = B·(L-1) rows in row-major order, row (b, i) for token i + 1.

        ``k=None`` asks for dense targets where the teacher has the capability *logits*; else top-k with the exact tail
        at ``temperature``.
        """
        ...


@dataclass(frozen=True)
class Limits:
    """What :meth:`Scorer.score` can be asked for; None is no limit.

    ``max_k`` entries a row, ``max_tokens`` tokens a sequence, ``temperatures`` for which the tail can be said.
    """

    max_k: int | None
    max_tokens: int | None
    temperatures: tuple[float, ...] | None

    def check(self, *, k: int, tokens: int, temperatures: tuple[float, ...]) -> None:
        """Refuse, before anything is asked, a question that this teacher cannot answer."""
        if k < 1:
            raise RefusedError(f"score.k = {k}: at least one entry a row is needed")
        if self.max_k is not None and k > self.max_k:
            raise RefusedError(
                f"score.k = {k}: this teacher answers at most {self.max_k} entries a row",
                next=f"set score.k = {self.max_k} or less; or start the server with a larger --max-logprobs",
            )
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise RefusedError(
                f"data.sequence_length = {tokens} is longer than the teacher's {self.max_tokens} positions",
                next=f"set data.sequence_length = {self.max_tokens} or less",
            )
        for temperature in temperatures:
            check_temperature(temperature)
            if self.temperatures is not None and temperature not in self.temperatures:
                can = ", ".join(f"{t:g}" for t in self.temperatures)
                raise RefusedError(
                    f"temperature {temperature:g}: this teacher gives tails for T = {can} only",
                    next=f"set score.temperatures = [{can}], or score with a teacher in this process (hf)",
                )


class Scorer(Teacher, Protocol):
    """A teacher that scores given token ids, document by document, as a store of targets is filled.

    Every backend of the capability *score* has it: ``hf``, ``openai``, ``vllm``, ``store``, ``fixture``, and
    :class:`latentforge.teachers.cached.CachedTeacher` around any of them.
    """

    @property
    def limits(self) -> Limits:
        """What can be asked."""
        ...

    def score(
        self, sequences: Sequence[Tokens], *, k: int, temperatures: tuple[float, ...]
    ) -> Iterator[tuple[int, SequenceTargets]]:
        """Yield (index, targets) of each of ``sequences`` (int64 ``[L]``, L may differ) as soon as it is answered.

        In any order; ``targets`` has L - 1 rows, row i for token i + 1. A row may end in *absent* entries (id -1,
        logprob minus infinity) where the backend was asked for fewer than ``k``. A backend that computes in this
        process takes the sequences of one call as one batch, so pass it a batch at a time. Raises
        :class:`latentforge.teachers.failures.TeacherFailure`; what was yielded before stays true.
        """
        ...

    def close(self) -> None:
        """Give back connections, files and memory; twice is once."""
        ...


def behind(teacher: object) -> Iterator[Any]:
    """``teacher`` itself, then those that it stands before: a cache, a bridge, a way of drawing has one."""
    found = teacher
    while found is not None:
        yield found
        found = getattr(found, "teacher", None)


def check_tokens(tokens: Tensor, vocab_size: int) -> None:
    """Refuse tokens that are not ``[B, L]`` of at least two ids below ``vocab_size``."""
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise RefusedError(f"tokens have shape {list(tokens.shape)}; [B, L] with L of at least 2 is needed")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab_size:
        raise RefusedError(f"token ids {low}..{high} are outside the teacher's vocabulary of {vocab_size} tokens")


def check_temperature(temperature: float) -> None:
    """Refuse a temperature that is not a finite number above 0."""
    if not 0.0 < temperature < float("inf"):
        raise RefusedError(f"temperature {temperature} is not a finite number above 0")
