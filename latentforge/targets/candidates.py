"""The token ids of a sequence's rows: a list of those that occur, and each entry's place in it."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from latentforge.targets.integers import DIRECT


def listed(ids: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """``(gaps [U], places [n])`` of ids ``[n]``.

    A sequence of 128 tokens has 6350 candidates at k = 50, of which a third differ. Those that occur most often come
    first, in groups of 16, 16, 32, 64, …: places of one group have the same token (see ``integers``), so inside a group
    the order says nothing, and its ids stand in ascending order as gaps.
    """
    unique, inverse, counts = np.unique(ids, return_inverse=True, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    chosen = [np.sort(order[begin:end]) for begin, end in groups(len(unique))]
    gaps = [np.diff(unique[group], prepend=-1) - 1 for group in chosen]
    place = np.empty(len(unique), np.int64)
    place[np.concatenate([*chosen, np.empty(0, np.int64)]).astype(np.int64)] = np.arange(len(unique))
    return np.concatenate([*gaps, np.empty(0, np.int64)]).astype(np.int64), place[inverse]


def from_list(gaps: npt.NDArray[Any]) -> npt.NDArray[np.int32]:
    """The ids int32 ``[U]`` by place."""
    ids = np.empty(len(gaps), np.int64)
    for begin, end in groups(len(gaps)):
        ids[begin:end] = np.cumsum(gaps[begin:end].astype(np.int64) + 1) - 1
    return ids.astype(np.int32)


def groups(n: int) -> list[tuple[int, int]]:
    """Begin and end of each group of ``n`` places."""
    edges = [0]
    while edges[-1] < n:
        edges.append(max(DIRECT, 2 * edges[-1]))
    return [(begin, min(end, n)) for begin, end in pairwise(edges)]
