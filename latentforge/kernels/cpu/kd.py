"""The KD loss of the C++ backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.cpu.variants import variant
from latentforge.kernels.indices import refuse_bad_index
from latentforge.kernels.native import native
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets

DTYPES = (torch.bfloat16, torch.float32)


def row_losses(
    student: Tensor,
    targets: Targets | None,
    labels: Tensor | None,
    settings: KDSettings,
    *,
    bias: Tensor | None = None,
    write_gradient: bool = False,
    gradient_out: Tensor | None = None,
    threads: int | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Per row (ce, kd without T squared), fp64 [N]; with ``write_gradient`` the gradient replaces ``student`` [N, V].

    ``gradient_out`` [N, V] bf16 or fp32 receives the gradient instead; ``student`` is then only read, and the two must
    not overlap. Logits may have any strides and addresses. ``threads`` and ``isa`` (a variant's name) are the machine's
    best where they are None. Meaning of the other arguments as in ``reference.kd.row_losses``. Labels and ids are
    checked before anything is written.
    """
    module = native()
    rows, vocab = student.shape
    call, keep = _call(module, student, targets, labels, bias)
    call.ignore_index = settings.ignore_index
    call.direction(settings.direction)
    call.beta = settings.beta
    call.temperature, call.teacher_temperature = settings.temperature, settings.teacher_temperature
    call.logit_scale, call.soft_cap = settings.logit_scale, settings.soft_cap or 0.0
    call.ce_scale, call.kd_scale = 0.0 if labels is None else settings.ce_scale, settings.kd_scale
    if write_gradient:
        out = student if gradient_out is None else gradient_out
        if out.shape != student.shape:
            raise RefusedError(
                f"gradient_out has shape {tuple(out.shape)}, the student's logits {tuple(student.shape)}"
            )
        call.gradient(*_logits(out, "gradient_out"))
    sums = torch.zeros(2, rows, dtype=torch.float64)
    call.results(sums[0].data_ptr(), sums[1].data_ptr())
    refuse_bad_index(module.check_indices(call), vocab, settings.ignore_index)
    module.run_rows(call, isa or variant(), threads or torch.get_num_threads())
    del keep
    return sums[0], sums[1]


def _call(
    module: Any, student: Tensor, targets: Targets | None, labels: Tensor | None, bias: Tensor | None
) -> tuple[Any, list[Tensor]]:
    """The extension's view of the tensors, and those that must outlive the call."""
    call = module.KdCall()
    call.rows, call.vocab = student.shape
    call.student(*_logits(student, "student logits"))
    keep: list[Tensor] = []
    if bias is not None:
        bias = bias.detach().float().contiguous()
        keep.append(bias)
        call.bias(bias.data_ptr())
    if labels is not None:
        labels = labels.contiguous()
        keep.append(labels)
        call.labels(labels.data_ptr())
    if isinstance(targets, DenseTargets):
        call.teacher(*_logits(targets.logits, "teacher logits"))
    elif isinstance(targets, TopKTargets):
        ids, logprobs, tail = targets.ids.long().contiguous(), targets.logprobs.contiguous(), targets.tail.contiguous()
        keep += [ids, logprobs, tail]
        call.topk(ids.data_ptr(), logprobs.data_ptr(), tail.data_ptr(), ids.shape[1])
    elif targets is not None:
        raise RefusedError(f"targets are {type(targets).__name__}: the cpu backend takes DenseTargets or TopKTargets")
    return call, keep


def _logits(logits: Tensor, name: str) -> tuple[int, int, int, bool]:
    """Address, strides and whether it is bf16, of a matrix of logits."""
    if logits.dtype not in DTYPES:
        raise RefusedError(
            f"{name} are {logits.dtype}; the cpu backend takes bfloat16 and float32", next="use backend='reference'"
        )
    return logits.data_ptr(), logits.stride(0), logits.stride(1), logits.dtype == torch.bfloat16
