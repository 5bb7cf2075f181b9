"""What every source of targets offers, and what it declares that it can do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from torch import Tensor

from latentforge.errors import RefusedError

if TYPE_CHECKING:
    from latentforge.kernels.targets import DenseTargets, TopKTargets

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
