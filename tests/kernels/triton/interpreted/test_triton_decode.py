"""The Triton kernels of decoding, and their noise, against the definition, in Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.decode import latent_decode
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.fixtures import TIES_AT_TOP_P, ties_at_top_p
from latentforge.kernels.noise import gumbel
from latentforge.kernels.reference import decode as reference
from latentforge.kernels.triton import decode as triton
from latentforge.kernels.triton.configs import DecodeConfig
from latentforge.kernels.triton.noise import noise
from latentforge.kernels.weights import Int8Weight, quantize_int8

BF16, FP32 = torch.bfloat16, torch.float32
INF = float("inf")
SMALL = DecodeConfig(block=64, depth=32, steps=2, warps=4, stages=2)


def tensors(
    rows: int, vocab: int, width: int, hidden: torch.dtype = BF16, weight: torch.dtype = BF16, seed: int = 0
) -> tuple[Tensor, Tensor | Int8Weight, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(rows, width, generator=generator).to(hidden)
    matrix = torch.randn(vocab, width, generator=generator) * 2 / width**0.5
    seeds = torch.randint(-(2**63), 2**63 - 1, (rows,), generator=generator)
    positions = torch.randint(0, 2**40, (rows,), generator=generator)
    return states, quantize_int8(matrix) if weight == torch.int8 else matrix.to(weight), seeds, positions


def agree(found: tuple[Tensor, Tensor], true: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], true[0])
    torch.testing.assert_close(found[1], true[1].float(), rtol=1e-5, atol=2e-5, equal_nan=True)


def test_the_noise_has_the_bits_of_its_definition() -> None:
    count = 30000
    generator = torch.Generator().manual_seed(3)
    seeds, positions = (torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator) for _ in range(2))
    ids = torch.randint(0, 262144, (count,), generator=generator, dtype=torch.int32)
    seeds[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])
    positions[:4] = 0
    found = torch.empty(count)
    noise[(8,)](seeds, positions, ids, found, count, BLOCK=4096)
    true = gumbel(seeds, positions, ids.long())
    assert torch.equal(found.view(torch.int32), true.view(torch.int32))


@settings(max_examples=12, derandomize=True)
@given(
    st.sampled_from([1, 5, 17]),
    st.sampled_from([1, 63, 129, 300]),
    st.sampled_from([1, 16, 33]),
    st.sampled_from([BF16, FP32]),
    st.sampled_from([BF16, FP32, torch.int8]),
    st.sampled_from([0.0, 0.7, 1.3]),
    st.booleans(),
)
def test_any_shape_precision_and_temperature_chooses_what_the_definition_chooses(
    rows: int, vocab: int, width: int, hidden: torch.dtype, weight: torch.dtype, temperature: float, shaped: bool
) -> None:
    states, matrix, seeds, positions = tensors(rows, vocab, width, hidden, weight)
    bias = torch.randn(vocab, generator=torch.Generator().manual_seed(5)) if shaped else None
    given_settings = DecodeSettings(
        max(1, vocab - 3), temperature, logit_scale=0.5 if shaped else 1.0, soft_cap=4.0 if shaped else None
    )
    call = (states, matrix, given_settings, seeds, positions, bias)
    agree(triton.decode(*call, config=SMALL), reference.decode(*call))


CUTS = [
    {"top_k": 1},
    {"top_k": 37},
    {"top_k": 5000},
    {"top_p": 0.1},
    {"top_p": 0.93},
    {"top_k": 40, "top_p": 0.5},
]


@pytest.mark.parametrize("cut", CUTS, ids=str)
@pytest.mark.parametrize("temperature", [0.7, 2.0])
def test_top_k_and_top_p_leave_exactly_the_tokens_of_the_definition(cut: dict[str, Any], temperature: float) -> None:
    states, matrix, seeds, positions = tensors(2, 300, 24, FP32, FP32, seed=1)
    bias = torch.zeros(300)
    bias[280:] = -INF
    call = (states, matrix, DecodeSettings(300, temperature, **cut), seeds, positions, bias)
    agree(triton.decode(*call, config=SMALL), reference.decode(*call))


@pytest.mark.parametrize("top_k", [3, 5])
def test_of_equal_logits_the_lower_ids_are_kept_and_chosen(top_k: int) -> None:
    states, matrix = torch.ones(8, 1), torch.zeros(200, 1)
    matrix[[20, 70, 71, 130, 190]] = 2.0  # in four blocks, ties throughout
    matrix[199] = 3.0
    seeds, positions = torch.arange(8), torch.zeros(8, dtype=torch.int64)
    greedy = triton.decode(states, matrix[:199], DecodeSettings(199), None, None, None, config=SMALL)
    assert greedy[0].tolist() == [20] * 8
    call = (states, matrix, DecodeSettings(200, 4.0, top_k=top_k), seeds, positions, None)
    found = triton.decode(*call, config=SMALL)
    agree(found, reference.decode(*call))
    assert set(found[0].tolist()) <= {199, 20, 70, 71, 130, 190} - set([130, 190][top_k - 3 :])


@pytest.mark.parametrize("case", TIES_AT_TOP_P)
def test_of_equal_logits_at_the_top_p_crossing_the_fewest_are_kept_and_no_more(
    case: str,
) -> None:
    call, wanted = ties_at_top_p(case)
    assert triton.decode(*call, config=SMALL)[0].tolist() == wanted


@pytest.mark.parametrize("cut", [{}, {"top_k": 3, "top_p": 0.9}], ids=str)
def test_rows_without_an_answer_say_so_and_the_others_answer(cut: dict[str, Any]) -> None:
    states, matrix, seeds, positions = tensors(5, 150, 16, FP32, FP32)
    assert isinstance(matrix, Tensor)
    states[1] = torch.nan
    states[3] *= 3e38  # some of its logits overflow
    for temperature in (0.0, 1.0):
        call = (states, matrix, DecodeSettings(150, temperature, **cut), seeds, positions, None)
        found = triton.decode(*call, config=SMALL)
        agree(found, reference.decode(*call))
        assert found[0][1] == -1
    nothing = (states, matrix, DecodeSettings(150, 1.0, **cut), seeds, positions, torch.full((150,), -INF))
    assert triton.decode(*nothing, config=SMALL)[0].tolist() == [-1] * 5
    one = torch.zeros(150)
    one[77] = torch.nan  # a single token, beside others that could be chosen
    assert triton.decode(*nothing[:5], one, config=SMALL)[0].tolist() == [-1] * 5


def test_the_bits_of_a_row_do_not_depend_on_the_other_rows() -> None:
    states, matrix, seeds, positions = tensors(18, 130, 33)
    for cut in ({}, {"top_k": 9}):
        chosen = DecodeSettings(130, 0.8, **cut)
        together = triton.decode(states, matrix, chosen, seeds, positions, None, config=SMALL)
        rows = slice(15, 18)
        some = triton.decode(states[rows], matrix, chosen, seeds[rows], positions[rows], None, config=SMALL)
        assert torch.equal(together[0][rows], some[0])
        assert torch.equal(together[1][rows], some[1])


def test_strided_and_misaligned_tensors_are_read_where_they_are() -> None:
    states, matrix, seeds, positions = tensors(3, 130, 16, FP32, BF16)
    assert isinstance(matrix, Tensor)
    wide = torch.full((130 * 19 + 1,), 99.0, dtype=BF16).as_strided((130, 16), (19, 1), 1)
    wide.copy_(matrix)
    apart = torch.full((3, 40), torch.nan)[:, 5:21]
    apart.copy_(states)
    call = (DecodeSettings(130, 0.9), seeds, positions, None)
    agree(triton.decode(apart, wide, *call, config=SMALL), reference.decode(states, matrix, *call))
    with pytest.raises(RefusedError, match="column stride"):
        triton.decode(states, matrix.T.contiguous().T, *call)


def test_the_public_call_takes_the_backend_by_name() -> None:
    states, matrix, seeds, positions = tensors(2, 140, 16)
    given_arguments: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "seeds": seeds, "positions": positions}
    found = latent_decode(states, matrix, backend="triton", **given_arguments)
    agree(found, latent_decode(states, matrix, backend="reference", **given_arguments))
    assert latent_decode(states[:0], matrix, backend="triton").ids.shape == (0,)
