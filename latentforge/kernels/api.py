"""The calls: what is accepted, what is refused, and which backend does the work."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentforge.errors import RefusedError
from latentforge.kernels import autograd, cpu, reference
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets

BACKENDS = ("auto", "reference", "cpu")
LOGIT_DTYPES = (torch.bfloat16, torch.float32, torch.float64)


class KDLoss(NamedTuple):
    """``loss`` is the differentiable scalar; ``ce`` and ``kd`` are its detached parts, unweighted.

    All are sums over the rows divided by the denominator; ``kd`` contains T squared, and is NaN where no targets were
    given. fp32, or fp64 where the logits are.
    """

    loss: Tensor
    ce: Tensor
    kd: Tensor


def kd_loss(
    student_logits: Tensor,
    targets: Targets | None,
    labels: Tensor,
    *,
    temperature: float,
    teacher_temperature: float | None = None,
    ce_weight: float,
    kd_weight: float,
    direction: str = "forward",
    denominator: float,
    ignore_index: int = -100,
    backend: str = "auto",
) -> KDLoss:
    """(ce_weight * sum CE + kd_weight * T^2 * sum KL(teacher || student)) / denominator; the gradient in one go.

    ``student_logits`` [N, V] bf16 or fp32 (fp64 with ``reference``), padding as minus infinity; ``targets`` dense or
    top-k, of the same N (None only with kd_weight = 0); ``labels`` [N] int64, rows labelled ``ignore_index`` count
    nothing. ``denominator`` is the number of valid rows of the whole optimiser step. ``teacher_temperature`` is that of
    the teacher's distribution where it differs from ``temperature``.

    Where a gradient is wanted **the logits are overwritten by it**; leaves, views and parts of larger tensors are
    refused. Without grad nothing is written. RefusedError names what is refused. Definition and source: ``reference``.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    _check_settings(temperature, teacher_temperature, ce_weight, kd_weight, direction, denominator)
    _check_tensors(student_logits, targets, labels)
    if targets is None and kd_weight != 0:
        raise RefusedError(f"kd_weight = {kd_weight:g}, but there are no targets", next="pass targets or kd_weight=0")
    chosen = choose_backend(student_logits, targets, backend)

    dense = targets.logits if isinstance(targets, DenseTargets) else None
    topk = (targets.ids, targets.logprobs, targets.tail) if isinstance(targets, TopKTargets) else (None, None, None)
    tensors = (dense, *topk, labels)
    settings = (
        float(temperature),
        float(teacher_temperature),
        float(ce_weight),
        float(kd_weight),
        float(denominator),
        int(ignore_index),
        chosen,
    )
    dtype = reference.compute_dtype(student_logits)
    if student_logits.requires_grad and torch.is_grad_enabled():
        if not torch.compiler.is_compiling():
            autograd.refuse_logits_of_others(student_logits)
        loss, parts = autograd.KDFunction.apply(student_logits, tensors, settings, (float(ce_weight), float(kd_weight)))
    else:
        parts = autograd.kd_parts(student_logits, *tensors, *settings)
        loss = autograd.weighted(parts, float(ce_weight), float(kd_weight), dtype)
    ce, kd = parts[0].to(dtype), parts[1].to(dtype)
    # What was not computed must not look like agreement.
    return KDLoss(loss, ce, torch.full_like(kd, torch.nan) if targets is None else kd)


@torch.no_grad()
def kd_divergence(
    student_logits: Tensor,
    targets: Targets,
    temperature: float,
    *,
    teacher_temperature: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """KL(teacher || student) at ``temperature`` of each row, [N] fp32 (fp64 where the logits are), without T squared.

    For evaluation: nothing is written and nothing is differentiable. Arguments as in ``kd_loss``.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    _check_settings(temperature, teacher_temperature, 0.0, 1.0, "forward", 1.0)
    _check_tensors(student_logits, targets, None)
    if choose_backend(student_logits, targets, backend) == "cpu":
        _, kd = cpu.row_losses(
            student_logits, targets, None, temperature=temperature, teacher_temperature=teacher_temperature
        )
        return kd.to(torch.float32)
    cpu.check_indices(targets, None, student_logits.shape[1], -100)
    return reference.divergence(
        student_logits, targets, temperature=temperature, teacher_temperature=teacher_temperature
    )


class KDCriterion(nn.Module):
    """``kd_loss`` with its settings held: ``criterion(logits, targets, labels, denominator)``."""

    def __init__(
        self,
        *,
        temperature: float,
        ce_weight: float,
        kd_weight: float,
        teacher_temperature: float | None = None,
        ignore_index: int = -100,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        of_teacher = temperature if teacher_temperature is None else teacher_temperature
        _check_settings(temperature, of_teacher, ce_weight, kd_weight, "forward", 1.0)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.ignore_index = ignore_index
        self.backend = backend

    def forward(self, student_logits: Tensor, targets: Targets | None, labels: Tensor, denominator: float) -> KDLoss:
        return kd_loss(
            student_logits,
            targets,
            labels,
            temperature=self.temperature,
            teacher_temperature=self.teacher_temperature,
            ce_weight=self.ce_weight,
            kd_weight=self.kd_weight,
            denominator=denominator,
            ignore_index=self.ignore_index,
            backend=self.backend,
        )


def choose_backend(student_logits: Tensor, targets: Targets | None, backend: str) -> str:
    """The backend that will run: by name, or by device. RefusedError where it cannot."""
    if backend not in BACKENDS:
        raise RefusedError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    device = student_logits.device.type
    teacher = targets.logits.dtype if isinstance(targets, DenseTargets) else None
    exact = torch.float64 in (student_logits.dtype, teacher)
    if backend == "reference":
        return backend
    if device != "cpu":
        raise RefusedError(
            f"the logits are on {student_logits.device}; this version has no kernel for {device} tensors",
            next="pass backend='reference', or move the logits to the CPU",
        )
    if backend == "auto" and exact:
        return "reference"
    if backend == "cpu" and exact:
        raise RefusedError("the cpu backend computes in fp32, the logits are fp64", next="pass backend='reference'")
    return "cpu"


def _check_settings(
    temperature: float,
    teacher_temperature: float,
    ce_weight: float,
    kd_weight: float,
    direction: str,
    denominator: float,
) -> None:
    for name, value in (("temperature", temperature), ("teacher_temperature", teacher_temperature)):
        if not (math.isfinite(value) and value > 0):
            raise RefusedError(f"{name} = {value} is not a positive number")
    for name, value in (("ce_weight", ce_weight), ("kd_weight", kd_weight)):
        if not (math.isfinite(value) and value >= 0):
            raise RefusedError(f"{name} = {value} is not a number of at least 0")
    if ce_weight == 0 and kd_weight == 0:
        raise RefusedError(f"ce_weight = {ce_weight} and kd_weight = {kd_weight}: nothing is left of the loss")
    if direction != "forward":
        raise RefusedError(f"direction {direction!r}: this version has 'forward' only, KL(teacher || student)")
    if not (math.isfinite(denominator) and denominator > 0):
        raise RefusedError(
            f"denominator = {denominator} is not a positive number",
            next="pass the number of valid labels of the whole optimiser step",
        )


def _check_tensors(student: Tensor, targets: Targets | None, labels: Tensor | None) -> None:
    if student.dim() != 2:
        raise RefusedError(f"student logits have shape {tuple(student.shape)}, not [N, V]")
    rows, vocab = student.shape
    if vocab == 0:
        raise RefusedError(f"student logits have shape {tuple(student.shape)}: an empty vocabulary")
    _check("student logits", student, (rows, vocab), LOGIT_DTYPES, student.device)
    if labels is not None:
        _check("labels", labels, (rows,), (torch.int64,), student.device)
    if isinstance(targets, DenseTargets):
        _check("teacher logits", targets.logits, (rows, vocab), LOGIT_DTYPES, student.device)
    elif isinstance(targets, TopKTargets):
        if targets.ids.dim() != 2:
            raise RefusedError(f"top-k ids have shape {tuple(targets.ids.shape)}, not [N, k]")
        k = targets.ids.shape[1]
        if not 1 <= k <= vocab:
            raise RefusedError(f"k = {k} is not between 1 and the vocabulary's size {vocab}")
        _check("top-k ids", targets.ids, (rows, k), (torch.int64, torch.int32), student.device)
        _check("top-k logprobs", targets.logprobs, (rows, k), (torch.float32,), student.device)
        _check("top-k tail", targets.tail, (rows,), (torch.float32,), student.device)
    elif targets is not None:
        raise RefusedError(f"targets are {type(targets).__name__}, not DenseTargets or TopKTargets")


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    if tuple(tensor.shape) != shape:
        raise RefusedError(f"{name} have shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in dtypes:
        raise RefusedError(f"{name} are {tensor.dtype}, expected {' or '.join(str(d) for d in dtypes)}")
    if tensor.device != device:
        raise RefusedError(f"{name} are on {tensor.device}, the student logits on {device}")
