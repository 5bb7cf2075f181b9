"""The CUDA decoder chooses what the definition chooses: its logic run under host emulation, not on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.cuda import decode as cuda_decode
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.fixtures import TIES_AT_TOP_P, ties_at_top_p
from latentforge.kernels.reference import decode as reference
from latentforge.kernels.weights import Int8Weight, quantize_int8

BF16, FP32, INT8 = torch.bfloat16, torch.float32, torch.int8
INF = float("inf")


def tensors(rows: int, vocab: int, width: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor | Int8Weight]:
    """Hidden states, and a weight whose logits spread over some ten."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator).to(FP32 if seed % 2 else BF16)
    weight = torch.randn(vocab, width, generator=generator) * 2.5 / width**0.5
    return hidden, quantize_int8(weight) if dtype == INT8 else weight.to(dtype)


def keys(rows: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    seeds = torch.randint(-(2**62), 2**62, (rows,), generator=generator)
    return seeds, torch.randint(0, 2**40, (rows,), generator=generator)


def exact(weight: Tensor | Int8Weight) -> Tensor | Int8Weight:
    return weight if isinstance(weight, Int8Weight) else weight.double()


def compare(
    emulation: Any,
    hidden: Tensor,
    weight: Tensor | Int8Weight,
    settings_: DecodeSettings,
    bias: Tensor | None = None,
    **place: Any,
) -> None:
    """Tokens and log-probabilities; another token is forgiven only where fp64 sees the two scores as equal."""
    seeds, positions = keys(hidden.shape[0])
    wanted, logprobs = reference.decode(hidden.double(), exact(weight), settings_, seeds, positions, bias)
    ids, found = emulation.decode(hidden, weight, settings_, seeds, positions, bias, **place)
    again, _ = reference.decode(hidden.float(), weight, settings_, seeds, positions, bias)
    sure = (ids == wanted) | (ids == again)
    assert bool(sure.all()), f"{settings_}: tokens {ids.tolist()}, not {wanted.tolist()}"
    assert torch.equal(found.isnan(), logprobs.isnan())
    same = (ids == wanted) & ~found.isnan()
    assert torch.allclose(found[same].double(), logprobs[same], rtol=1e-6, atol=5e-6), (found, logprobs)


DRAWS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_k": 20},
    {"temperature": 1.3, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 50, "top_p": 0.5},
    {"temperature": 2.0, "top_k": 1},
    {"temperature": 2.0, "top_p": 1e-6},
    {"temperature": 2.0, "top_p": 0.9999, "logit_scale": 0.7, "soft_cap": 4.0},
]


def shapes(emulation: Any) -> None:
    for dtype, draws in ((BF16, DRAWS), (FP32, DRAWS[4:5]), (INT8, DRAWS[:1] + DRAWS[4:5])):
        for draw in draws:
            compare(emulation, *tensors(3, 130, 72, dtype), DecodeSettings(127, **draw), torch.linspace(-1, 1, 130))
    for rows, vocab, width, dtype in ((1, 1, 1, BF16), (70, 20, 8, FP32), (3, 20, 1100, INT8), (9, 33, 513, BF16)):
        compare(emulation, *tensors(rows, vocab, width, dtype, seed=1), DecodeSettings(vocab))


def equals(emulation: Any) -> None:
    """Of equal logits the lower id counts as the larger, in the choice, in top-k and in top-p."""
    hidden = torch.ones(16, 4)
    weight = torch.ones(100, 4)
    seeds, positions = keys(16)
    ids, logprobs = emulation.decode(hidden, weight, DecodeSettings(100))
    assert not bool(ids.any())
    assert torch.allclose(logprobs, torch.full((16,), -4.605170), atol=1e-5)
    for draw, allowed in (({"top_k": 7}, 7), ({"top_p": 0.085}, 9), ({"top_k": 50, "top_p": 0.11}, 6)):
        ids, _ = emulation.decode(hidden, weight, DecodeSettings(100, 1.0, **draw), seeds, positions)
        assert int(ids.max()) < allowed, f"{draw}: {ids.tolist()}"
        assert len(set(ids.tolist())) > 2
        compare(emulation, hidden, weight, DecodeSettings(100, 1.0, **draw))
    # What underflows to minus zero ranks with zero.
    weight[::2] = -1e-36
    weight[1::2] = 1e-36
    ids, _ = emulation.decode(hidden, weight, DecodeSettings(100, 1.0, top_k=7, logit_scale=1e-12), seeds, positions)
    assert int(ids.max()) < 7


def odd(emulation: Any) -> None:
    """NaN, infinities and padding, row by row."""
    hidden, weight = tensors(6, 60, 16, FP32)
    assert isinstance(weight, Tensor)
    hidden[1, 3] = torch.nan
    hidden[2, 0] = INF
    hidden[3] *= 1e30
    bias = torch.zeros(60)
    bias[::2] = -INF
    one_nan = torch.zeros(60)
    one_nan[5] = torch.nan
    compare(emulation, hidden, weight, DecodeSettings(57), one_nan)
    for draw in (DRAWS[0], DRAWS[4]):
        compare(emulation, hidden, weight, DecodeSettings(57, **draw), bias)
        compare(emulation, hidden, weight, DecodeSettings(57, **draw), torch.full((60,), -INF))


def places_change_nothing(emulation: Any, places: Callable[..., Any]) -> None:
    for dtype, draw in ((BF16, DRAWS[4]), (FP32, DRAWS[0]), (INT8, DRAWS[1])):
        hidden, weight = tensors(10, 60, 300, dtype)
        seeds, positions = keys(10)
        settings_ = DecodeSettings(60, **draw)
        usual = emulation.decode(hidden, weight, settings_, seeds, positions)
        for shift, gap, order in ((1, 3, 1), (0, 212, 3)):
            place = places(student_shift=shift, gap=gap, order=order)
            moved = emulation.decode(hidden, weight, settings_, seeds, positions, place=place)
            assert all(torch.equal(a, b) for a, b in zip(usual, moved, strict=True)), f"{dtype}, {place}: other bits"
        for row in (9,):
            one = slice(row, row + 1)
            alone = emulation.decode(hidden[one], weight, settings_, seeds[one], positions[one])
            assert all(torch.equal(a[one], b) for a, b in zip(usual, alone, strict=True)), "a row depends on the others"


def battery(emulation: Any, places: Callable[..., Any]) -> None:
    """All fixed comparisons; a fault in the kernels must fail here."""
    equals(emulation)
    shapes(emulation)
    odd(emulation)
    places_change_nothing(emulation, places)


def test_tokens_and_logprobs_are_the_definition(emulation: Any) -> None:
    shapes(emulation)


def test_of_equal_logits_the_lower_id_comes_first_everywhere(emulation: Any) -> None:
    equals(emulation)


@pytest.mark.parametrize("case", TIES_AT_TOP_P)
def test_of_equal_logits_at_the_top_p_crossing_the_fewest_are_kept_and_no_more(emulation: Any, case: str) -> None:
    call, wanted = ties_at_top_p(case)
    assert emulation.decode(*call)[0].tolist() == wanted


def test_nan_infinities_and_padding_are_answered_row_by_row(emulation: Any) -> None:
    odd(emulation)


def test_addresses_strides_orders_and_other_rows_change_no_bit(emulation: Any, places: Callable[..., Any]) -> None:
    places_change_nothing(emulation, places)


def test_no_rows_have_no_tokens(emulation: Any) -> None:
    ids, logprobs = emulation.decode(torch.zeros(0, 8), torch.zeros(10, 8), DecodeSettings(10))
    assert ids.numel() == logprobs.numel() == 0


def test_what_the_cuda_decoder_does_not_take_is_refused_by_name() -> None:
    hidden, weight = torch.zeros(1, 8), torch.zeros(10, 8)
    with pytest.raises(RefusedError, match="float64"):
        cuda_decode.decode(hidden, weight.double(), DecodeSettings(10), None, None, None)
    with pytest.raises(RefusedError, match="column stride 10"):
        cuda_decode.decode(hidden, weight.new_zeros(8, 10).T, DecodeSettings(10), None, None, None)
    with pytest.raises(RefusedError, match="on cpu"):
        cuda_decode.decode(hidden, weight, DecodeSettings(10), None, None, None)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(1, 9),
    vocab=st.integers(1, 70),
    width=st.integers(1, 80),
    dtype=st.sampled_from((BF16, FP32, INT8)),
    temperature=st.sampled_from((0.0, 0.5, 1.0, 3.0)),
    top_k=st.one_of(st.none(), st.integers(1, 80)),
    top_p=st.one_of(st.none(), st.floats(0.01, 1.0)),
    seed=st.integers(0, 1000),
    shift=st.integers(0, 3),
    order=st.integers(0, 9),
)
def test_any_shape_and_any_cut_give_the_definition(
    emulation: Any, places: Callable[..., Any], rows: int, vocab: int, width: int, dtype: torch.dtype,
    temperature: float, top_k: int | None, top_p: float | None, seed: int, shift: int, order: int,
) -> None:  # fmt: skip
    hidden, weight = tensors(rows, vocab, width, dtype, seed)
    settings_ = DecodeSettings(vocab, temperature, top_k, top_p)
    compare(emulation, hidden, weight, settings_, place=places(student_shift=shift, order=order))


FAULTS = [
    ("of equal scores the higher id wins", "decode_rows.cuh", "score == than.score && id < than.id",
     "score == than.score && id > than.id"),
    ("of equal logits the higher id ranks first", "decode_rows.cuh",
     "((1u << kIdBits) - 1 - static_cast<uint32_t>(id))", "static_cast<uint32_t>(id)"),
    ("minus zero ranks under zero", "decode_rows.cuh", "__float_as_uint(z + 0.0f)", "__float_as_uint(z)"),
    ("the search of top-p forgets top-k", "decode_rows.cuh", "p.cut[row].top_k_at = p.cut[row].at_least;", ";"),
    ("the token that crosses top-p is left out", "decode_rows.cuh", "cut.inside + masses[i] >= cut.wanted",
     "cut.inside + masses[i] > cut.wanted + masses[i]"),
    ("the butterfly gives the wrong half", "decode_products.cuh", "upper ? sums[i + half] : sums[i], give",
     "upper ? sums[i] : sums[i + half], give"),
    ("columns past the width are read", "decode_products.cuh", "row != nullptr && at < width", "row != nullptr"),
    ("rows of the weight past the vocabulary are read", "decode_products.cuh", "token + t < call.vocab ?", "true ?"),
    ("the draw is made with the token's place in the tile", "decode_rows.cuh", "p.call.positions[at], token)",
     "p.call.positions[at], token % 16)"),
    ("a row with NaN is answered", "decode_rows.cuh", "mine.sum = not_a_number();", ";"),
    ("the scale of int8 is forgotten", "decode_rows.cuh", "z *= p.call.scales[token];", ";"),
    ("only the first 64 rows are decoded", "decode_rows.cuh", "row < call.rows; row += kRowsAtOnce",
     "row < 1; row += kRowsAtOnce"),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "file", "text", "instead"),
    # A build each: most are left to the soak.
    [pytest.param(*fault, id=fault[0], marks=[pytest.mark.soak] if i % 4 else []) for i, fault in enumerate(FAULTS)],
)
def test_a_planted_fault_is_caught(
    faulty_emulation: Callable[[str, str, str], Any],
    places: Callable[..., Any],
    what: str,
    file: str,
    text: str,
    instead: str,
) -> None:
    broken = faulty_emulation(file, text, instead)
    with pytest.raises(Exception, match=r"(?s).+") as caught:
        battery(broken, places)
    assert type(caught.value).__name__ in ("AssertionError", "EmulationError"), caught.value
