"""Tiles of the kernels: which are worth trying, and which is taken where nothing has been measured.

Nothing is tuned, neither at run time nor by the warm-up guard: the static table is what runs and what the guard proves.
CANDIDATES are tiles worth measuring by hand, as ``config``; a tile is part of what determines the bits of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """``block`` elements of a row at a time by ``warps`` of 32 threads of at most ``registers``.

    Without that number the assembler may save a register for one more program an SM and spill another.
    """

    block: int
    warps: int
    registers: int = 128

    def launch(self) -> dict[str, int | bool]:
        """The options of a launch; everything that alters the code is said, nothing is left to Triton's defaults."""
        return {
            "BLOCK": self.block,
            "num_warps": self.warps,
            "num_stages": 1,
            "enable_fp_fusion": True,
            "maxnreg": self.registers,
        }


# 8 elements a thread are 16 bytes of bf16, one load; more threads hide more latency, fewer leave more programs an SM.
CANDIDATES = {
    "kd_dense": (Config(2048, 8), Config(4096, 16), Config(1024, 4)),
    "kd_topk": (Config(2048, 8), Config(4096, 16), Config(1024, 4), Config(4096, 8)),
}

# By kernel and by the major and minor number of the device; None is any other (and the interpreter, where a large
# block is simply fewer steps of Python).
STATIC: dict[str, dict[tuple[int, int] | None, Config]] = {
    "kd_dense": {None: Config(2048, 8)},
    "kd_topk": {None: Config(2048, 8)},
}


def frozen_config(kernel: str, tensor: Tensor) -> Config:
    """The tile of ``kernel`` on the device of ``tensor``, from the static table."""
    table = STATIC[kernel]
    capability = torch.cuda.get_device_capability(tensor.device) if tensor.is_cuda else None
    return table.get(capability, table[None])


@dataclass(frozen=True)
class DecodeConfig:
    """``rows`` of hidden states by ``block`` tokens, ``depth`` of the width at a time, ``steps`` blocks a program."""

    block: int
    depth: int
    steps: int
    warps: int
    stages: int
    rows: int = 16

    def launch(self) -> dict[str, int | bool]:
        """The options of a launch; nothing is fused, since the noise has to be the definition's bits."""
        return {
            "ROWS": self.rows,
            "BLOCK": self.block,
            "DEPTH": self.depth,
            "STEPS": self.steps,
            "num_warps": self.warps,
            "num_stages": self.stages,
            "enable_fp_fusion": False,
        }


# By whether the product is fp32. Shared memory: (rows + block) * depth * (2 or 4) bytes * stages, 99 KiB a block on
# sm_121.
DECODE_CANDIDATES = {
    False: (DecodeConfig(128, 64, 8, 4, 4), DecodeConfig(128, 128, 8, 8, 2)),
    True: (DecodeConfig(64, 32, 16, 8, 3),),
}


# Elements that are read one by one need a register each.
ODD_ADDRESSES = DecodeConfig(64, 32, 16, 8, 2)


def decode_tile(full: bool, aligned: bool) -> DecodeConfig:
    """The tile of the static table for a product in fp32 or not, of rows that can be read 16 bytes at a time or not."""
    return DECODE_CANDIDATES[full][0] if aligned else ODD_ADDRESSES
