"""How far a backend is from fp64, beside how far torch is at the same precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from latentforge.kernels.cpu import kd as cpu
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, topk_targets

# What the gradient error may be, as a multiple of torch's own at the same precision. For bf16 both are the rounding of
# the result; for fp32 both are a few units in the last place of different sums, hence the width and the floor.
ALLOWED = {torch.bfloat16: 1.01, torch.float32: 1.5}
GRADIENT_FLOOR = 5e-7
LOSS_FLOOR = 1e-5


@dataclass(frozen=True)
class Case:
    """One comparison: shape, precision, temperature, width of the logits, kind of targets."""

    vocab: int
    student_dtype: torch.dtype
    teacher_dtype: torch.dtype
    temperature: float
    k: int | None = None
    noise: float = 0.7
    width: float = 1.0
    padding: int = 0
    rows: int = 12

    def __str__(self) -> str:
        names = {torch.bfloat16: "bf16", torch.float32: "fp32"}
        kind = "dense" if self.k is None else f"k={self.k}"
        return (
            f"V={self.vocab} {names[self.student_dtype]}/{names[self.teacher_dtype]} T={self.temperature:g} {kind} "
            f"noise {self.noise:g} width {self.width:g} padding {self.padding}"
        )

    def tensors(self, seed: int = 0) -> tuple[Tensor, Targets, Tensor]:
        """Student logits, targets and labels: peaked rows, a student near its teacher, padding, two ignored rows."""
        generator = torch.Generator().manual_seed(seed)
        teacher = torch.randn(self.rows, self.vocab, generator=generator) * 2.2 * self.width
        peaks = torch.rand(self.rows, min(64, self.vocab), generator=generator) * 16.0 * self.width
        for row in range(self.rows):
            teacher[row, torch.randperm(self.vocab, generator=generator)[: peaks.shape[1]]] += peaks[row]
        student = teacher + self.noise * torch.randn(self.rows, self.vocab, generator=generator)
        if self.padding:
            student[:, -self.padding :] = -torch.inf
            teacher[:, -self.padding :] = -torch.inf
        labels = torch.randint(0, self.vocab - self.padding, (self.rows,), generator=generator)
        labels[:2] = -100
        student, teacher = student.to(self.student_dtype), teacher.to(self.teacher_dtype)
        if self.k is None:
            return student, DenseTargets(teacher), labels
        return student, topk_targets(teacher, self.k, self.temperature), labels


@dataclass(frozen=True)
class Parity:
    """One comparison's result; ``gradient_ratio`` is the error over what is allowed."""

    case: Case
    gradient_error: float
    torch_error: float
    gradient_ratio: float
    loss_error: float
    torch_loss_error: float

    @property
    def loss_excess(self) -> float:
        return self.loss_error - self.torch_loss_error

    @property
    def passed(self) -> bool:
        # Comparisons with NaN are false.
        return self.gradient_ratio <= 1.0 and self.loss_error <= max(self.torch_loss_error, LOSS_FLOOR)


def grid() -> Iterator[Case]:
    """Ragged vocabularies, both dtypes on both sides, T in {1, 2, 4}, close and distant students, padding, top-k."""
    bf16, fp32 = torch.bfloat16, torch.float32
    for vocab, dtype, temperature in product((1003, 50257), (bf16, fp32), (1.0, 2.0, 4.0)):
        yield Case(vocab, dtype, dtype, temperature)
        yield Case(vocab, dtype, dtype, temperature, k=32)
        yield Case(vocab, dtype, dtype, temperature, noise=0.02, padding=17)
    for temperature in (1.0, 2.0, 4.0):
        yield Case(2048, bf16, fp32, temperature)
        yield Case(2048, fp32, bf16, temperature)
        yield Case(2048, fp32, fp32, temperature, width=20.0)
        yield Case(2048, bf16, bf16, temperature, width=20.0)


def compare(case: Case, *, isa: str | None = None, disturb: Callable[[Tensor], Tensor] | None = None) -> Parity:
    """Errors of the cpu backend and of torch at the case's precision, both against fp64 on the same logits."""
    student, targets, labels = case.tensors()
    exact_targets = DenseTargets(targets.logits.double()) if isinstance(targets, DenseTargets) else targets
    settings = KDSettings(
        case.temperature, case.temperature, ce_scale=0.3 / case.rows, kd_scale=0.7 * case.temperature**2 / case.rows
    )
    exact = reference.row_losses(student.double(), exact_targets, labels, settings, gradient=True)
    torch_rows = reference.row_losses(student, targets, labels, settings, gradient=True)
    gradient = student.clone()
    ce, kd = cpu.row_losses(gradient, targets, labels, settings, write_gradient=True, isa=isa)
    if disturb is not None:
        gradient = disturb(gradient)
    assert exact.gradient is not None
    assert torch_rows.gradient is not None
    size = exact.gradient.norm()
    error = float((gradient.double() - exact.gradient).norm() / size)
    torch_error = float((torch_rows.gradient.to(student.dtype).double() - exact.gradient).norm() / size)
    allowed = max(ALLOWED[case.student_dtype] * torch_error, GRADIENT_FLOOR)
    return Parity(
        case,
        error,
        torch_error,
        error / allowed,
        float(torch.stack([(ce - exact.ce).abs().max(), (kd - exact.kd).abs().max()]).max()),
        float(torch.stack([(torch_rows.ce - exact.ce).abs().max(), (torch_rows.kd - exact.kd).abs().max()]).max()),
    )
