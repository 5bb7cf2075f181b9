"""The KD loss of the CUDA backend: ``csrc/cuda/kd_*.cuh`` on torch's current stream.

The logic is run under host emulation in the tests (``tests/kernels/cuda``); on a GPU by ``tests/gpu`` where there is
one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.cuda.extension import cuda_native, place
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets

DTYPES = (torch.bfloat16, torch.float32)
# 32 slices of 16384 columns: one lane of a warp puts each together.
MAX_VOCAB = 524288


def row_losses(
    student: Tensor,
    targets: Targets | None,
    labels: Tensor | None,
    settings: KDSettings,
    *,
    bias: Tensor | None = None,
    write_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Per row (ce, kd without T squared), fp32 [N]; with ``write_gradient`` the gradient replaces ``student`` [N, V].

    Meaning of the arguments as in ``reference.kd.row_losses``; logits are bf16 or fp32 in any mix, at any address and
    row stride. Labels and ids must have been checked (``indices.check_indices``). Nothing waits for the device.
    RefusedError for the direction ``jsd``, for other dtypes, for columns that are not contiguous.
    """
    refuse_what_is_not_here(student, targets, settings)
    module = cuda_native()
    device, stream = place(student)
    ce, kd = torch.empty(2, student.shape[0], dtype=torch.float32, device=student.device)
    call, keep = describe(module, student, targets, labels, settings, bias, write_gradient)
    call.results(ce.data_ptr(), kd.data_ptr())
    # Freed to torch's allocator on return, which hands it out again in the order of this stream.
    workspace = torch.empty(call.workspace_bytes() // 4, dtype=torch.float32, device=student.device)
    call.workspace(workspace.data_ptr())
    module.cuda_kd_rows(call, device, stream)
    del keep, workspace
    return ce, kd


def refuse_what_is_not_here(student: Tensor, targets: Targets | None, settings: KDSettings) -> None:
    """RefusedError for what these kernels do not do."""
    if settings.direction == "jsd":
        raise RefusedError("direction 'jsd' has no CUDA kernel", next="pass backend='reference'")
    if student.shape[1] > MAX_VOCAB:
        raise RefusedError(
            f"a vocabulary of {student.shape[1]}; the cuda backend takes up to {MAX_VOCAB}",
            next="pass backend='reference'",
        )
    _check_logits(student, "student logits")
    if isinstance(targets, DenseTargets):
        _check_logits(targets.logits, "teacher logits")
    elif targets is not None and not isinstance(targets, TopKTargets):
        raise RefusedError(f"targets are {type(targets).__name__}: kd_loss takes DenseTargets or TopKTargets")


def describe(
    module: Any,
    student: Tensor,
    targets: Targets | None,
    labels: Tensor | None,
    settings: KDSettings,
    bias: Tensor | None,
    write_gradient: bool,
) -> tuple[Any, list[Tensor]]:
    """The extension's view of the tensors, and those that must outlive the call."""
    call = module.CudaKdCall()
    call.rows, call.vocab = student.shape
    call.student(student.data_ptr(), student.stride(0), student.dtype == torch.bfloat16)
    call.ignore_index = settings.ignore_index
    call.temperature, call.teacher_temperature = settings.temperature, settings.teacher_temperature
    call.ce_scale, call.kd_scale = settings.ce_scale, settings.kd_scale
    call.logit_scale, call.soft_cap = settings.logit_scale, settings.soft_cap or 0.0
    call.reverse = settings.direction == "reverse"
    call.write_gradient = write_gradient
    keep: list[Tensor] = []
    if labels is not None:
        keep.append(labels.long().contiguous())
        call.labels(keep[-1].data_ptr())
    if bias is not None:
        keep.append(bias.float().contiguous())
        call.bias(keep[-1].data_ptr())
    if isinstance(targets, DenseTargets):
        call.teacher(targets.logits.data_ptr(), targets.logits.stride(0), targets.logits.dtype == torch.bfloat16)
    elif isinstance(targets, TopKTargets):
        ids = targets.ids if targets.ids.dtype in (torch.int32, torch.int64) else targets.ids.long()
        ids, logprobs, tail = ids.contiguous(), targets.logprobs.float().contiguous(), targets.tail.float().contiguous()
        keep += [ids, logprobs, tail]
        call.topk(ids.data_ptr(), ids.dtype == torch.int64, logprobs.data_ptr(), tail.data_ptr(), ids.shape[1])
    return call, keep


def _check_logits(logits: Tensor, name: str) -> None:
    if logits.dtype not in DTYPES:
        raise RefusedError(
            f"{name} are {logits.dtype}; the cuda backend takes bfloat16 and float32", next="use backend='reference'"
        )
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise RefusedError(
            f"{name} have column stride {logits.stride(1)}; columns must be contiguous", next="pass logits.contiguous()"
        )
