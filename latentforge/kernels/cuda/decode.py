"""Decoding by the CUDA backend: ``csrc/cuda/decode_*.cuh`` on torch's current stream.

One walk through the weight chooses greedily or draws; a cut by top-k or top-p is exact and takes further walks, one for
each eleven bits of its threshold that are needed. The logic is run under host emulation in the tests
(``tests/kernels/cuda``); on a GPU by ``tests/gpu`` where there is one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.cuda.extension import cuda_native, place
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.weights import Int8Weight

WEIGHT_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # csrc/cuda/decode_call.h
HIDDEN_STEP = 512
LARGEST_VOCAB = 1 << 21


def decode(
    hidden: Tensor,
    weight: Tensor | Int8Weight,
    settings: DecodeSettings,
    seeds: Tensor | None,
    positions: Tensor | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """ids int64 [N] and logprobs fp32 [N]; meaning as in ``reference.decode.decode``. Nothing waits for the device.

    ``weight`` is bf16, fp32 or int8, at any address and row stride; products are summed in fp32, in an order that does
    not depend on the other rows.
    """
    matrix = weight.values if isinstance(weight, Int8Weight) else weight
    for name, tensor in (("hidden", hidden), ("weight", matrix), ("bias", bias)):
        if tensor is not None and tensor.dtype not in WEIGHT_TYPES:
            raise RefusedError(f"{name} is {tensor.dtype}; the cuda backend takes bfloat16 and float32")
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise RefusedError(
            f"weight has column stride {matrix.stride(1)}; columns must be contiguous (no copy is made unasked)",
            next="pass weight.contiguous()",
        )
    if settings.vocab > LARGEST_VOCAB:
        raise RefusedError(f"vocab = {settings.vocab}; the cuda backend decodes up to {LARGEST_VOCAB} tokens")
    module = cuda_native()
    device, stream = place(hidden)
    keep = [padded(hidden), matrix]
    call = module.CudaDecodeCall()
    call.rows, call.width = hidden.shape
    call.vocab = settings.vocab
    call.hidden(keep[0].data_ptr(), keep[0].shape[1])
    call.weight(matrix.data_ptr(), matrix.stride(0), WEIGHT_TYPES[matrix.dtype])
    if isinstance(weight, Int8Weight):
        keep.append(weight.scales.contiguous())
        call.scales(keep[-1].data_ptr())
    if bias is not None:
        keep.append(bias.float().contiguous())
        call.bias(keep[-1].data_ptr())
    if not settings.greedy and seeds is not None and positions is not None:
        keep += [seeds.contiguous(), positions.contiguous()]
        call.keys(keep[-2].data_ptr(), keep[-1].data_ptr())
    call.temperature = settings.temperature
    call.logit_scale, call.soft_cap = settings.logit_scale, settings.soft_cap or 0.0
    call.top_k, call.top_p = cut_of(settings)
    ids = torch.empty(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
    call.results(ids.data_ptr(), logprobs.data_ptr())
    workspace = torch.empty(module.cuda_decode_workspace_bytes(), dtype=torch.uint8, device=hidden.device)
    call.workspace(workspace.data_ptr())
    module.cuda_decode(call, device, stream)
    del keep, workspace
    return ids, logprobs


def padded(hidden: Tensor) -> Tensor:
    """The hidden states [N, H] in fp32, with zeros up to the width that a warp takes at once."""
    return torch.nn.functional.pad(hidden.float(), (0, -hidden.shape[1] % HIDDEN_STEP)).contiguous()


def cut_of(settings: DecodeSettings) -> tuple[int, float]:
    """(top-k, top-p) as the kernels take them: 0 and 1 where they cut nothing."""
    top_k = 0 if settings.top_k is None or settings.top_k >= settings.vocab else settings.top_k
    return top_k, 1.0 if settings.top_p is None else settings.top_p
