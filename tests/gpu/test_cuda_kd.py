"""On a real device: every variant of the CUDA KD loss is the definition, on several calls, beside guard bands."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from latentforge.kernels.cuda import kd
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, topk_targets

BF16, FP32 = torch.bfloat16, torch.float32
ALLOWED = {BF16: 1.01, FP32: 1.5}
VOCABS = (1003, 50257, 151936)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("teacher", [BF16, FP32, 64, None], ids=str)
@pytest.mark.parametrize("student", [BF16, FP32], ids=str)
def test_every_variant_is_the_definition_on_three_calls(
    student: torch.dtype, teacher: torch.dtype | int | None, direction: str, vocab: int
) -> None:
    rows, band = 40, 64
    generator = torch.Generator(device="cuda").manual_seed(0)
    t = torch.randn(rows, vocab, generator=generator, device="cuda") * 4
    s = (t + 0.5 * torch.randn(rows, vocab, generator=generator, device="cuda")).to(student)
    labels = torch.randint(0, vocab, (rows,), generator=generator, device="cuda")
    labels[3] = -100
    for temperature, shaped in product((1.0, 2.0, 3.0), (False, True)):
        targets: Targets | None = None
        exact_targets: Targets | None = None
        if isinstance(teacher, int):
            targets = exact_targets = topk_targets(t, teacher, temperature)
        elif teacher is not None:
            targets = DenseTargets(t.to(teacher))
            exact_targets = DenseTargets(targets.logits.double())
        settings = KDSettings(
            temperature,
            temperature,
            ce_scale=0.01,
            kd_scale=0.02,
            direction=direction,
            logit_scale=0.8 if shaped else 1.0,
            soft_cap=30.0 if shaped else None,
        )
        bias = torch.randn(vocab, generator=generator, device="cuda") if shaped else None
        exact = reference.row_losses(s.double(), exact_targets, labels, settings, bias=bias, gradient=True)
        usual = reference.row_losses(s, targets, labels, settings, bias=bias, gradient=True)
        assert exact.gradient is not None
        assert usual.gradient is not None
        allowed = max(ALLOWED[student] * float((usual.gradient.to(student).double() - exact.gradient).norm()), 1e-6)
        seen = None
        for _ in range(3):
            memory = torch.full((rows * vocab + 2 * band,), 7.0, dtype=student, device="cuda")
            logits = memory[band:-band].view(rows, vocab)
            logits.copy_(s)
            ce, kd_ = kd.row_losses(logits, targets, labels, settings, bias=bias, write_gradient=True)
            assert float((logits.double() - exact.gradient).norm()) <= allowed
            assert torch.allclose(ce.double(), exact.ce, rtol=1e-6, atol=1e-5)
            assert torch.allclose(kd_.double(), exact.kd, rtol=1e-6, atol=1e-5)
            assert bool((memory[:band] == 7).all())
            assert bool((memory[-band:] == 7).all())
            assert seen is None or torch.equal(seen, logits)
            seen = logits.clone()


def test_addresses_strides_batches_and_streams_change_no_bit() -> None:
    rows, vocab = 600, 5003
    generator = torch.Generator(device="cuda").manual_seed(1)
    t = torch.randn(rows, vocab, generator=generator, device="cuda").to(BF16)
    s = torch.randn(rows, vocab, generator=generator, device="cuda").to(BF16)
    settings = KDSettings(2.0, 2.0, kd_scale=0.1)
    usual = s.clone()
    losses = kd.row_losses(usual, DenseTargets(t), None, settings, write_gradient=True)
    for shift, gap, rows_ in ((1, 3, 600), (0, 8, 7), (5, 0, 1)):
        memory = torch.zeros(rows * (vocab + gap) + 8, dtype=BF16, device="cuda")
        moved = memory[shift:].as_strided((rows_, vocab), (vocab + gap, 1))
        moved.copy_(s[:rows_])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = kd.row_losses(moved, DenseTargets(t[:rows_]), None, settings, write_gradient=True)
        stream.synchronize()
        assert torch.equal(moved, usual[:rows_])
        assert torch.equal(found[1], losses[1][:rows_])


def test_odd_rows_follow_the_definition() -> None:
    generator = torch.Generator(device="cuda").manual_seed(2)
    for direction, dtype in product(("forward", "reverse"), (BF16, FP32)):
        t = torch.randn(8, 20000, generator=generator, device="cuda")
        s = torch.randn(8, 20000, generator=generator, device="cuda").to(dtype)
        s[0, 5] = torch.nan
        s[1] = -torch.inf
        s[2, 7] = torch.inf
        s[3, 100] = -torch.inf
        t[4, 100] = -torch.inf
        s[5, -7:] = t[5, -7:] = -torch.inf
        t[6, 0] = torch.nan
        settings = KDSettings(2.0, 2.0, kd_scale=0.1, direction=direction)
        exact = reference.row_losses(s.double(), DenseTargets(t.double()), None, settings, gradient=True)
        logits = s.clone()
        _, found = kd.row_losses(logits, DenseTargets(t), None, settings, write_gradient=True)
        assert exact.gradient is not None
        assert torch.allclose(found.double(), exact.kd, rtol=1e-6, atol=1e-5, equal_nan=True)
        assert torch.equal(logits.isnan(), exact.gradient.isnan())
