"""The fast reader of rows, where the extension is built; else the definition in numpy. Both give the same bits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

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
    return unpack if hasattr(module, "RowScale") else packing.unpack


def name() -> str:
    """``native`` or ``numpy``: which reader this process uses."""
    return "native" if reader() is unpack else "numpy"


def unpack(shape: packing.Shape, streams: packing.Contents, bits: packing.Content, levels: Levels) -> packing.Arrays:
    """``packing.unpack`` in C++ on one thread; ValueError where the body contradicts itself."""
    cells = shape.positions * shape.k
    ends = (cells, 2 * cells, 2 * cells + len(shape.temperatures) * shape.positions)
    # One piece of memory for all that a row is: each costs what unpacking several positions does.
    memory = np.empty(ends[2], np.int32)
    scale = _scale(levels, shape.temperatures)
    if not native().unpack_row(scale, *streams, bits, shape.positions, shape.k, shape.mixed, memory):
        raise ValueError("the body of a row contradicts itself")
    numbers = memory.view(np.float32)
    return (
        memory[: ends[0]].reshape(shape.positions, shape.k),
        numbers[ends[0] : ends[1]].reshape(shape.positions, shape.k),
        list(numbers[ends[1] :].reshape(len(shape.temperatures), shape.positions)),
    )


@cache
def _scale(levels: Levels, temperatures: tuple[float, ...]) -> Any:
    ceilings = [ceiling(t) for t in temperatures]
    return native().RowScale(levels.table, *levels.beyond, levels.first_step, ceilings, TAIL_STEP)
