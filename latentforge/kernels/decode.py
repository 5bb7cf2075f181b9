"""From hidden states to tokens: the vocabulary's product, the choice and its log-probability in one call."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels import backends
from latentforge.kernels.arguments import check_dense, check_whole
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.weights import Int8Weight


class Decoded(NamedTuple):
    """``ids`` int64 [N] (-1 where a row has no answer) and ``logprobs`` fp32 [N] (NaN there)."""

    ids: Tensor
    logprobs: Tensor


def latent_decode(
    hidden: Tensor,
    weight: Tensor | Int8Weight,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    vocab: int | None = None,
    backend: str = "auto",
) -> Decoded:
    """Choose a token for each row of ``hidden`` [N, H] (bf16 or fp32) without writing its logits.

    ``weight`` [V, H] is bf16, fp32 or an ``Int8Weight``; ``bias`` [V]; columns from ``vocab`` on are padding. The
    logits are z = cap * tanh(scale * (hidden . weight + bias) / cap). At ``temperature`` 0 the token is the argmax,
    lowest id of equals, and top-k and top-p change nothing. At T > 0 it is the argmax of z / T + g over the tokens that
    ``top_k`` (the k largest; of equals the lower id) and then ``top_p`` (the fewest most likely whose share reaches it)
    leave: a draw from their softmax (Gumbel-max). The noise g depends on (seed, position, id) alone, int64 ``seeds``
    and ``positions`` [N], with the same bits on every backend. The log-probability is that of softmax(z / T), T = 1
    where greedy, over the whole vocabulary. A row with NaN or plus infinity among its z / T, or nothing but minus
    infinity, has id -1 and log-probability NaN. No gradient. A row's answer does not depend on the other rows, nor on
    threads.

    RefusedError names the argument that cannot be used. ``reference/decode.py`` is the definition.
    """
    matrix = weight.values if isinstance(weight, Int8Weight) else weight
    scales = weight.scales if isinstance(weight, Int8Weight) else None
    _check_matrices(hidden, matrix, scales)
    columns = matrix.shape[0] if vocab is None else vocab
    check_whole("vocab", columns, f"between 1 and the weight's {matrix.shape[0]} rows", low=1, high=matrix.shape[0])
    DecodeSettings(columns, temperature, top_k, top_p, logit_scale, soft_cap)
    settings = DecodeSettings(
        int(columns),
        float(temperature),
        None if top_k is None else int(top_k),
        None if top_p is None else float(top_p),
        float(logit_scale),
        None if soft_cap is None else float(soft_cap),
    )
    if bias is not None:
        _check_bias(bias, matrix)
    for name, key in (("seeds", seeds), ("positions", positions)):
        if key is not None or not settings.greedy:
            _check_key(name, key, hidden)
    if settings.greedy:
        seeds = positions = None
    chosen = backends.choose("latent_decode", hidden, matrix, bias, backend=backend)
    with torch.no_grad():  # there is no backward, and the result does not claim one
        ids, logprobs = torch.ops.latentforge.latent_decode(
            hidden,
            matrix,
            scales,
            bias,
            seeds,
            positions,
            settings.temperature,
            settings.top_k,
            settings.top_p,
            settings.logit_scale,
            settings.soft_cap,
            settings.vocab,
            chosen,
        )
    return Decoded(ids, logprobs)


def _check_matrices(hidden: Tensor, matrix: Tensor, scales: Tensor | None) -> None:
    check_dense("hidden", hidden, "a tensor [N, H]")
    check_dense("weight", matrix, "a tensor [V, H] or an Int8Weight")
    if hidden.dim() != 2 or matrix.dim() != 2 or hidden.shape[1] != matrix.shape[1]:
        raise RefusedError(
            f"hidden {list(hidden.shape)} and weight {list(matrix.shape)} do not match; they must be [N, H] and [V, H]"
        )
    if matrix.shape[0] < 1 or matrix.shape[1] < 1:
        raise RefusedError(f"weight {list(matrix.shape)} has no tokens to choose from or no width")
    floating = (torch.bfloat16, torch.float32, torch.float64)
    if hidden.dtype not in floating:
        raise RefusedError(f"hidden is {hidden.dtype}; it must be bfloat16 or float32")
    if scales is None and matrix.dtype not in floating:
        raise RefusedError(
            f"weight is {matrix.dtype}; it must be bfloat16 or float32", next="quantize_int8 makes an Int8Weight"
        )
    if matrix.device != hidden.device:
        raise RefusedError(f"weight is on {matrix.device}, hidden on {hidden.device}")


def _check_bias(bias: Tensor, matrix: Tensor) -> None:
    check_dense("bias", bias, "a tensor [V]")
    if bias.shape != matrix.shape[:1]:
        raise RefusedError(
            f"bias is {list(bias.shape)}; it must be [{matrix.shape[0]}], one for each row of the weight"
        )
    if bias.dtype not in (torch.bfloat16, torch.float32, torch.float64):
        raise RefusedError(f"bias is {bias.dtype}; it must be bfloat16 or float32")
    if bias.device != matrix.device:
        raise RefusedError(f"bias is on {bias.device}, weight on {matrix.device}")


def _check_key(name: str, key: Tensor | None, hidden: Tensor) -> None:
    if key is None:
        raise RefusedError(
            f"{name} = None with a temperature above 0: a draw needs them",
            next="pass int64 seeds and positions, one for each row, or temperature=0",
        )
    check_dense(name, key, "an int64 tensor [N]")
    if key.dtype != torch.int64 or key.shape != hidden.shape[:1]:
        raise RefusedError(f"{name} are {key.dtype} {list(key.shape)}; they must be int64 [{hidden.shape[0]}]")
    if key.device != hidden.device:
        raise RefusedError(f"{name} are on {key.device}, hidden on {hidden.device}")


@torch.library.custom_op("latentforge::latent_decode", mutates_args=())
def _operator(
    hidden: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    logit_scale: float,
    soft_cap: float | None,
    vocab: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    settings = DecodeSettings(vocab, temperature, top_k, top_p, logit_scale, soft_cap)
    matrix = weight if scales is None else Int8Weight(weight, scales)
    implementation = import_module(f"latentforge.kernels.{backend}.decode")
    ids, logprobs = implementation.decode(hidden, matrix, settings, seeds, positions, bias)
    return ids, logprobs.float()


@_operator.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    bias: Tensor | None,
    seeds: Tensor | None,
    positions: Tensor | None,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    logit_scale: float,
    soft_cap: float | None,
    vocab: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    rows = hidden.shape[0]
    return hidden.new_empty(rows, dtype=torch.int64), hidden.new_empty(rows, dtype=torch.float32)
