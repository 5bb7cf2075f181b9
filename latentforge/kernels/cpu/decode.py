"""Decoding by the C++ backend."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.cpu.variants import VARIANT_VARIABLE
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.native import native
from latentforge.kernels.weights import Int8Weight

DTYPES = (torch.bfloat16, torch.float32)
LARGEST_VOCAB = 1 << 21  # a row's mass is summed in 64-bit integers
LARGEST_INT8_WIDTH = 1 << 16  # its products in 32-bit ones


def variant() -> str:
    """The variant in use: the best of this machine, or the one that LATENTFORGE_CPU_VARIANT names."""
    available = list(native().decode_variants())
    asked = os.environ.get(VARIANT_VARIABLE)
    if asked is None:
        return str(available[0])
    if asked not in available:
        raise RefusedError(
            f"{VARIANT_VARIABLE}={asked!r}: this machine can decode with {', '.join(available)}",
            next=f"unset {VARIANT_VARIABLE}",
        )
    return asked


def decode(
    hidden: Tensor,
    weight: Tensor | Int8Weight,
    settings: DecodeSettings,
    seeds: Tensor | None,
    positions: Tensor | None,
    bias: Tensor | None,
    *,
    threads: int | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """ids int64 [N] and logprobs fp32 [N]; meaning as in ``reference.decode.decode``.

    A bf16 or fp32 weight is multiplied in fp32. With an int8 weight the hidden row is written as a 23-bit fixed point
    number, in units of a power of two that its largest entry sets, and the products are exact integers.
    """
    matrix = weight.values if isinstance(weight, Int8Weight) else weight
    for name, tensor in (("hidden", hidden), ("weight", matrix), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES and not (name == "weight" and tensor.dtype == torch.int8):
            raise RefusedError(f"{name} is {tensor.dtype}; the cpu backend takes bfloat16 and float32")
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise RefusedError(
            f"weight has column stride {matrix.stride(1)}; columns must be contiguous (no copy is made unasked)",
            next="pass weight.contiguous()",
        )
    if settings.vocab > LARGEST_VOCAB:
        raise RefusedError(f"vocab = {settings.vocab}; the cpu backend decodes up to {LARGEST_VOCAB} tokens")
    if isinstance(weight, Int8Weight) and matrix.shape[1] > LARGEST_INT8_WIDTH:
        raise RefusedError(
            f"an int8 weight of width {matrix.shape[1]}; the cpu backend takes up to {LARGEST_INT8_WIDTH}"
        )
    if hidden.shape[1] > 1 and hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    keep = [hidden, matrix]
    call = native().DecodeCall()
    call.rows, call.width = hidden.shape
    call.vocab = settings.vocab
    call.hidden(hidden.data_ptr(), hidden.stride(0), hidden.dtype == torch.bfloat16)
    if isinstance(weight, Int8Weight):
        scales = weight.scales.contiguous()
        keep.append(scales)
        call.int8_weight(matrix.data_ptr(), matrix.stride(0), scales.data_ptr())
    else:
        call.weight(matrix.data_ptr(), matrix.stride(0), matrix.dtype == torch.bfloat16)
    if bias is not None:
        bias = bias.contiguous()
        keep.append(bias)
        call.bias(bias.data_ptr(), bias.dtype == torch.bfloat16)
    if seeds is not None and positions is not None:
        seeds, positions = seeds.contiguous(), positions.contiguous()
        keep += [seeds, positions]
        call.keys(seeds.data_ptr(), positions.data_ptr())
    call.temperature = settings.temperature
    call.logit_scale, call.soft_cap = settings.logit_scale, settings.soft_cap or 0.0
    call.top_k, call.top_p = min(settings.top_k or 0, settings.vocab), settings.top_p or 1.0
    ids = torch.empty(hidden.shape[0], dtype=torch.int64)
    logprobs = torch.empty(hidden.shape[0], dtype=torch.float32)
    call.results(ids.data_ptr(), logprobs.data_ptr())
    native().decode_rows(call, isa or variant(), threads or torch.get_num_threads())
    del keep
    return ids, logprobs
