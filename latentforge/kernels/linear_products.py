"""The matrix products of ``linear_kd_loss``: logits that keep the fp32 of their sums, on every machine.

A KD gradient is a difference of two nearly equal distributions. Logits that a product rounds to bf16 put an error of
some percent into it once the student is close, so the products of the logits end in fp32. How that is had depends on
the machine; the products are the vendor's, called through torch.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Products(Protocol):
    """``tile`` columns of the vocabulary are a good size for one product of the gradient."""

    tile: int

    def operand(self, tensor: Tensor) -> Tensor:
        """A matrix that enters several products, in the form that they take it."""
        ...

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """hidden [n, H] times weight [V, H] transposed, fp32 [n, V], never rounded to bf16."""
        ...

    def times(self, gradient: Tensor, operand: Tensor) -> Tensor:
        """gradient fp32 [a, b] times operand [b, c], summed in fp32; fp32 or the operand's dtype [a, c]."""
        ...


class Upcast:
    """fp32 products of upcast tiles: for fp32, for mixed dtypes, and for hosts that compute bf16 by emulation.

    On an AVX-512 machine without bf16 instructions this is 3 to 4 times as fast as torch's bf16 product.
    """

    # An fp32 tile of the weight that the upcast writes is read again from the cache by the product.
    tile = 2048

    def operand(self, tensor: Tensor) -> Tensor:
        return tensor.float()

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        rows, vocab = hidden.shape[0], weight.shape[0]
        hidden = hidden.float()
        found = hidden.new_empty(rows, vocab)
        for start in range(0, vocab, self.tile):
            columns = slice(start, start + self.tile)
            torch.mm(hidden, weight[columns].float().T, out=found[:, columns])
        return found

    def times(self, gradient: Tensor, operand: Tensor) -> Tensor:
        return torch.mm(gradient, operand.float())


class Split:
    """bf16 products on hosts with bf16 instructions, where torch gives no fp32 result: the logits in two of them.

    The second one computes what the rounding of the first has lost: ``hidden @ weight.T - first`` is summed in fp32
    before it is rounded, so that first + second carry 16 bits. Two bf16 products are cheaper there than one of fp32.
    """

    tile = 8192

    def operand(self, tensor: Tensor) -> Tensor:
        return tensor

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        found = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=torch.float32)
        for start in range(0, weight.shape[0], self.tile):
            columns = slice(start, start + self.tile)
            transposed = weight[columns].T
            first = torch.mm(hidden, transposed)
            rest = torch.addmm(first, hidden, transposed, beta=-1)
            torch.add(first, rest.float(), out=found[:, columns])
        return found

    def times(self, gradient: Tensor, operand: Tensor) -> Tensor:
        return torch.mm(gradient.to(operand.dtype), operand)


class Device:
    """bf16 products of a CUDA device that end in fp32 (``out_dtype``). Not run where this was written."""

    tile = 32768

    def operand(self, tensor: Tensor) -> Tensor:
        return tensor

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)

    def times(self, gradient: Tensor, operand: Tensor) -> Tensor:
        return torch.mm(gradient.to(operand.dtype), operand, out_dtype=torch.float32)


def products_for(hidden: Tensor, weight: Tensor) -> Products:
    """The products for these two matrices on their device."""
    if not hidden.dtype == weight.dtype == torch.bfloat16:
        return Upcast()
    if hidden.device.type == "cuda":
        return Device()
    return Split() if _host_multiplies_bf16() else Upcast()


def _host_multiplies_bf16() -> bool:
    # Only where torch is known to sum the second product of Split in fp32: oneDNN on x86.
    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
