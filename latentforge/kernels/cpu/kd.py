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
    threads: int | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Per row (ce, kd without T squared), fp64 [N]; with ``write_gradient`` the gradient replaces ``student`` [N, V].

    Meaning of the arguments as in ``reference.kd.row_losses``. Labels and ids are checked before anything is written.
    """
    if settings.direction != "forward" or settings.shaped or bias is not None:
        raise RefusedError("the cpu backend does not do this yet", next="pass backend='reference'")
    module = native()
    rows, vocab = student.shape
    call, keep = _call(module, student, targets, labels)
    call.ignore_index = settings.ignore_index
    call.temperature, call.teacher_temperature = settings.temperature, settings.teacher_temperature
    call.ce_scale, call.kd_scale = settings.ce_scale, settings.kd_scale
    call.write_gradient = write_gradient
    sums = torch.zeros(2, rows, dtype=torch.float64)
    call.results(sums[0].data_ptr(), sums[1].data_ptr())
    refuse_bad_index(module.check_indices(call), vocab, settings.ignore_index)
    module.run_rows(call, isa or variant(), threads or torch.get_num_threads())
    del keep
    return sums[0], sums[1]


def _call(module: Any, student: Tensor, targets: Targets | None, labels: Tensor | None) -> tuple[Any, list[Tensor]]:
    """The extension's view of the tensors, and those that must outlive the call."""
    call = module.KdCall()
    call.rows, call.vocab = student.shape
    _check_logits(student, "student logits")
    call.student(student.data_ptr(), student.stride(0), student.dtype == torch.bfloat16)
    keep: list[Tensor] = []
    if labels is not None:
        labels = labels.contiguous()
        keep.append(labels)
        call.labels(labels.data_ptr())
    if isinstance(targets, DenseTargets):
        _check_logits(targets.logits, "teacher logits")
        call.teacher(targets.logits.data_ptr(), targets.logits.stride(0), targets.logits.dtype == torch.bfloat16)
    elif isinstance(targets, TopKTargets):
        ids, logprobs, tail = targets.ids.long().contiguous(), targets.logprobs.contiguous(), targets.tail.contiguous()
        keep += [ids, logprobs, tail]
        call.topk(ids.data_ptr(), logprobs.data_ptr(), tail.data_ptr(), ids.shape[1])
    return call, keep


def _check_logits(logits: Tensor, name: str) -> None:
    if logits.dtype not in DTYPES:
        raise RefusedError(
            f"{name} are {logits.dtype}; the cpu backend takes bfloat16 and float32", next="use backend='reference'"
        )
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise RefusedError(
            f"{name} have column stride {logits.stride(1)}; columns must be contiguous", next="pass logits.contiguous()"
        )
