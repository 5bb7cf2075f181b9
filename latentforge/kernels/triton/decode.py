"""Decoding by the Triton backend."""

from __future__ import annotations

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.triton import on_device_of, require
from latentforge.kernels.triton.configs import DecodeConfig, decode_tile
from latentforge.kernels.weights import Int8Weight

DTYPES = (torch.bfloat16, torch.float32)

# Stretches of a row that are put together at a time, and rows whose scaled logits are kept for top-k and top-p.
PIECE = 256
ROWS_AT_A_TIME = 64
PICK_BLOCK = 512
SMALL_LAUNCH = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
PICK_LAUNCH = {"num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}


def decode(
    hidden: Tensor,
    weight: Tensor | Int8Weight,
    settings: DecodeSettings,
    seeds: Tensor | None,
    positions: Tensor | None,
    bias: Tensor | None,
    *,
    config: DecodeConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """ids int64 [N] and logprobs fp32 [N]; meaning as in ``reference.decode.decode``.

    bf16 times bf16 or int8 is multiplied by tensor cores and summed in fp32; with fp32 on either side everything is
    fp32. Top-k and top-p keep fp32 logits of 64 rows at a time; greedy decoding and a plain draw keep none.
    """
    matrix = weight.values if isinstance(weight, Int8Weight) else weight
    scales = weight.scales.contiguous() if isinstance(weight, Int8Weight) else None
    for name, tensor in (("hidden", hidden), ("weight", matrix), ("bias", bias)):
        if tensor is not None and tensor.dtype not in DTYPES and not (name == "weight" and scales is not None):
            raise RefusedError(f"{name} is {tensor.dtype}; the triton backend takes bfloat16 and float32")
    if matrix.shape[1] > 1 and matrix.stride(1) != 1:
        raise RefusedError(
            f"weight has column stride {matrix.stride(1)}; columns must be contiguous (no copy is made unasked)",
            next="pass weight.contiguous()",
        )
    if hidden.shape[1] > 1 and hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    rows, width = hidden.shape
    ids = torch.empty(rows, dtype=torch.int64, device=hidden.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=hidden.device)
    kernels = require("decode_kernels")
    even = _aligned(hidden) and _aligned(matrix)
    config = config or decode_tile(torch.float32 in (hidden.dtype, matrix.dtype), even)
    cut = not settings.greedy and (settings.top_k is not None or (settings.top_p is not None and settings.top_p < 1))
    bias = None if bias is None else bias.contiguous()
    seeds = None if settings.greedy or seeds is None else seeds.contiguous()
    positions = None if settings.greedy or positions is None else positions.contiguous()
    vocab = settings.vocab
    stretch = config.block * config.steps
    splits = (vocab + stretch - 1) // stretch
    step = ROWS_AT_A_TIME if cut else max(rows, 1)
    with on_device_of(hidden):
        for first in range(0, rows, step):
            some = slice(first, first + step)
            count = len(ids[some])
            sums = torch.empty(4, count, splits, dtype=torch.float32, device=hidden.device)
            tokens = torch.empty(count, splits, dtype=torch.int32, device=hidden.device)
            logits = torch.empty(count, vocab, dtype=torch.float32, device=hidden.device) if cut else None
            seed = None if seeds is None else seeds[some]
            position = None if positions is None else positions[some]
            kernels.decode_split[((count + config.rows - 1) // config.rows, splits)](
                hidden[some],
                matrix,
                scales,
                bias,
                seed,
                position,
                logits,
                sums,
                tokens,
                count,
                width,
                vocab,
                hidden.stride(0),
                matrix.stride(0),
                splits,
                settings.temperature,
                settings.logit_scale,
                settings.soft_cap or 1.0,
                SCALED=settings.logit_scale != 1.0,
                CAPPED=settings.soft_cap is not None,
                ALIGNED=even,
                **config.launch(),
            )
            if logits is None:
                kernels.decode_join[(count,)](
                    sums, tokens, ids[some], logprobs[some], count, splits, PIECE=PIECE, **SMALL_LAUNCH
                )
            else:
                _pick(logits, seed, position, sums, tokens, ids[some], logprobs[some], settings)
    return ids, logprobs


def _pick(
    logits: Tensor,
    seeds: Tensor | None,
    positions: Tensor | None,
    sums: Tensor,
    tokens: Tensor,
    ids: Tensor,
    logprobs: Tensor,
    settings: DecodeSettings,
) -> None:
    rows, vocab = logits.shape
    top_p = 1.0 if settings.top_p is None else settings.top_p
    high = float(torch.tensor(top_p, dtype=torch.float32))
    require("decode_pick").decode_pick[(rows,)](
        logits,
        seeds,
        positions,
        sums,
        tokens,
        ids,
        logprobs,
        rows,
        vocab,
        tokens.shape[1],
        min(settings.top_k or vocab, vocab),
        high,
        top_p - high,
        settings.temperature,
        CUT_P=top_p < 1,
        BLOCK=PICK_BLOCK,
        PIECE=PIECE,
        **PICK_LAUNCH,
    )


def _aligned(matrix: Tensor) -> bool:
    """Whether every row can be read 16 bytes at a time."""
    return matrix.data_ptr() % 16 == 0 and matrix.stride(0) % 16 == 0 and matrix.shape[1] % 16 == 0
