"""Decoding by the cpu backend on aarch64, in each of its variants, against the definition in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latentforge.kernels.cpu import decode as cpu
from latentforge.kernels.parity.decode import Case, compare, grid

VARIANTS = ("neon_bf16", "neon", "baseline")
BF16, FP32, INT8 = torch.bfloat16, torch.float32, torch.int8


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weight", [BF16, FP32, INT8])
def test_tokens_and_log_probabilities_are_those_of_fp64(arm: Any, weight: torch.dtype, variant: str) -> None:
    # Greedy and drawn, top-k and top-p, odd widths, two precisions, bias, cap, padding, NaN rows, no rows at all.
    # The tolerance is wide enough for bfdot, which rounds each addition to odd.
    cases = [case for _, case in grid(quick=True) if case.weight == weight]
    assert len(cases) > 20
    for case in cases[:: 4 if variant == "baseline" else 1]:  # the baseline is the same source as elsewhere
        result = compare(case, isa=variant)
        assert result.passed, result


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("weight", [BF16, FP32, INT8])
def test_a_rows_bits_do_not_depend_on_threads_tile_or_batch(arm: Any, weight: torch.dtype, variant: str) -> None:
    case = Case(9, 203, 1501, weight, 0.9, hidden_dtype=FP32 if weight == FP32 else BF16)  # worth two threads
    hidden, matrix, bias, seeds, positions = case.tensors()
    assert seeds is not None
    assert positions is not None

    def run(rows: slice, threads: int) -> tuple[Tensor, Tensor]:
        given = (hidden[rows], matrix, case.settings, seeds[rows], positions[rows], bias)
        return cpu.decode(*given, threads=threads, isa=variant)

    whole = run(slice(0, 9), 1)
    for rows, threads in ((slice(0, 9), 2), (slice(2, 3), 1), (slice(3, 5), 1), (slice(1, 8), 2)):
        part = run(rows, threads)
        assert all(torch.equal(a[rows], b) for a, b in zip(whole, part, strict=True)), (rows, threads)


def test_int8_products_are_exact_so_all_variants_agree_in_every_bit(arm: Any) -> None:
    hidden, matrix, bias, _, _ = Case(5, 203, 1003, INT8, 0.0, bias=True).tensors()
    settings = Case(5, 203, 1003, INT8, 0.0, bias=True).settings
    found = [cpu.decode(hidden, matrix, settings, None, None, bias, isa=variant) for variant in VARIANTS]
    for ids, logprobs in found[1:]:
        assert torch.equal(ids, found[0][0])
        assert torch.allclose(logprobs, found[0][1], rtol=0, atol=2e-6)  # the sum of exponentials has its own order


def test_a_processor_without_bf16_decodes_with_the_others(start: Callable[..., Any]) -> None:
    with start("cortex-a57").in_place() as extension:
        assert extension.decode_variants() == ["neon", "baseline"]
        case = Case(5, 96, 503, BF16, 1.0, top_k=5)
        for variant in ("neon", "baseline"):
            assert compare(case, isa=variant).passed
        with pytest.raises(ValueError, match="neon_bf16"):
            compare(case, isa="neon_bf16")
