"""Whether a latent student sees what it is to predict: one chunk is changed, and what changes before it is measured."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from latentforge.students.latent.student import LatentStudent


class Change(NamedTuple):
    """The largest change of a number in what comes before a changed place, and in what it may change; ``places`` is
    how many were tried."""

    before: float
    after: float
    places: int


@torch.no_grad()
def changes(student: LatentStudent, chunks: Tensor, valid: Tensor) -> Change:
    """Change each chunk but the first of rows int64 [B, C, K] to other tokens, and each token of it for the token head.

    Of states and of the token head's rows: those that predict the changed place and all before it are "before".
    ``valid`` bool [B, C, K] is the text's own, so that what is padding stays it.
    """
    student.eval()
    other = torch.where(valid, (chunks + 1) % student.shape.vocab_size, chunks)
    states = student.states(chunks, valid)
    before, after = 0.0, 0.0
    for place in range(1, chunks.shape[1]):
        changed = chunks.clone()
        changed[:, place] = other[:, place]
        apart = (student.states(changed, valid) - states).abs().float()
        before = _larger(before, apart[:, :place])
        after = _larger(after, apart[:, place:])
    if student.token_head is not None:
        given, text, swapped = states[:, :-1].flatten(0, 1), chunks[:, 1:].flatten(0, 1), other[:, 1:].flatten(0, 1)
        rows = student.token_rows(given, text)
        for place in range(student.shape.chunk):
            changed = text.clone()
            changed[:, place] = swapped[:, place]
            apart = (student.token_rows(given, changed) - rows).abs().float()
            before = _larger(before, apart[:, : place + 1])
            after = _larger(after, apart[:, place + 1 :])
    return Change(before, after, chunks.shape[1] - 1)


def _larger(known: float, apart: Tensor) -> float:
    """The larger of both; a change that is no number is the largest."""
    found = float(apart.max()) if apart.numel() else 0.0
    return known if known != known or found <= known else found
