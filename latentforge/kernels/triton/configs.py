"""Tiles of the kernels: which are worth trying, and which is taken where nothing has been measured.

Nothing is tuned at run time. The warm-up guard may time CANDIDATES and pass its choice as ``config``; a choice is part
of what determines the bits of a row, so it is frozen for a run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Config:
    """``block`` elements of a row at a time by ``warps`` of 32 threads."""

    block: int
    warps: int

    def launch(self) -> dict[str, int | bool]:
        """The options of a launch; everything that alters the code is said, nothing is left to Triton's defaults."""
        return {"BLOCK": self.block, "num_warps": self.warps, "num_stages": 1, "enable_fp_fusion": True}


# 8 elements a thread are 16 bytes of bf16, one load; more threads hide more latency, fewer leave more programs an SM.
CANDIDATES = {
    "kd_dense": (Config(2048, 8), Config(4096, 16), Config(1024, 4), Config(4096, 8)),
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
