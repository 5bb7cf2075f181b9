"""A teacher that needs no model: its most likely next token is the token it was given last."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.noise import gumbel
from latentforge.kernels.targets import DenseTargets, TopKTargets
from latentforge.targets.continued import Ids
from latentforge.targets.row import SequenceTargets
from latentforge.targets.topk import sequence_rows, topk_rows
from latentforge.teachers.continuing import Contexts, Continuing
from latentforge.teachers.protocol import Capability, Limits, TeacherIdentity, Tokens, check_temperature, check_tokens

_PEAK = 8.0


class FixtureTeacher:
    """Deterministic targets for tests: row (b, i) peaks at token i of sequence b; the rest is a fixed pattern."""

    def __init__(self, vocab_size: int, *, tokenizer_sha256: str = "none") -> None:
        if vocab_size < 2:
            raise RefusedError(f"vocab_size = {vocab_size}: a teacher needs at least 2 tokens")
        self._vocab_size = vocab_size
        self._tokenizer_sha256 = tokenizer_sha256

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Scores, continues texts, and gives dense logits at any T."""
        return frozenset({"score", "sample", "logits"})

    @property
    def identity(self) -> TeacherIdentity:
        """The fixture and its vocabulary size; it has no files but those of the tokenizer that it was told of."""
        return TeacherIdentity("fixture", f"fixture-1-{self._vocab_size}", "float32", self._tokenizer_sha256)

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self._vocab_size

    @property
    def notes(self) -> tuple[str, ...]:
        """One sentence: this is no model."""
        return ("the fixture teacher repeats the last token; it is no model",)

    @property
    def limits(self) -> Limits:
        """Any T, any length; as many entries as there are tokens."""
        return Limits(self._vocab_size, None, None)

    def logits(self, tokens: Tensor) -> Tensor:
        """Dense logits float32 ``[B·(L-1), V]`` for ``tokens`` int64 ``[B, L]``."""
        check_tokens(tokens, self._vocab_size)
        last = tokens[:, :-1].reshape(-1, 1)
        other = torch.arange(self._vocab_size, dtype=torch.int64, device=tokens.device)
        # In [0, 4): below the peak for every token, different for each pair.
        pattern = ((last * 31 + other * 17) % 64).to(torch.float32) / 16.0
        return pattern.scatter_(1, last, _PEAK)

    def targets(self, tokens: Tensor, *, temperature: float, k: int | None = None) -> DenseTargets | TopKTargets:
        """Dense targets, or top-k with the exact tail at ``temperature`` where ``k`` is given."""
        check_temperature(temperature)
        logits = self.logits(tokens)
        if k is None:
            return DenseTargets(logits)
        ids, logprobs, tails = topk_rows(logits, k, [temperature])
        return TopKTargets(ids, logprobs, tails[float(temperature)])

    def score(
        self, sequences: Sequence[Tokens], *, k: int, temperatures: tuple[float, ...]
    ) -> Iterator[tuple[int, SequenceTargets]]:
        """Targets of each sequence, in order."""
        for number, tokens in enumerate(sequences):
            logits = self.logits(torch.from_numpy(np.asarray(tokens)).unsqueeze(0))
            yield number, sequence_rows(*topk_rows(logits, k, temperatures), sequences=1)[0]

    def continuations(self, sequences: Sequence[Tokens], asked: Continuing) -> Iterator[tuple[int, dict[float, Ids]]]:
        """The chunks drawn after each chunk of each sequence, in order (see :class:`Continuer`)."""
        for number, tokens in enumerate(sequences):
            row = Contexts.of(tokens, asked)
            drawn = {t: self._chunks(row, tokens, t, asked) for t in asked.temperatures}
            yield number, row.spread(drawn, tokens, asked)

    def _chunks(self, row: Contexts, tokens: Tokens, temperature: float, asked: Continuing) -> npt.NDArray[np.int64]:
        """What is drawn after each context, int64 [R, contexts, K]."""
        if not len(row.chunks):
            return np.empty((asked.count, 0, asked.chunk), np.int64)
        key = torch.tensor(asked.key(tokens, temperature))
        last = torch.from_numpy(row.text[row.ends - 1]).expand(asked.count, -1)
        places = []
        for place in range(asked.chunk):
            # This teacher looks at the last token alone.
            asked_of = torch.stack([last.flatten(), torch.zeros_like(last).flatten()], dim=1)
            logits = self.logits(asked_of).view(*last.shape, -1)
            positions = torch.from_numpy(asked.positions(row.chunks, place))[..., None]
            last = (logits / temperature + gumbel(key, positions, torch.arange(self._vocab_size))).argmax(-1)
            places.append(last)
        return np.asarray(torch.stack(places, dim=-1).numpy())

    def close(self) -> None:
        """Nothing is held."""
