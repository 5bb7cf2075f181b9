"""The fast reader of rows, where the extension is built; else the definition in numpy. Both give the same bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from latentforge.errors import LatentForgeError
from latentforge.kernels.native import native
from latentforge.targets import packing
from latentforge.targets.levels import TAIL_STEP, Levels, ceiling


@cache
def reader() -> packing.Reader:
    """:func:`unpack`, or ``packing.unpack`` where the extension is missing, stale or older than rows."""
    try:
        module = native()
    except LatentForgeError:
        return packing.unpack
    return unpack if hasattr(module, "unpack_row") else packing.unpack


def name() -> str:
    """``native`` or ``numpy``: which reader this process uses."""
    return "native" if reader() is unpack else "numpy"


def unpack(
    shape: packing.Shape, streams: packing.Streams, bits: npt.NDArray[np.uint8], levels: Levels
) -> packing.Arrays:
    """``packing.unpack`` in C++ on one thread; ValueError where the body contradicts itself."""
    cells, tails = shape.positions * shape.k, len(shape.temperatures) * shape.positions
    # One piece of memory: asking numpy for an address costs about as much as unpacking a position.
    memory = np.empty(2 * cells + tails, np.int32)
    begin = _address(memory)
    right = native().unpack_row(
        *(value for stream in (*streams, bits) for value in (_address(stream), len(stream))),
        shape.positions,
        shape.k,
        shape.mixed,
        len(shape.temperatures),
        *_table(levels),
        *levels.beyond,
        levels.first_step,
        _ceilings(shape.temperatures)[1],
        TAIL_STEP,
        begin,
        begin + 4 * cells,
        begin + 8 * cells,
    )
    if not right:
        raise ValueError("the body of a row contradicts itself")
    ids = memory[:cells].reshape(shape.positions, shape.k)
    logprobs = memory[cells : 2 * cells].view(np.float32).reshape(shape.positions, shape.k)
    return (
        ids,
        logprobs,
        list(memory[2 * cells :].view(np.float32).reshape(-1, shape.positions)) if tails else _none(shape),
    )


def _none(shape: packing.Shape) -> list[npt.NDArray[np.float32]]:
    return [np.empty(0, np.float32) for _ in shape.temperatures]


@cache
def _table(levels: Levels) -> tuple[int, int]:
    return _address(levels.table), len(levels.table)


@cache
def _ceilings(temperatures: tuple[float, ...]) -> tuple[npt.NDArray[np.float64], int]:
    values = np.array([ceiling(t) for t in temperatures])
    return values, _address(values)


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
