"""The loss of a last layer without its logits: hidden states and weight in, loss and their gradients out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from latentforge.errors import RefusedError
from latentforge.kernels import backends
from latentforge.kernels.api import LOGIT_DTYPES, KDLoss, check_scalars, check_targets, check_tensor
from latentforge.kernels.arguments import check_dense, check_positive, check_whole
from latentforge.kernels.autograd import weighted
from latentforge.kernels.linear_autograd import LinearKDFunction, linear_kd
from latentforge.kernels.reference.kd import compute_dtype
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, LinearTargets, Targets, TopKTargets


def linear_kd_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Targets | LinearTargets | None,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float,
    teacher_temperature: float | None = None,
    ce_weight: float,
    kd_weight: float,
    direction: str = "forward",
    beta: float = 0.5,
    denominator: float,
    logit_scale: float = 1.0,
    soft_cap: float | None = None,
    ignore_index: int = -100,
    chunk_rows: int | None = None,
    backend: str = "auto",
) -> KDLoss:
    """``kd_loss(hidden @ weight.T, ...)`` with the gradients of all three, and no tensor of the size [N, V].

    ``hidden`` [N, H] and ``weight`` [V, H] bf16 or fp32 (fp64 with ``reference``), ``bias`` [V]; ``targets`` a
    teacher's last layer, top-k rows, its dense logits, or None with kd_weight = 0; the other arguments as in
    ``kd_loss``. At most ``chunk_rows`` * V fp32 numbers are held beside arguments and gradients; None takes what suits
    the machine. The logits are never rounded to bf16, and the sums of the gradient of the weight are fp32. What does
    not require grad costs no product. Ignored rows cost nothing, whatever they hold.

    Any strides are read where they lie; only columns side by side have the same bits as a contiguous matrix has.
    Under autocast hidden, weight and bias are cast as ``F.linear`` casts them; the logits stay fp32 there too. Nothing
    that is passed is written. A second backward raises. The teacher gets no gradient. RefusedError names what is
    refused. Definition: ``reference.linear``; scheme, operations and memory: ``linear_sweeps``.
    """
    teacher_temperature = temperature if teacher_temperature is None else teacher_temperature
    check_scalars(ce_weight, kd_weight, denominator)
    KDSettings(temperature, teacher_temperature, 0.0, 0.0, direction, beta, logit_scale, soft_cap, ignore_index)
    check_chunk_rows(chunk_rows)
    backends.check_backend("linear_kd_loss", backend)
    check_dense("hidden states", hidden, "a tensor of shape [N, H]")
    check_dense("weight", weight, "a tensor of shape [V, H]")
    if bias is not None:
        check_dense("bias", bias, "a tensor of shape [V]")
    device = hidden.device.type
    autocast = device != "meta" and torch.is_autocast_enabled(device)
    if autocast and torch.float64 not in (hidden.dtype, weight.dtype):
        narrow = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(narrow), weight.to(narrow), None if bias is None else bias.to(narrow)
    _check_tensors(hidden, weight, bias, targets, labels)
    if targets is None and kd_weight != 0:
        raise RefusedError(f"kd_weight = {kd_weight:g}, but there are no targets", next="pass targets or kd_weight=0")

    dense = targets.logits if isinstance(targets, DenseTargets) else None
    topk = (targets.ids, targets.logprobs, targets.tail) if isinstance(targets, TopKTargets) else (None, None, None)
    of_teacher: tuple[Tensor | None, ...] = (None, None, None)
    teacher_scale, teacher_cap = 1.0, None
    if isinstance(targets, LinearTargets):
        of_teacher = (targets.hidden, targets.weight, targets.bias)
        teacher_scale, teacher_cap = float(targets.logit_scale), targets.soft_cap
    chosen = backends.choose(
        "linear_kd_loss", hidden, weight, bias, dense, *of_teacher, backend=backend, direction=direction
    )
    tensors = (dense, *topk, *of_teacher, labels)
    settings = (
        teacher_scale,
        None if teacher_cap is None else float(teacher_cap),
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
        None if chunk_rows is None else int(chunk_rows),
        chosen,
    )
    dtype = compute_dtype(hidden)
    weights = (float(ce_weight), float(kd_weight))
    wanted = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    if any(wanted) and torch.is_grad_enabled():
        loss, parts = LinearKDFunction.apply(hidden, weight, bias, tensors, settings, weights, wanted)
    else:
        # A teacher that requires grad gets none: the result must not claim one.
        with torch.no_grad():
            parts = linear_kd(hidden, weight, bias, *tensors, *settings, False, False, False)[0]
            loss = weighted(parts, *weights, dtype)
    ce, kd = parts[0].to(dtype), parts[1].to(dtype)
    # What was not computed must not look like agreement.
    return KDLoss(loss, ce, torch.full_like(kd, torch.nan) if targets is None else kd)


class LinearKDCriterion(nn.Module):
    """``linear_kd_loss`` with its settings held: ``criterion(hidden, weight, targets, labels, denominator, bias)``."""

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
        chunk_rows: int | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        of_teacher = temperature if teacher_temperature is None else teacher_temperature
        check_scalars(ce_weight, kd_weight, 1.0)
        backends.check_backend("linear_kd_loss", backend)
        KDSettings(temperature, of_teacher, 0.0, 0.0, direction, beta, logit_scale, soft_cap, ignore_index)
        check_chunk_rows(chunk_rows)
        self.temperature = temperature
        self.teacher_temperature = teacher_temperature
        self.ce_weight = ce_weight
        self.kd_weight = kd_weight
        self.direction = direction
        self.beta = beta
        self.logit_scale = logit_scale
        self.soft_cap = soft_cap
        self.ignore_index = ignore_index
        self.chunk_rows = chunk_rows
        self.backend = backend

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Targets | LinearTargets | None,
        labels: Tensor,
        denominator: float,
        bias: Tensor | None = None,
    ) -> KDLoss:
        return linear_kd_loss(
            hidden,
            weight,
            targets,
            labels,
            bias=bias,
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
            chunk_rows=self.chunk_rows,
            backend=self.backend,
        )


def check_chunk_rows(chunk_rows: int | None) -> None:
    """Refuse a chunk that is no positive number of rows."""
    if chunk_rows is not None:
        check_whole(
            "chunk_rows", chunk_rows, "a positive number of rows", low=1, next="pass None for what suits the machine"
        )


def _check_tensors(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Targets | LinearTargets | None, labels: Tensor
) -> None:
    if hidden.dim() != 2:
        raise RefusedError(
            f"hidden states have shape {tuple(hidden.shape)}, not [N, H]", next="pass hidden.flatten(0, -2)"
        )
    if weight.dim() != 2 or weight.shape[0] == 0:
        raise RefusedError(f"the weight has shape {tuple(weight.shape)}, not [V, H] with V of at least 1")
    (rows, width), vocab, device = hidden.shape, weight.shape[0], hidden.device
    check_tensor("hidden states", hidden, (rows, width), LOGIT_DTYPES, device)
    check_tensor("weight", weight, (vocab, width), LOGIT_DTYPES, device)
    check_tensor("labels", labels, (rows,), (torch.int64,), device)
    if bias is not None:
        check_tensor("bias", bias, (vocab,), LOGIT_DTYPES, device)
    if not isinstance(targets, LinearTargets):
        check_targets(targets, rows, vocab, device)
        return
    check_dense("teacher hidden states", targets.hidden, "a tensor of shape [N, H_t]")
    if targets.hidden.dim() != 2:
        raise RefusedError(f"teacher hidden states have shape {tuple(targets.hidden.shape)}, not [N, H_t]")
    inner = targets.hidden.shape[1]
    check_tensor("teacher hidden states", targets.hidden, (rows, inner), LOGIT_DTYPES, device)
    check_tensor("teacher weight", targets.weight, (vocab, inner), LOGIT_DTYPES, device)
    if targets.bias is not None:
        check_tensor("teacher bias", targets.bias, (vocab,), LOGIT_DTYPES, device)
    check_positive("teacher logit_scale", targets.logit_scale)
    if targets.soft_cap is not None:
        check_positive("teacher soft_cap", targets.soft_cap, next="pass None for no cap")
