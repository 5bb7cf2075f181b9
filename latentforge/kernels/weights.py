"""A vocabulary matrix in eight bits, for decoding."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.arguments import check_dense


@dataclass(frozen=True)
class Int8Weight:
    """The matrix ``values * scales[:, None]``: ``values`` [V, H] int8, ``scales`` [V] fp32."""

    values: Tensor
    scales: Tensor

    def __post_init__(self) -> None:
        check_dense("values", self.values, "an int8 tensor [V, H]")
        check_dense("scales", self.scales, "a float32 tensor [V]")
        if self.values.dtype != torch.int8 or self.values.dim() != 2:
            raise RefusedError(f"values are {self.values.dtype} {list(self.values.shape)}; they must be int8 [V, H]")
        if self.scales.dtype != torch.float32 or self.scales.shape != self.values.shape[:1]:
            raise RefusedError(
                f"scales are {self.scales.dtype} {list(self.scales.shape)}; they must be float32 [{len(self.values)}]"
            )
        if self.scales.device != self.values.device:
            raise RefusedError(f"scales are on {self.scales.device}, values on {self.values.device}")


def quantize_int8(weight: Tensor) -> Int8Weight:
    """``weight`` [V, H] (bf16, fp32 or fp64) in eight bits, each row scaled by its largest magnitude / 127.

    The error of an entry is at most half a scale. A row of zeros has the scale 0. RefusedError where an entry is not
    finite.
    """
    check_dense("weight", weight, "a floating point tensor [V, H]")
    if weight.dim() != 2 or not weight.dtype.is_floating_point:
        raise RefusedError(f"weight is {weight.dtype} {list(weight.shape)}; it must be floating point [V, H]")
    values = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    for start in range(0, weight.shape[0], 4096):  # a copy in fp32 of all of it would be twice the weight
        rows = slice(start, start + 4096)
        part = weight[rows].detach()
        part = part if part.dtype == torch.float64 else part.float()
        largest = part.abs().amax(dim=1) if part.shape[1] else part.new_zeros(part.shape[0])
        finite = torch.isfinite(largest)
        if not bool(finite.all()):
            row = int((~finite).nonzero()[0, 0])
            wrong = part[row][~torch.isfinite(part[row])][0].item()
            raise RefusedError(f"weight has {wrong} in row {start + row}; only finite weights have an int8 form")
        scale = (largest / 127).float()
        values[rows] = (part / torch.where(scale > 0, scale, 1.0)[:, None]).round().clamp(-127, 127).to(torch.int8)
        scales[rows] = scale
    return Int8Weight(values, scales)
