"""The calls: what is accepted, what is refused, and which backend does the work."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from latentforge.errors import RefusedError
from latentforge.kernels import autograd, backends
from latentforge.kernels.arguments import LARGEST, check_dense, check_number, check_positive
from latentforge.kernels.reference.kd import compute_dtype
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets

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
    beta: float = 0.5,
    denominator: float,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    ignore_index: int = -100,
    backend: str = "auto",
) -> KDLoss:
    """(ce_weight * sum CE + kd_weight * T^2 * sum D(teacher, student)) / denominator; the gradient in one go.

    ``student_logits`` [N, V] bf16 or fp32 (fp64 with ``reference``), padding as minus infinity; ``targets`` dense or
    top-k, of the same N (None only with kd_weight = 0); ``labels`` [N] int64, rows labelled ``ignore_index`` count
    nothing. ``denominator`` is the number of valid rows of the whole optimiser step. ``teacher_temperature`` is that of
    the teacher's distribution where it differs from ``temperature``. ``direction`` is ``forward``, KL(teacher ||
    student), ``reverse`` or ``jsd`` with ``beta`` in (0, 1) (backends ``reference`` and ``cpu``). The loss sees
    ``soft_cap * tanh(logit_scale * (logits + bias) / soft_cap)``; ``bias`` [V] receives its own gradient, together with
    the logits. The teacher gets none.

    Where a gradient is wanted **the logits are overwritten by it**; leaves, views and parts of larger tensors are
    refused. Without grad nothing is written. RefusedError names what is refused. Definition and source: ``reference``.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    check_scalars(ce_weight, kd_weight, denominator)
    KDSettings(temperature, teacher_temperature, 0.0, 0.0, direction, beta, logit_scale, soft_cap, ignore_index)
    backends.check_backend("kd_loss", backend)
    if labels is None:
        raise RefusedError("labels are None", next="pass int64 labels, ignore_index where a row does not count")
    check_tensors(student_logits, targets, labels, bias)
    if targets is None and kd_weight != 0:
        raise RefusedError(f"kd_weight = {kd_weight:g}, but there are no targets", next="pass targets or kd_weight=0")
    dense = targets.logits if isinstance(targets, DenseTargets) else None
    chosen = backends.choose("kd_loss", student_logits, dense, bias, backend=backend, direction=direction)
    topk = (targets.ids, targets.logprobs, targets.tail) if isinstance(targets, TopKTargets) else (None, None, None)
    tensors = (dense, *topk, labels)
    settings = (
        float(temperature),
        float(teacher_temperature),
        float(ce_weight),
        float(kd_weight),
        float(denominator),
        direction,
        float(beta),
        float(logit_scale),
        None if soft_cap is None else float(soft_cap),
        int(ignore_index),
        chosen,
    )
    dtype = compute_dtype(student_logits)
    weights = (float(ce_weight), float(kd_weight))
    if student_logits.requires_grad and torch.is_grad_enabled():
        if not torch.compiler.is_compiling():
            autograd.refuse_logits_of_others(student_logits)
            autograd.refuse_a_teacher_in_the_logits(student_logits, dense)
        loss, parts = autograd.KDFunction.apply(student_logits, bias, tensors, settings, weights)
    else:
        if bias is not None and bias.requires_grad and torch.is_grad_enabled():
            raise RefusedError(
                "the bias requires grad and the logits do not: theirs, of which it is the sum, is not computed",
                next="pass bias.detach(), or call under torch.no_grad() where only the loss is wanted",
            )
        # A teacher that requires grad gets none: the result must not claim one.
        with torch.no_grad():
            parts = autograd.kd_parts(student_logits, *tensors, bias, *settings)
            loss = autograd.weighted(parts, *weights, dtype)
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
    direction: str = "forward",
    beta: float = 0.5,
    backend: str = "auto",
) -> Tensor:
    """The divergence at ``temperature`` of each row, [N] fp32 (fp64 where the logits are), without T squared.

    For evaluation: nothing is written and nothing is differentiable. Arguments as in ``kd_loss``.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    KDSettings(temperature, teacher_temperature, direction=direction, beta=beta)
    settings = KDSettings(float(temperature), float(teacher_temperature), direction=direction, beta=float(beta))
    check_tensors(student_logits, targets, None)
    if targets is None:
        raise RefusedError("targets are None: there is nothing to diverge from")
    dense = targets.logits if isinstance(targets, DenseTargets) else None
    chosen = backends.choose("kd_loss", student_logits, dense, backend=backend, direction=direction)
    return backends.kd_rows(chosen, student_logits, targets, None, settings)[1].to(compute_dtype(student_logits))


class KDCriterion(nn.Module):
    """``kd_loss`` with its settings held: ``criterion(logits, targets, labels, denominator)``."""

    def __init__(
        self,
        *,
        temperature: float,
        ce_weight: float,
        kd_weight: float,
        teacher_temperature: float | None = None,
        direction: str = "forward",
        beta: float = 0.5,
        logit_scale: float = 1.0,
        soft_cap: float | None = None,
        ignore_index: int = -100,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        of_teacher = temperature if teacher_temperature is None else teacher_temperature
        check_scalars(ce_weight, kd_weight, 1.0)
        backends.check_backend("kd_loss", backend)
        KDSettings(temperature, of_teacher, 0.0, 0.0, direction, beta, logit_scale, soft_cap, ignore_index)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.direction = direction
        self.beta = beta
        self.logit_scale = logit_scale
        self.soft_cap = soft_cap
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
            direction=self.direction,
            beta=self.beta,
            denominator=denominator,
            logit_scale=self.logit_scale,
            soft_cap=self.soft_cap,
            ignore_index=self.ignore_index,
            backend=self.backend,
        )


def check_scalars(ce_weight: float, kd_weight: float, denominator: float) -> None:
    """Refuse weights and denominators of which no loss can be made."""
    for name, value in (("ce_weight", ce_weight), ("kd_weight", kd_weight)):
        check_number(name, value, 0, LARGEST, f"a number from 0 to {LARGEST:g}")
    if ce_weight == 0 and kd_weight == 0:
        raise RefusedError(f"ce_weight = {ce_weight} and kd_weight = {kd_weight}: nothing is left of the loss")
    check_positive("denominator", denominator, next="pass the number of valid labels of the whole optimiser step")


def check_tensors(student: Tensor, targets: Targets | None, labels: Tensor | None, bias: Tensor | None = None) -> None:
    """Refuse tensors whose shapes, dtypes or devices do not fit each other."""
    check_dense("student logits", student, "a tensor of shape [N, V]")
    if student.dim() != 2:
        raise RefusedError(f"student logits have shape {tuple(student.shape)}, not [N, V]")
    rows, vocab = student.shape
    if vocab == 0:
        raise RefusedError(f"student logits have shape {tuple(student.shape)}: an empty vocabulary")
    check_tensor("student logits", student, (rows, vocab), LOGIT_DTYPES, student.device)
    if labels is not None:
        check_tensor("labels", labels, (rows,), (torch.int64,), student.device)
    if bias is not None:
        check_tensor("bias", bias, (vocab,), LOGIT_DTYPES, student.device)
    check_targets(targets, rows, vocab, student.device)


def check_targets(targets: Targets | None, rows: int, vocab: int, device: torch.device) -> None:
    """Refuse targets that are not of these rows and this vocabulary."""
    if isinstance(targets, DenseTargets):
        check_tensor("teacher logits", targets.logits, (rows, vocab), LOGIT_DTYPES, device)
    elif isinstance(targets, TopKTargets):
        check_dense("top-k ids", targets.ids, "a tensor of shape [N, k]")
        if targets.ids.dim() != 2:
            raise RefusedError(f"top-k ids have shape {tuple(targets.ids.shape)}, not [N, k]")
        k = targets.ids.shape[1]
        if not 1 <= k <= vocab:
            raise RefusedError(f"k = {k} is not between 1 and the vocabulary's size {vocab}")
        check_tensor("top-k ids", targets.ids, (rows, k), (torch.int64, torch.int32), device)
        check_tensor("top-k logprobs", targets.logprobs, (rows, k), (torch.float32,), device)
        check_tensor("top-k tail", targets.tail, (rows,), (torch.float32,), device)
    elif targets is not None:
        raise RefusedError(f"targets are {type(targets).__name__}, not DenseTargets or TopKTargets")


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Refuse what is no tensor, and one of another shape, dtype or device than is named."""
    check_dense(name, tensor, f"a tensor of shape {shape}")
    if tuple(tensor.shape) != shape:
        raise RefusedError(f"{name} have shape {tuple(tensor.shape)}, expected {shape}")
    if tensor.dtype not in dtypes:
        raise RefusedError(f"{name} are {tensor.dtype}, expected {' or '.join(str(d) for d in dtypes)}")
    if tensor.device != device:
        raise RefusedError(f"{name} are on {tensor.device}, the student's tensors on {device}")
