"""The CUDA kernels of the KD loss compute what the definition says: their logic run under host emulation, not on a GPU.

Every comparison is with the definition in fp64; what is allowed is what torch loses at the same precision.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentforge.kernels.parity.kd import mixed_counts
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets, cut_rows, topk_targets

BF16, FP32 = torch.bfloat16, torch.float32
ALLOWED = {BF16: 1.01, FP32: 1.5}
INF = float("inf")


@dataclass(frozen=True)
class Case:
    """One call: shapes, types, targets, settings, and rows that something is wrong with."""

    vocab: int
    student: torch.dtype = BF16
    teacher: torch.dtype | None = BF16  # None: no teacher
    k: int | None = None
    mixed_k: bool = False
    rows: int = 4
    direction: str = "forward"
    temperature: float = 2.0
    teacher_temperature: float | None = None
    logit_scale: float = 1.0
    soft_cap: float | None = None
    bias: bool = False
    padding: int = 0
    width: float = 4.0
    noise: float = 0.7
    labels: bool = True
    kd_scale: float = 0.35
    ce_scale: float = 0.08
    seed: int = 0

    def __str__(self) -> str:
        usual = {f.name: f.default for f in fields(self)}
        return " ".join(f"{name}={value}" for name, value in vars(self).items() if value != usual[name])

    def settings(self) -> KDSettings:
        return KDSettings(
            self.temperature,
            self.teacher_temperature or self.temperature,
            ce_scale=self.ce_scale,
            kd_scale=self.kd_scale,
            direction=self.direction,
            logit_scale=self.logit_scale,
            soft_cap=self.soft_cap,
        )

    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Student, teacher's logits, labels, bias."""
        generator = torch.Generator().manual_seed(self.seed)
        t = torch.randn(self.rows, self.vocab, generator=generator) * self.width
        s = t + self.noise * torch.randn(self.rows, self.vocab, generator=generator)
        padding = min(self.padding, self.vocab - 1)
        if padding:
            s[:, -padding:] = t[:, -padding:] = -INF
        labels = torch.randint(0, self.vocab - padding, (self.rows,), generator=generator)
        if self.rows > 2:
            labels[1] = -100
        bias = torch.randn(self.vocab, generator=generator) if self.bias else None
        teacher = None if self.teacher is None else t.to(self.teacher)
        return s.to(self.student), teacher, labels if self.labels else None, bias

    def targets(self, teacher: Tensor | None) -> Targets | None:
        if teacher is None:
            return None
        if self.k is None:
            return DenseTargets(teacher)
        temperature = self.teacher_temperature or self.temperature
        targets = topk_targets(teacher, min(self.k, self.vocab), temperature)
        return cut_rows(targets, mixed_counts(self.rows, self.k), temperature) if self.mixed_k else targets


def doubled(targets: Targets | None) -> Targets | None:
    return DenseTargets(targets.logits.double()) if isinstance(targets, DenseTargets) else targets


def compare(
    emulation: Any, case: Case, disturb: Callable[[Tensor, Tensor | None], None] | None = None, **place: Any
) -> None:
    """Losses, gradient and what is not finite, row by row, against the definition in fp64."""
    s, teacher, labels, bias = case.tensors()
    if disturb is not None:
        disturb(s, teacher)
    targets = case.targets(teacher)
    settings_ = case.settings()
    exact = reference.row_losses(s.double(), doubled(targets), labels, settings_, bias=bias, gradient=True)
    torch_ = reference.row_losses(s, targets, labels, settings_, bias=bias, gradient=True)
    ce, kd, gradient = emulation.row_losses(s, targets, labels, settings_, bias=bias, **place)
    assert exact.gradient is not None
    assert torch_.gradient is not None
    for name, found, wanted, usual in (("ce", ce, exact.ce, torch_.ce), ("kd", kd, exact.kd, torch_.kd)):
        same_kind = torch.equal(found.isnan(), wanted.isnan()) and torch.equal(found.isinf(), wanted.isinf())
        assert same_kind, f"{case}: {name} {found.tolist()}, not {wanted.tolist()}"
        # Masks of -3e38 against a probability: differences of logits are bounded at 1e30 in the kernels.
        assert bool((found[wanted > 1e20] > 1e20).all())
        fine = wanted.abs() < 1e20
        error, allowed = (found - wanted)[fine].abs(), (usual - wanted)[fine].abs()
        assert bool((error <= torch.clamp(allowed, min=1e-5)).all()), f"{case}: {name} off by {error.tolist()}"
    assert torch.equal(gradient.isnan(), exact.gradient.isnan()), f"{case}: NaN elsewhere in the gradient"
    size = case.kd_scale / case.temperature + case.ce_scale
    for row in range(case.rows):
        g, e, u = gradient[row].double(), exact.gradient[row], torch_.gradient[row].to(case.student).double()
        if bool(e.isnan().any()) or float(exact.kd[row]) > 1e20:
            continue
        error, usual_error = float((g - e).norm()), float((u - e).nan_to_num(0).norm())
        floor = 5e-7 * (float(e.norm()) + size) * max(1.0, float(exact.kd[row].clamp(max=100)))
        assert error <= max(ALLOWED[case.student] * usual_error, floor), (
            f"{case}: gradient of row {row} off by {error:.2e}"
        )


PAIRS = list(product((BF16, FP32), (BF16, FP32)))
BATTERY = [
    *(Case(1003, s, t, direction=d) for (s, t), d in product(PAIRS, ("forward", "reverse"))),
    *(Case(1003, s, FP32, k=32, direction=d, temperature=t)
      for s, d, t in product((BF16, FP32), ("forward", "reverse"), (1.0, 3.0))),
    *(Case(1003, s, None, temperature=3.0, padding=5) for s in (BF16, FP32)),
    *(Case(700, s, FP32, k=k, direction=d, temperature=1.5, teacher_temperature=2.5, logit_scale=0.7, soft_cap=6.0,
           bias=True, padding=3)
      for s, k, d in product((BF16, FP32), (None, 9), ("forward", "reverse"))),
    Case(2048, padding=900, temperature=3.0),
    Case(40000, padding=17, rows=3),
    Case(40001, FP32, FP32, k=64, rows=3, padding=17),
    Case(40001, k=64, rows=3, temperature=1.0, direction="reverse"),
    *(Case(20011, s, k=24, mixed_k=True, rows=7, direction=d)
      for s, d in product((BF16, FP32), ("forward", "reverse"))),
    Case(333, FP32, FP32, k=333), Case(1, FP32, FP32), Case(7, FP32, BF16, k=3),
    Case(1003, labels=False), Case(1003, ce_scale=0.0), Case(1003, kd_scale=0.0, direction="reverse"),
    Case(1003, FP32, FP32, width=60.0, noise=20.0, temperature=1.0),
]  # fmt: skip


def odd_rows(s: Tensor, t: Tensor | None) -> None:
    """One thing each that a row may have wrong with it."""
    vocab = s.shape[1]
    s[0, 3] = torch.nan
    s[1, 5] = torch.nan  # an ignored row
    s[2, vocab // 2] = INF
    s[3] = -INF
    s[4, 11] = -INF  # excluded by the student alone
    s[6, -4:] = -INF
    if t is not None:
        t[5, 2] = -INF  # excluded by the teacher alone
        t[6, -4:] = -INF
        t[7, 9] = torch.nan
        t[8] = -INF
        t[9, 3:] = torch.finfo(t.dtype).min  # masks that are numbers
        s[9, 3:] = torch.finfo(s.dtype).min
        t[10, 5:] = -1e9
        s[10, 5:] = -INF


ODD = [
    Case(2100, s, t, rows=12, direction=d, temperature=x, soft_cap=c, labels=lab)
    for (s, t), d, (x, c, lab) in product(
        ((BF16, BF16), (FP32, BF16), (FP32, FP32)),
        ("forward", "reverse"),
        ((1.0, None, True), (2.0, None, False), (3.0, 8.0, True)),
    )
]  # fmt: skip


def odd_topk(emulation: Any) -> None:
    """Tails of all sizes, entries and tails without probability on either side."""
    vocab, rows, k = 600, 10, 5
    for direction, dtype in product(("forward", "reverse"), (BF16, FP32)):
        generator = torch.Generator().manual_seed(3)
        s = (torch.randn(rows, vocab, generator=generator) * 3).to(dtype)
        t = torch.randn(rows, vocab, generator=generator) * 3
        made = topk_targets(t, k, 2.0)
        ids, logprobs, tail = made.ids.clone(), made.logprobs.clone(), made.tail.clone()
        outside = torch.ones(rows, vocab, dtype=torch.bool).scatter(1, ids, False)
        s[0][outside[0]] -= 50.0  # a tail of the student of 1e-12 at T = 2
        tail[0] = -30.0
        s[1][outside[1]] -= 500.0  # far under fp32
        s[2][outside[2]] = -INF
        tail[3] = -INF
        s[4][~outside[4]] = -INF
        logprobs[5, 2] = -INF
        logprobs[6, 1] = torch.nan
        tail[7] = torch.nan
        s[8, int(ids[8, 0])] = torch.nan
        logprobs[9], tail[9] = -INF, -INF
        targets = TopKTargets(ids.int(), logprobs, tail)
        labels = torch.randint(0, vocab, (rows,), generator=generator)
        labels[0] = ids[0, 1]
        labels[8] = 3
        case = Case(vocab, dtype, FP32, k=k, rows=rows, direction=direction)
        exact = reference.row_losses(s.double(), targets, labels, case.settings(), gradient=True)
        usual = reference.row_losses(s, targets, labels, case.settings(), gradient=True)
        ce, kd, gradient = emulation.row_losses(s, targets, labels, case.settings())
        assert torch.equal(kd.isnan(), exact.kd.isnan()), (direction, kd, exact.kd)
        assert torch.equal(kd.isinf(), exact.kd.isinf()), (direction, kd, exact.kd)
        fine = exact.kd.isfinite()
        assert torch.allclose(kd[fine].double(), exact.kd[fine], rtol=1e-6, atol=1e-5), (direction, kd, exact.kd)
        assert torch.allclose(ce.double(), exact.ce, rtol=1e-6, atol=1e-5, equal_nan=True)
        assert exact.gradient is not None
        assert usual.gradient is not None
        assert torch.equal(gradient.isnan(), exact.gradient.isnan())
        whole = ~exact.gradient.isnan().any(1)
        error = (gradient.double() - exact.gradient)[whole].norm(dim=1)
        allowed = (usual.gradient.to(dtype).double() - exact.gradient)[whole].nan_to_num(0).norm(dim=1)
        assert bool((error <= torch.clamp(allowed * ALLOWED[dtype], min=1e-6 * 20)).all()), (direction, error, allowed)


def small_tails(emulation: Any) -> None:
    """What moves the tokens outside is right to their own scale, whatever the tail is beside the whole."""
    generator = torch.Generator().manual_seed(5)
    s = torch.randn(3, 400, generator=generator)
    s[:, 7] += torch.tensor([20.0, 40.0, 60.0])
    ids = torch.full((3, 1), 7)
    targets = TopKTargets(ids, torch.zeros(3, 1), torch.tensor([-25.0, -25.0, -50.0]))
    for direction in ("forward", "reverse"):
        wanted = reference.row_losses(
            s.double(), targets, None, KDSettings(1.0, 1.0, kd_scale=1.0, direction=direction), gradient=True
        ).gradient
        assert wanted is not None
        _, _, gradient = emulation.row_losses(s, targets, None, KDSettings(1.0, 1.0, kd_scale=1.0, direction=direction))
        outside = torch.arange(400) != 7
        error = (gradient.double() - wanted)[:, outside].norm(dim=1) / wanted[:, outside].norm(dim=1)
        assert float(error.max()) < 2e-5, f"{direction}: {error.tolist()}"


def misplaced(emulation: Any, places: Callable[..., Any]) -> None:
    """Addresses, gaps between rows, the order of threads and blocks and the batch change no bit."""
    for case in (
        Case(5003, rows=5),
        Case(5003, FP32, BF16, rows=5, direction="reverse"),
        Case(20011, FP32, FP32, k=20),
    ):
        s, teacher, labels, bias = case.tensors()
        targets = case.targets(teacher)
        usual = emulation.row_losses(s, targets, labels, case.settings(), bias=bias)
        for shift, other, gap, order, cache in (
            (1, 0, 0, 1, 1 << 16),
            (3, 2, 5, 2, 1 << 30),
            (0, 1, 8, 3, 0),
            (2, 2, 1, 0, 1 << 18),
        ):
            place = places(shift, other, gap, order, multiprocessors=1 + order, cache_bytes=cache)
            moved = emulation.row_losses(s, targets, labels, case.settings(), bias=bias, place=place)
            for name, a, b in zip(("ce", "kd", "gradient"), usual, moved, strict=True):
                assert torch.equal(a, b), f"{case}, {place}: {name} has other bits"
        row = 3
        one = None
        if isinstance(targets, DenseTargets):
            one = DenseTargets(targets.logits[row : row + 1])
        elif isinstance(targets, TopKTargets):
            one = TopKTargets(targets.ids[row : row + 1], targets.logprobs[row : row + 1], targets.tail[row : row + 1])
        assert labels is not None
        alone = emulation.row_losses(s[row : row + 1], one, labels[row : row + 1], case.settings())
        for name, a, b in zip(("ce", "kd", "gradient"), usual, alone, strict=True):
            assert torch.equal(a[row : row + 1], b), f"{case}: {name} of a row depends on the others"


def battery(emulation: Any, places: Callable[..., Any]) -> None:
    """All fixed comparisons; a fault in the kernels must fail here."""
    for case in BATTERY:
        compare(emulation, case)
    for case in ODD:
        compare(emulation, case, odd_rows)
    odd_topk(emulation)
    small_tails(emulation)
    misplaced(emulation, places)


@pytest.mark.parametrize("case", BATTERY, ids=str)
def test_losses_and_gradient_are_the_definition(emulation: Any, case: Case) -> None:
    compare(emulation, case)


@pytest.mark.parametrize("case", ODD, ids=str)
def test_rows_with_nan_infinities_and_masks_follow_the_definition_row_by_row(emulation: Any, case: Case) -> None:
    compare(emulation, case, odd_rows)


def test_tails_of_all_sizes_and_entries_without_probability_follow_the_definition(emulation: Any) -> None:
    odd_topk(emulation)
    small_tails(emulation)


def test_addresses_orders_and_batches_change_no_bit(emulation: Any, places: Callable[..., Any]) -> None:
    misplaced(emulation, places)


def test_a_call_without_gradient_writes_nothing_and_gives_the_same_losses(emulation: Any) -> None:
    for case in (Case(5003, rows=5), Case(1003, FP32, FP32, k=20), Case(1003, teacher=None)):
        s, teacher, labels, _ = case.tensors()
        targets = case.targets(teacher)
        ce, kd, _ = emulation.row_losses(s, targets, labels, case.settings())
        ce_only, kd_only, left = emulation.row_losses(s, targets, labels, case.settings(), write_gradient=False)
        assert torch.equal(ce, ce_only)
        assert torch.equal(kd, kd_only)
        assert torch.equal(left, s)


def test_no_rows_and_only_ignored_rows_are_nothing(emulation: Any) -> None:
    case = Case(100)
    none = torch.zeros(0, 100, dtype=BF16)
    labels = torch.zeros(0, dtype=torch.int64)
    ce, kd, gradient = emulation.row_losses(none, DenseTargets(none), labels, case.settings())
    assert ce.numel() == kd.numel() == gradient.numel() == 0
    s, teacher, labels, _ = case.tensors()
    assert labels is not None
    s[0] = torch.nan
    for found in emulation.row_losses(s, case.targets(teacher), torch.full_like(labels, -100), case.settings()):
        assert not bool(found.any())


def test_the_same_logits_on_both_sides_have_no_gradient_at_all(emulation: Any) -> None:
    for dtype in (BF16, FP32):
        case = Case(3001, dtype, dtype, noise=0.0, ce_scale=0.0)
        s, teacher, labels, _ = case.tensors()
        _, kd, gradient = emulation.row_losses(s, case.targets(teacher), labels, case.settings())
        assert not bool(gradient.any())
        assert float(kd.abs().max()) < 1e-6


VOCABS = st.one_of(st.integers(1, 40), st.integers(2040, 2060), st.integers(16376, 16392), st.integers(33000, 33020))


@st.composite
def cases(draw: st.DrawFn) -> Case:
    k = draw(st.one_of(st.none(), st.integers(1, 128)))
    return Case(
        vocab=draw(VOCABS),
        student=draw(st.sampled_from((BF16, FP32))),
        teacher=FP32 if k is not None else draw(st.sampled_from((BF16, FP32, None))),
        k=k,
        mixed_k=draw(st.booleans()) if k is not None else False,
        rows=draw(st.integers(1, 3)),
        direction=draw(st.sampled_from(("forward", "reverse"))),
        temperature=draw(st.sampled_from((0.7, 1.0, 2.0, 3.0))),
        teacher_temperature=draw(st.sampled_from((None, 1.0, 2.5))),
        logit_scale=draw(st.sampled_from((1.0, 0.6))),
        soft_cap=draw(st.sampled_from((None, 20.0))),
        bias=draw(st.booleans()),
        padding=draw(st.integers(0, 12)),
        width=draw(st.sampled_from((0.5, 4.0, 12.0))),
        noise=draw(st.sampled_from((0.02, 1.0))),
        labels=draw(st.booleans()),
        seed=draw(st.integers(0, 10_000)),
    )


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=cases(), shift=st.integers(0, 7), other=st.integers(0, 7), gap=st.integers(0, 9), order=st.integers(0, 50))
def test_any_shape_type_and_place_gives_the_definition(
    emulation: Any, places: Callable[..., Any], case: Case, shift: int, other: int, gap: int, order: int
) -> None:
    student_shift = shift % (16 // torch.empty(0, dtype=case.student).element_size())
    teacher_shift = other % 4
    compare(emulation, case, place=places(student_shift, teacher_shift, gap, order))


# Each a mistake that a hand could make in the kernels: (what, file, text, text in its place).
FAULTS = [
    ("the gap is not rescaled with the maxima", "kd_sums.cuh", "(a.gap + a.teacher_sum * (ds - dt))", "(a.gap)"),
    ("the sum at temperature 1 is rescaled by the factor at T", "kd_sums.cuh",
     "a.top == minus_infinity() ? 0.0f : at_one<Exp>(factor, a.top - top, p)", "factor"),
    ("a warp's sum misses its last exchange", "device.cuh", "step > 0; step /= 2) x +=", "step > 1; step /= 2) x +="),
    ("the tail is what the top-k leaves of one", "kd_terms.cuh", "const float q_tail = out.sum / sum,",
     "const float q_tail = 1.0f - in.sum / sum,"),
    ("marked columns are overwritten before the fix-ups", "kd_gradient.cuh",
     "if (stop[u] - column[u] == kWindow && entries == 0)", "if (stop[u] - column[u] == kWindow)"),
    ("the bits of a window that straddles two words are lost", "kd_sweep.cuh",
     "static_cast<uint64_t>(words[offset / 32 + 1]) << 32 | words[offset / 32]", "words[offset / 32]"),
    ("a misaligned row is read in vectors", "kd_sweep.cuh",
     "student_aligned && column + kWindow <= end", "column + kWindow <= end"),
    ("a window reads past the end of the row", "kd_window.cuh",
     "return column < end ? row[column].bits : 0xff80u;", "return row[column].bits;"),
    ("the head of a misaligned row is left out", "kd_gradient.cuh", "const int before = head != 0 ? 1 : 0;",
     "const int before = 0;"),
    ("the head's window reaches into the body", "kd_gradient.cuh",
     "const int next = w < before ? body : column[u] + kWindow;", "const int next = column[u] + kWindow;"),
    ("the label's minus one is in the wrong column", "kd_gradient.cuh", "label - column[u]);",
     "label + 1 - column[u]);"),
    ("an ignored row is computed", "kd_gradient.cuh", "const bool skipped = ignored(p, row);",
     "const bool skipped = false;"),
    ("reverse KL forgets its row's mean", "kd_gradient.cuh", "(in_nats(gap) - r.kd)", "in_nats(gap)"),
    ("minus infinity of the student under a probability is free", "kd_sums.cuh",
     "a.excluded = fmaxf(a.excluded, p.call.reverse ? s : t);", ";"),
    ("a bad row's flag is lost", "kd_terms.cuh", "r.poisoned = !(sum > 0.0f) || isnan(r.kd);", "r.poisoned = false;"),
    ("the cap has no slope", "kd_window.cuh", "p.scale * (1.0f - part * part)", "p.scale"),
    ("the last slice is never written", "kd_step.cuh", "call.write_gradient ? p.slices : 1",
     "call.write_gradient && p.slices > 1 ? p.slices - 1 : 1"),
    ("which thread sums what depends on the address", "kd_sweep.cuh",
     "static_cast<int>(threadIdx.x) * kWindow; first < end;",
     "static_cast<int>((threadIdx.x + reinterpret_cast<uintptr_t>(student)) % kThreads) * kWindow; first < end;"),
    ("bf16 is cut instead of rounded", "device.cuh",
     "return lf_host::round_bf16(low) | lf_host::round_bf16(high) << 16;",
     "return lf_host::bits_of(low) >> 16 | (lf_host::bits_of(high) & 0xffff0000u);"),
    ("an absent entry is taken for a token", "kd_sweep.cuh",
     "? static_cast<const int64_t*>(p.call.topk_ids)[entry]",
     "? (static_cast<const int64_t*>(p.call.topk_ids)[entry] & 0x7)"),
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


def test_the_battery_passes_on_the_kernels_as_they_are(emulation: Any, places: Callable[..., Any]) -> None:
    battery(emulation, places)
