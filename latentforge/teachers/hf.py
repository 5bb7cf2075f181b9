"""A transformers model in this process: dense logits at any temperature."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import RefusedError
from latentforge.kernels.targets import DenseTargets, TopKTargets
from latentforge.targets.continued import Ids
from latentforge.targets.row import SequenceTargets
from latentforge.targets.topk import sequence_rows, topk_rows
from latentforge.teachers.continuing import Continuing
from latentforge.teachers.folder import ModelFolder, check_model_folder
from latentforge.teachers.loading import Dtype, Kept, load_model
from latentforge.teachers.protocol import Capability, Limits, TeacherIdentity, Tokens, check_temperature, check_tokens

if TYPE_CHECKING:
    from latentforge.teachers.precision import PrecisionChoice


class HFTeacher:
    """Any causal LM folder that transformers loads. Never trained: parameters take no gradient, the mode is eval."""

    def __init__(
        self,
        model: Any,
        folder: ModelFolder,
        tokenizer: Tokenizer,
        dtype: Dtype,
        kept: Kept = "plain",
        choice: PrecisionChoice | None = None,
    ) -> None:
        self.model = model
        self.folder = folder
        self.tokenizer = tokenizer
        self.dtype = dtype
        self.kept = kept
        self.choice = choice
        self.rows = int(model.get_output_embeddings().weight.shape[0])
        if self.rows < tokenizer.vocab_size:
            raise RefusedError(
                f"teacher {folder.path} answers for {self.rows} ids, its tokenizer has {tokenizer.vocab_size} tokens"
            )

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        device: str = "cpu",
        dtype: Dtype = "float32",
        expand: bool = False,
        folder: ModelFolder | None = None,
        choice: PrecisionChoice | None = None,
    ) -> HFTeacher:
        """Check the folder, then load it from disk alone; no code from the folder is run, nothing is fetched.

        Computed in ``dtype``; a quantised folder is kept as it is where this machine computes with it, and expanded
        where it does not or where ``expand`` asks. ``folder`` is the same folder, checked before. ``choice`` says why
        it is computed so, where somebody chose (:func:`latentforge.teachers.precision.open_hf`).
        """
        folder = check_model_folder(Path(path)) if folder is None else folder
        tokenizer = Tokenizer.open(Path(path))
        loaded = load_model(folder, device=device, dtype=dtype, expand=expand)
        return cls(loaded.model, folder, tokenizer, dtype, loaded.kept, choice)

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Scores, continues texts, and gives dense logits at any T."""
        return frozenset({"score", "sample", "logits"})

    @property
    def identity(self) -> TeacherIdentity:
        """Architecture, content digest, how its numbers are kept and computed, and tokenizer."""
        method = self.folder.quantization
        numbers = self.dtype if method is None else f"{method}/{self.dtype}"
        return TeacherIdentity(self.folder.architecture, self.folder.sha256, numbers, self.tokenizer.sha256)

    @property
    def vocab_size(self) -> int:
        """Number of real tokens: ids from there on are padding rows and masked."""
        return self.tokenizer.vocab_size

    @property
    def notes(self) -> tuple[str, ...]:
        """A sentence where the model has more rows than tokens, and where its weights are not kept as in the folder."""
        found = []
        if self.rows != self.vocab_size:
            padding = self.rows - self.vocab_size
            found.append(
                f"teacher has {self.rows} rows for {self.vocab_size} tokens: {padding} padding rows are masked"
            )
        if self.kept == "expanded":
            found.append(
                f"teacher's {self.folder.quantization} weights are expanded to {self.dtype}: they keep their rounding, "
                "not their size"
            )
        return tuple(found)

    @property
    def limits(self) -> Limits:
        """Any T; as many entries as there are tokens; as many tokens as the model has positions."""
        return Limits(self.vocab_size, self.folder.max_positions, None)

    @torch.no_grad()
    def logits(self, tokens: Tensor, *, width: int | None = None) -> Tensor:
        """Dense logits ``[B·(L-1), width]`` for ``tokens`` int64 ``[B, L]``; row (b, i) predicts token i + 1.

        Padding is minus infinity. ``width`` (the student's rows; the teacher's own by default) may cut or add padding
        only. Computed in the model's dtype.
        """
        check_tokens(tokens, self.vocab_size)
        limit = self.folder.max_positions
        if limit is not None and tokens.shape[1] - 1 > limit:
            raise RefusedError(f"sequences of {tokens.shape[1]} tokens are longer than the teacher's {limit} positions")
        width = self.rows if width is None else width
        if width < self.vocab_size:
            raise RefusedError(f"logits of {width} columns cannot hold the teacher's {self.vocab_size} tokens")
        answer = self.model(input_ids=tokens[:, :-1].to(self.model.device), use_cache=False).logits
        flat: Tensor = answer.reshape(-1, answer.shape[-1])
        if width == self.rows:
            flat[:, self.vocab_size :] = float("-inf")
            return flat
        resized = flat.new_full((flat.shape[0], width), float("-inf"))
        resized[:, : self.vocab_size] = flat[:, : self.vocab_size]
        return resized

    def targets(
        self, tokens: Tensor, *, temperature: float, k: int | None = None, width: int | None = None
    ) -> DenseTargets | TopKTargets:
        """Dense targets, or top-k with the exact tail at ``temperature`` where ``k`` is given."""
        check_temperature(temperature)
        if k is None:
            return DenseTargets(self.logits(tokens, width=width))
        ids, logprobs, tails = self.topk(tokens, k=k, temperatures=(temperature,))
        return TopKTargets(ids, logprobs, tails[float(temperature)])

    def topk(
        self, tokens: Tensor, *, k: int, temperatures: tuple[float, ...]
    ) -> tuple[Tensor, Tensor, dict[float, Tensor]]:
        """Top-k rows with tails at several temperatures from one forward pass (see :func:`topk_rows`)."""
        if not 1 <= k <= self.vocab_size:
            raise RefusedError(
                f"k = {k} is larger than the vocabulary ({self.vocab_size} tokens)", next="lower score.k"
            )
        return topk_rows(self.logits(tokens, width=self.vocab_size), k, temperatures)

    def score(
        self, sequences: Sequence[Tokens], *, k: int, temperatures: tuple[float, ...]
    ) -> Iterator[tuple[int, SequenceTargets]]:
        """Targets of each sequence, in order; neighbours of equal length are one forward pass."""
        for begin, end in equal_lengths(sequences):
            batch = torch.from_numpy(np.stack([np.asarray(tokens) for tokens in sequences[begin:end]]))
            ids, logprobs, tails = self.topk(batch, k=k, temperatures=temperatures)
            yield from enumerate(sequence_rows(ids, logprobs, tails, sequences=end - begin), start=begin)

    def continuations(self, sequences: Sequence[Tokens], asked: Continuing) -> Iterator[tuple[int, dict[float, Ids]]]:
        """The chunks drawn after each chunk of each sequence, in order (see :class:`Continuer`)."""
        from latentforge.teachers.hf_continuing import continue_rows

        yield from continue_rows(self, sequences, asked)

    def close(self) -> None:
        """Let the weights go."""
        self.model = None


def equal_lengths(sequences: Sequence[Tokens]) -> Iterator[tuple[int, int]]:
    """The runs ``[begin, end)`` of neighbouring sequences that have one length."""
    begin = 0
    for end in range(1, len(sequences) + 1):
        if end == len(sequences) or len(sequences[end]) != len(sequences[begin]):
            yield begin, end
            begin = end
