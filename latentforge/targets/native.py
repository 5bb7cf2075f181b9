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
    ids = np.empty((shape.positions, shape.k), np.int32)
    logprobs = np.empty((shape.positions, shape.k), np.float32)
    tails = np.empty((len(shape.temperatures), shape.positions), np.float32)
    ceilings = np.array([ceiling(t) for t in shape.temperatures])
    right = native().unpack_row(
        *(value for stream in (*streams, bits) for value in (_address(stream), len(stream))),
        shape.positions,
        shape.k,
        shape.mixed,
        len(shape.temperatures),
        _address(levels.table),
        len(levels.table),
        *levels.beyond,
        levels.first_step,
        _address(ceilings),
        TAIL_STEP,
        _address(ids),
        _address(logprobs),
        _address(tails),
    )
    if not right:
        raise ValueError("the body of a row contradicts itself")
    return ids, logprobs, list(tails)


def _address(array: npt.NDArray[Any]) -> int:
    return int(array.__array_interface__["data"][0])
