"""Two tokenizations of the same bytes, cut where both have a boundary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from latentforge.errors import RefusedError

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spans:
    """Aligned spans in order: span s is bytes ``[at[s, 0], at[s, 1])``, the teacher's tokens ``[teacher[s, 0],
    teacher[s, 1])`` and the student's ``[student[s, 0], student[s, 1])``; each int64 ``[S, 2]``.

    A span is the shortest stretch between two boundaries that both sides have, so no token is in two spans. Tokens of
    no bytes (a BOS that one side alone has) are in none.
    """

    at: Indices
    teacher: Indices
    student: Indices

    def __len__(self) -> int:
        return len(self.at)


def align(teacher: npt.NDArray[Any], student: npt.NDArray[Any]) -> Spans:
    """The spans of two rows of boundaries: int64 ``[n + 1]`` and ``[m + 1]``, byte offsets on one scale, ascending.

    ``boundaries[i]`` is where token i begins, the last one where the last token ends. The rows may begin and end at
    different bytes; what only one side covers is in no span.
    """
    for side, bounds in (("teacher", teacher), ("student", student)):
        if bounds.ndim != 1 or len(bounds) < 1 or (np.diff(bounds) < 0).any():
            raise RefusedError(f"the {side}'s boundaries are not one ascending row of offsets")
    common = np.intersect1d(teacher, student)
    begins, ends = common[:-1], common[1:]

    def tokens(bounds: npt.NDArray[Any]) -> Indices:
        # Of several boundaries at one byte a span begins at the last and ends at the first: empty tokens stay outside.
        first = np.searchsorted(bounds, begins, side="right") - 1
        return np.stack([first, np.searchsorted(bounds, ends, side="left")], axis=1).astype(np.int64)

    return Spans(np.stack([begins, ends], axis=1).astype(np.int64), tokens(teacher), tokens(student))


def boundaries(widths: npt.NDArray[Any], start: int = 0) -> Indices:
    """Offsets ``[n + 1]`` of tokens of ``widths`` bytes ``[n]`` of which the first begins at ``start``."""
    return np.concatenate([[start], start + np.cumsum(widths)]).astype(np.int64)
