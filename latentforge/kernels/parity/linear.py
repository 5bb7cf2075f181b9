"""How far ``linear_kd_loss`` is from fp64, beside torch with logits rounded to the tensors' precision."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from latentforge.kernels.parity import where
from latentforge.kernels.parity.finding import Parity, disagreements, distance
from latentforge.kernels.parity.kd import ALLOWED, GRADIENT_FLOOR, LOSS_FLOOR, NAMES, loss_distance, mixed_counts
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, LinearTargets, Targets, TopKTargets, cut_rows, topk_targets

# Where teacher and student agree this closely, logits that were rounded to bf16 first spoil the gradient; ours must be
# this many times better (reference: the differences that the gradient is made of are smaller than that rounding).
CLOSE_KL = 0.01
REQUIRED_GAIN = 10.0
BF16, FP32 = torch.bfloat16, torch.float32


@dataclass(frozen=True)
class Case:
    """One comparison; ``k`` None: the teacher is a linear layer of width ``teacher_hidden``.

    ``noise`` moves the teacher's hidden rows away from the student's; 1 makes two unrelated models.
    """

    rows: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    temperature: float
    k: int | None = None
    teacher_hidden: int | None = None
    noise: float = 1.0
    ce: float = 0.3
    bias: bool = False
    frozen: bool = False
    logit_scale: float = 1.0
    soft_cap: float | None = None
    direction: str = "forward"
    chunk_rows: int | None = None
    all_masked: bool = False
    mixed_k: bool = False

    def __str__(self) -> str:
        kind = f"k={self.k}" if self.k is not None else f"teacher H={self.teacher_hidden or self.hidden}"
        said = [
            f"N={self.rows} H={self.hidden} V={self.vocab} {NAMES[self.dtype]} T={self.temperature:g} {kind}",
            f"{self.direction} noise {self.noise:g}",
        ]
        said += ["KL alone"] if self.ce == 0.0 else []
        said += ["bias"] if self.bias else []
        said += ["frozen head"] if self.frozen else []
        said += [f"scale {self.logit_scale:g}"] if self.logit_scale != 1.0 else []
        said += [f"cap {self.soft_cap:g}"] if self.soft_cap is not None else []
        said += [f"{self.chunk_rows} rows at a time"] if self.chunk_rows is not None else []
        said += ["all masked"] if self.all_masked else []
        said += ["mixed k"] if self.mixed_k else []
        return ", ".join(said)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Targets | LinearTargets, Tensor]:
        """Hidden rows, weight, bias, targets and labels."""
        generator = torch.Generator().manual_seed(5)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        hidden = normal(self.rows, self.hidden)
        weight = (normal(self.vocab, self.hidden) * (3.0 / self.hidden**0.5)).to(self.dtype)
        bias = normal(self.vocab).to(self.dtype) if self.bias else None
        near = self.teacher_hidden is None
        teacher_weight = weight if near else normal(self.vocab, self.teacher_hidden or 0) * 3.0
        if near:
            teacher_hidden = (hidden + self.noise * normal(self.rows, self.hidden)).to(self.dtype)
        else:
            teacher_weight = (teacher_weight / (self.teacher_hidden or 1) ** 0.5).to(self.dtype)
            teacher_hidden = normal(self.rows, self.teacher_hidden or 0).to(self.dtype)
        labels = torch.randint(0, self.vocab, (self.rows,), generator=generator)
        labels[:2] = -100
        if self.all_masked:
            labels[:] = -100
        targets: Targets | LinearTargets
        if self.k is None:
            targets = LinearTargets(teacher_hidden, teacher_weight, bias if near else None)
        else:
            logits = teacher_hidden.double() @ teacher_weight.double().T
            targets = topk_targets(logits, self.k, self.temperature)
            if self.mixed_k:
                targets = cut_rows(targets, mixed_counts(self.rows, self.k), self.temperature)
        return hidden.to(self.dtype), weight, bias, targets, labels

    @property
    def settings(self) -> KDSettings:
        """The loss over given logits."""
        rows = max(self.rows, 1)
        return KDSettings(
            self.temperature,
            self.temperature,
            ce_scale=self.ce / rows,
            kd_scale=0.7 * self.temperature**2 / rows,
            direction=self.direction,
            logit_scale=self.logit_scale,
            soft_cap=self.soft_cap,
        )


def grid(*, quick: bool = False) -> Iterator[tuple[str, Case]]:
    """(group, case): both kinds of targets, close pairs, bias, frozen head, shaped logits, chunks, edges."""
    for dtype in (BF16, FP32):
        for temperature in (2.0,) if quick else (1.0, 2.0, 4.0):
            yield "top-k", Case(24, 96, 1003, dtype, temperature, k=32)
            yield "teacher's layer", Case(24, 96, 1003, dtype, temperature, teacher_hidden=160)
        yield "bias, scale, cap", Case(16, 64, 777, dtype, 2.0, k=16, bias=True)
        yield "bias, scale, cap", Case(16, 64, 777, dtype, 2.0, k=16, bias=True, logit_scale=0.5, soft_cap=20.0)
        yield "bias, scale, cap", Case(16, 64, 777, dtype, 1.0, bias=True, soft_cap=20.0)
        yield "frozen head", Case(16, 64, 777, dtype, 2.0, k=16, frozen=True)
        yield "reverse", Case(16, 64, 777, dtype, 2.0, k=16, direction="reverse")
        yield "reverse", Case(16, 64, 777, dtype, 2.0, teacher_hidden=64, direction="reverse")
        yield "chunks", Case(50, 64, 777, dtype, 2.0, k=16, chunk_rows=7)
        yield "chunks", Case(50, 64, 777, dtype, 2.0, teacher_hidden=96, chunk_rows=7)
        for chunk_rows, direction in ((None, "forward"), (7, "forward"), (7, "reverse")):
            yield (
                "mixed k",
                Case(50, 64, 777, dtype, 2.0, k=16, direction=direction, chunk_rows=chunk_rows, mixed_k=True),
            )
        yield "edges", Case(16, 64, 777, dtype, 2.0, k=16, all_masked=True)
        yield "edges", Case(0, 64, 777, dtype, 2.0, k=16)
    for noise, k in product((0.01, 0.02), (None, 777)):
        yield "close pair", Case(64, 256, 777, BF16, 1.0, k=k, noise=noise, ce=0.0)
    if not quick:
        yield "close pair", Case(48, 512, 32768, BF16, 1.0, noise=0.02, ce=0.0)
        yield "ragged vocabulary", Case(8, 64, 151936, BF16, 2.0, k=64)
        yield "ragged vocabulary", Case(8, 64, 50257, FP32, 1.0, teacher_hidden=48)


@dataclass(frozen=True)
class Gradients:
    """The loss, and the gradients of hidden [N, H], weight [V, H] and bias [V] that there are."""

    loss: Tensor
    hidden: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def as_list(self) -> list[Tensor]:
        """Those gradients that there are."""
        return [tensor for tensor in (self.hidden, self.weight, self.bias) if tensor is not None]


def by_definition(case: Case, precision: torch.dtype) -> Gradients:
    """Logits as a tensor of ``precision``, then the reference loss, then two products: the definition in fp64.

    In the case's own precision it is what torch users write: logits rounded to that precision first.
    """
    hidden, weight, bias, targets, labels = case.tensors()
    h, w = hidden.to(precision), weight.to(precision)
    logits = h @ w.T
    if isinstance(targets, LinearTargets):
        teacher = targets.hidden.to(precision) @ targets.weight.to(precision).T
        if targets.bias is not None:
            teacher = teacher + targets.bias.to(precision)
        dense: Targets = DenseTargets(teacher)
    else:
        assert isinstance(targets, DenseTargets | TopKTargets)
        dense = targets
    found = reference.row_losses(logits, dense, labels, case.settings, bias=bias, gradient=True)
    assert found.gradient is not None
    gradient = found.gradient.to(precision)
    weights = (case.ce, 0.7 * case.temperature**2)
    loss = (weights[0] * found.ce.sum() + weights[1] * found.kd.sum()) / max(case.rows, 1)
    return Gradients(
        loss,
        gradient @ w,
        None if case.frozen else gradient.T @ h,
        None if bias is None else gradient.sum(0),
    )


def by_backend(case: Case, backend: str) -> Gradients:
    """The gradients that autograd leaves after ``linear_kd_loss``."""
    from latentforge.kernels.linear import linear_kd_loss

    device = where.device_of(backend)
    hidden, weight, bias, targets, labels = case.tensors()
    leaves = [tensor.to(device) for tensor in (hidden, weight) + (() if bias is None else (bias,))]
    h, w, b = leaves[0], leaves[1], leaves[2] if bias is not None else None
    for leaf in leaves:
        leaf.requires_grad_()
    w.requires_grad_(not case.frozen)
    moved = type(targets)(*(value.to(device) if isinstance(value, Tensor) else value for value in _fields(targets)))
    found = linear_kd_loss(
        h,
        w,
        moved,
        labels.to(device),
        bias=b,
        temperature=case.temperature,
        ce_weight=case.ce,
        kd_weight=0.7,
        direction=case.direction,
        denominator=float(max(case.rows, 1)),
        logit_scale=case.logit_scale,
        soft_cap=case.soft_cap,
        chunk_rows=case.chunk_rows,
        backend=backend,
    )
    found.loss.backward()
    grads = [None if leaf is None or leaf.grad is None else leaf.grad.cpu() for leaf in (h, w, b)]
    assert grads[0] is not None
    return Gradients(found.loss.detach().cpu(), grads[0], grads[1], grads[2])


def _fields(targets: object) -> list[object]:
    return [getattr(targets, name) for name in type(targets).__dataclass_fields__]  # type: ignore[attr-defined]


def compare(
    case: Case,
    backend: str = "cpu",
    *,
    disturb: Callable[[Tensor], Tensor] | None = None,
    produce: Callable[[Case], Gradients] | None = None,
) -> Parity:
    """The worst of the gradients' errors over what is allowed; for a close pair also the gain over rounded logits.

    ``disturb`` changes each gradient before it is judged, ``produce`` stands in for the backend (planted faults).
    """
    exact, rounded, found = (
        by_definition(case, torch.float64),
        by_definition(case, case.dtype),
        by_backend(case, backend) if produce is None else produce(case),
    )
    gradients = found.as_list() if disturb is None else [disturb(gradient) for gradient in found.as_list()]
    worst = (0.0, 0.0, 0.0)
    missing = abs(len(gradients) - len(exact.as_list()))
    gain = None
    for ours, theirs, truth in zip(gradients, rounded.as_list(), exact.as_list(), strict=False):
        error, torch_error = distance(ours, truth), distance(theirs, truth)
        allowed = max(ALLOWED[case.dtype] * torch_error, GRADIENT_FLOOR)
        if not error / allowed <= worst[2]:
            worst = (error, torch_error, error / allowed)
        missing += disagreements(ours, truth)
        if case.noise <= 0.05:
            this = torch_error / error if error > 0 else torch.inf
            gain = this if gain is None else min(gain, this)
    return Parity(
        str(case),
        *worst,
        loss_distance(found.loss, exact.loss),
        loss_distance(rounded.loss, exact.loss),
        loss_floor=LOSS_FLOOR,
        disagreements=missing,
        gain=gain,
        gain_floor=REQUIRED_GAIN,
    )
