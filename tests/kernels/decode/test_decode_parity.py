"""The cpu backend chooses what the definition in fp64 chooses, for any shape, type, limit and form of the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentforge.kernels.cpu import decode as cpu
from latentforge.kernels.decode import latent_decode
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.native import native
from latentforge.kernels.noise import gumbel
from latentforge.kernels.reference import decode as reference
from latentforge.kernels.weights import Int8Weight, quantize_int8

VARIANTS = list(native().decode_variants())
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    rows: int
    vocab: int
    width: int
    hidden: torch.dtype
    weight: str
    temperature: float
    top_k: int | None
    top_p: float | None
    bias: torch.dtype | None
    logit_scale: float
    soft_cap: float | None
    padding: int
    spread: float
    odd: bool  # rows further apart than they are wide, and off their alignment

    def tensors(self) -> tuple[Tensor, Tensor | Int8Weight, DecodeSettings, Tensor, Tensor, Tensor | None]:
        some = torch.Generator().manual_seed(self.rows * 7919 + self.vocab * 31 + self.width)
        hidden = torch.randn(self.rows, self.width, generator=some).to(self.hidden)
        weight = torch.randn(self.vocab, self.width, generator=some) * self.spread / self.width**0.5
        if self.weight == "bf16":
            matrix: Tensor | Int8Weight = weight.bfloat16()
        else:
            matrix = quantize_int8(weight) if self.weight == "int8" else weight
        if self.odd:
            hidden = misplaced(hidden)
            matrix = (
                Int8Weight(misplaced(matrix.values), matrix.scales)
                if isinstance(matrix, Int8Weight)
                else misplaced(matrix)
            )
        bias = None if self.bias is None else torch.randn(self.vocab, generator=some).to(self.bias)
        seeds = torch.randint(-(2**63), 2**63 - 1, (self.rows,), generator=some)
        positions = torch.randint(0, 2**40, (self.rows,), generator=some)
        chosen = DecodeSettings(
            self.vocab - self.padding, self.temperature, self.top_k, self.top_p, self.logit_scale, self.soft_cap
        )
        return hidden, matrix, chosen, seeds, positions, bias


def misplaced(x: Tensor) -> Tensor:
    wide = torch.zeros(x.shape[0], x.shape[1] + 5, dtype=x.dtype)
    wide[:, 3:-2] = x
    return wide[:, 3:-2]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    vocab = draw(st.sampled_from([1, 2, 3, 63, 64, 65, 127, 511, 512, 513, 1100, 3001]))
    return Case(
        rows=draw(st.sampled_from([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17])),
        vocab=vocab,
        width=draw(st.sampled_from([1, 2, 7, 15, 16, 17, 31, 32, 33, 63, 64, 65, 130])),
        hidden=draw(st.sampled_from([BF16, FP32])),
        weight=draw(st.sampled_from(["bf16", "fp32", "int8"])),
        temperature=draw(st.sampled_from([0.0, 1.0, 0.7, 3.0])),
        top_k=draw(st.sampled_from([None, None, 1, 2, 20, 2000])),
        top_p=draw(st.sampled_from([None, None, 0.3, 0.9, 0.999, 1.0])),
        bias=draw(st.sampled_from([None, BF16, FP32])),
        logit_scale=draw(st.sampled_from([1.0, 2.5])),
        soft_cap=draw(st.sampled_from([None, 3.0, 30.0])),
        padding=draw(st.integers(0, min(5, vocab - 1))),
        spread=draw(st.sampled_from([0.05, 1.0, 5.0])),
        odd=draw(st.booleans()),
    )


def disagreement(case: Case, found: tuple[Tensor, Tensor], tolerance: float) -> str:
    """What is wrong with ``found``; a token counts as right where fp64 finds it allowed and within the tolerance."""
    hidden, weight, chosen, seeds, positions, bias = case.tensors()
    ids, logprobs = found
    wanted, _ = reference.decode(hidden.double(), weight, chosen, seeds, positions, bias)
    z = reference.logits(hidden.double(), weight, chosen, bias)
    scaled = z if chosen.greedy else z / chosen.temperature
    for row in range(case.rows):
        token = int(ids[row])
        if not 0 <= token < chosen.vocab:
            return f"row {row}: id {token}"
        right = float(torch.log_softmax(scaled[row], 0)[token])
        if abs(float(logprobs[row]) - right) > tolerance:
            return f"row {row}: log-probability {float(logprobs[row])}, not {right}"
        if token == int(wanted[row]):
            continue
        score = scaled[row]
        if not chosen.greedy:
            score = score + gumbel(seeds[row], positions[row], torch.arange(chosen.vocab))
        behind = float(score[int(wanted[row])] - score[token])
        if behind > tolerance and is_allowed(z[row], chosen, int(wanted[row]), -tolerance):
            return f"row {row}: token {token}, not {int(wanted[row])}"
        if not is_allowed(z[row], chosen, token, tolerance):
            return f"row {row}: token {token} is not allowed"
    return ""


def is_allowed(z: Tensor, chosen: DecodeSettings, token: int, nudge: float) -> bool:
    """Whether top-k and top-p leave a token whose logit is moved by what fp32 may have moved it."""
    moved = z.clone()
    moved[token] += nudge
    return bool(reference.allowed(moved[None], chosen)[0, token])


def tolerance(case: Case) -> float:
    """fp32 sums of up to 130 products, times what follows them."""
    return 4e-6 * max(1.0, case.spread) * case.logit_scale / (case.temperature or 1.0) + 4e-6


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=120, derandomize=True)
@given(case=cases())
def test_any_shape_type_and_limit_agrees_with_fp64(variant: str, case: Case) -> None:
    hidden, weight, chosen, seeds, positions, bias = case.tensors()
    found = cpu.decode(hidden, weight, chosen, seeds, positions, bias, isa=variant, threads=1)
    assert not (wrong := disagreement(case, found, tolerance(case))), (wrong, case)


@settings(max_examples=60, derandomize=True)
@given(case=cases())
def test_the_definition_in_fp32_agrees_with_itself_in_fp64(case: Case) -> None:
    hidden, weight, chosen, seeds, positions, bias = case.tensors()
    found = reference.decode(hidden, weight, chosen, seeds, positions, bias)
    assert not (wrong := disagreement(case, found, 5 * tolerance(case))), (wrong, case)


def test_the_comparison_catches_a_wrong_token_and_a_wrong_log_probability() -> None:
    case = Case(4, 513, 64, BF16, "bf16", 1.0, 20, 0.9, None, 1.0, None, 3, 1.0, False)
    hidden, weight, chosen, seeds, positions, bias = case.tensors()
    ids, logprobs = cpu.decode(hidden, weight, chosen, seeds, positions, bias)
    assert not disagreement(case, (ids, logprobs), tolerance(case))
    for wrong in [((ids + 1) % 510, logprobs), (ids, logprobs + 2e-5), (ids * 0 + 511, logprobs), (-ids, logprobs)]:
        assert disagreement(case, wrong, tolerance(case))


@pytest.mark.parametrize("weight", ["bf16", "fp32", "int8"])
def test_a_wide_model_stays_within_a_ten_thousandth(weight: str) -> None:
    case = Case(9, 4099, 1024, BF16, weight, 0.0, None, None, None, 1.0, None, 0, 8.0, False)
    hidden, matrix, chosen, seeds, positions, bias = case.tensors()
    for variant in VARIANTS:
        found = cpu.decode(hidden, matrix, chosen, seeds, positions, bias, isa=variant, threads=1)
        assert not (wrong := disagreement(case, found, 1e-4 if weight != "int8" else 2e-5)), (variant, wrong)


@pytest.mark.parametrize("hidden", [BF16, FP32])
def test_int8_products_of_a_row_with_outliers_are_those_of_fp32(hidden: torch.dtype) -> None:
    some = torch.Generator().manual_seed(5)
    h = torch.randn(4, 512, generator=some)
    h[:, 7] = 300.0  # a massive activation: the other entries keep 14 bits and more
    h = h.to(hidden)
    weight = quantize_int8(torch.randn(700, 512, generator=some) * 0.05)
    for variant in VARIANTS:
        _, logprobs = cpu.decode(h, weight, DecodeSettings(700), None, None, None, isa=variant)
        z = h.double() @ (weight.values.double() * weight.scales.double()[:, None]).T
        exact = z.max(dim=1).values - torch.logsumexp(z, 1)
        assert float((logprobs.double() - exact).abs().max()) < 1e-5 + 2e-6 * float(z.abs().max()), variant


def test_quantised_weights_are_within_half_a_scale_and_zero_rows_stay_zero() -> None:
    weight = torch.randn(50, 33, dtype=torch.float64)
    weight[7] = 0
    found = quantize_int8(weight)
    back = found.values.double() * found.scales.double()[:, None]
    assert bool(((back - weight).abs() <= 0.500001 * found.scales.double()[:, None]).all())
    assert int(found.values.abs().max()) == 127
    assert not bool(back[7].any())
    # The planted fault: rounding towards zero.
    truncated = (weight / found.scales.double()[:, None].clamp(min=1e-30)).trunc() * found.scales.double()[:, None]
    assert bool(((truncated - weight).abs() > 0.500001 * found.scales.double()[:, None]).any())


def test_a_call_goes_through_the_operator_and_into_a_compiled_graph() -> None:
    hidden, weight = torch.randn(5, 33), torch.randn(301, 33)
    key: dict[str, Any] = {"seeds": torch.arange(5), "positions": torch.arange(5)}
    for given_ in ({}, {"temperature": 0.8, "top_k": 40, "top_p": 0.9, **key}):
        eager = latent_decode(hidden, weight, **given_)

        def model(h: Tensor, options: dict[str, Any] = given_) -> tuple[Tensor, Tensor]:
            out = latent_decode(h + 0.0, weight, **options)
            return out.ids + 0, out.logprobs + 0

        ids, logprobs = torch.compile(model, fullgraph=True, backend="aot_eager")(hidden)
        assert torch.equal(ids, eager.ids)
        assert torch.equal(logprobs, eager.logprobs)
        assert eager.ids.dtype == torch.int64
        assert eager.logprobs.dtype == torch.float32


def test_the_operator_is_what_it_declares() -> None:
    none, seeds = None, torch.arange(3)
    hidden, weight = torch.randn(3, 8), torch.randn(20, 8)
    torch.library.opcheck(
        torch.ops.latentforge.latent_decode.default,
        (hidden, weight, none, none, seeds, seeds, 1.0, 5, 0.9, 1.0, none, 20, "cpu"),
    )
    whole = quantize_int8(weight)
    torch.library.opcheck(
        torch.ops.latentforge.latent_decode.default,
        (hidden, whole.values, whole.scales, none, none, none, 0.0, none, none, 1.0, none, 20, "cpu"),
    )


def test_no_gradient_is_promised_and_none_is_given() -> None:
    hidden = torch.randn(2, 8, requires_grad=True)
    found = latent_decode(hidden.detach(), torch.randn(20, 8))
    assert not found.logprobs.requires_grad
