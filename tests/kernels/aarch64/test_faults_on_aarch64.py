"""Planted faults: what the tests of this folder judge by does notice a wrong kernel."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from latentforge.kernels import noise
from latentforge.kernels.parity.kd import Case, compare

BF16, FP32 = torch.bfloat16, torch.float32
NEON = "cpu/simd_neon.h"

# What is wrong, in the NEON header as the unit of that variant sees it, and a case in which it must show.
FAULTS = {
    "bf16 is cut off instead of rounded": ("vdupq_n_u32(0x8000)", "vdupq_n_u32(0)", Case(1003, BF16, BF16, 2.0)),
    "a power of two lands one bit too low": (
        "vshlq_n_s32(vreinterpretq_s32_f32(whole), 23)",
        "vshlq_n_s32(vreinterpretq_s32_f32(whole), 22)",
        Case(1003, BF16, BF16, 2.0),
    ),
    "zero passes for positive": ("vcgtzq_f32(gate)", "vcgezq_f32(gate)", Case(1003, FP32, FP32, 2.0, padding=7)),
    "a product is added where it is to be subtracted": (
        "vfmsq_f32(c, a, b)",
        "vfmaq_f32(c, a, b)",
        Case(1003, FP32, FP32, 2.0),
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_wrong_vector_is_noticed(cross: ModuleType, start: Callable[..., Any], name: str) -> None:
    old, new, case = FAULTS[name]
    with start().in_place():
        assert compare(case, isa="neon").passed
    root, _ = cross.ready()
    with start(library=cross.mutant(root, "cpu/kd_neon.cpp", (NEON, old, new))).in_place():
        assert not compare(case, isa="neon").passed


def test_a_variant_offered_to_a_processor_that_lacks_it_is_noticed(
    cross: ModuleType, start: Callable[..., Any]
) -> None:
    root, _ = cross.ready()
    unit = "cpu/kd_dispatch.cpp"
    wrong = cross.mutant(root, unit, (unit, "if (has_bf16_and_dot_products())", "if (true)"))
    with start("cortex-a57", wrong).in_place() as extension:
        assert extension.cpu_variants()[0] == "neon_bf16"
        with pytest.raises(ProcessLookupError):  # the illegal instruction ends the emulated process
            compare(Case(1003, BF16, BF16, 2.0), isa="neon_bf16")


def test_a_compiler_that_fuses_multiplies_and_adds_by_itself_is_noticed(
    cross: ModuleType, start: Callable[..., Any]
) -> None:
    # gcc's default on aarch64, where every processor has the fused instruction; CMakeLists.txt turns it off.
    root, _ = cross.ready()
    expected = noise.gumbel(torch.tensor(5), torch.tensor(7), torch.arange(512)).view(torch.int32)
    drawn = torch.empty(512)
    for flags, right in ((("-O2",), True), (("-O2", "-ffp-contract=fast"), False)):
        library = cross.mutant(root, "cpu/decode_baseline.cpp", flags=flags)
        with start(library=library).in_place() as extension:
            extension.gumbel_noise(5, 7, 0, 512, drawn.data_ptr(), "baseline")
        assert torch.equal(drawn.view(torch.int32), expected) is right


def test_a_write_beside_the_callers_memory_is_noticed(arm: Any) -> None:
    a, b = torch.ones(100), torch.ones(100)
    arm.stream_add(a.data_ptr(), b.data_ptr(), 100, 1)
    assert (a == 2).all()
    with pytest.raises(MemoryError, match="behind a block"):
        arm.stream_add(a.data_ptr(), b.data_ptr(), 101, 1)
