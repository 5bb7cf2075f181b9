"""The C++ backend: addresses of torch tensors handed to the extension."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.native import native
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets

VARIANT_VARIABLE = "LATENTFORGE_CPU_VARIANT"
DTYPES = (torch.bfloat16, torch.float32)


def variant() -> str:
    """The instruction-set variant in use: the best of this machine, or the one that LATENTFORGE_CPU_VARIANT names."""
    available = list(native().cpu_variants())
    asked = os.environ.get(VARIANT_VARIABLE)
    if asked is None:
        return str(available[0])
    if asked not in available:
        raise RefusedError(
            f"{VARIANT_VARIABLE}={asked!r}: this machine can run {', '.join(available)}",
            next=f"unset {VARIANT_VARIABLE}",
        )
    return asked


def row_losses(
    student: Tensor,
    targets: Targets | None,
    labels: Tensor | None,
    *,
    temperature: float,
    teacher_temperature: float,
    ce_scale: float = 0.0,
    kd_scale: float = 0.0,
    ignore_index: int = -100,
    write_gradient: bool = False,
    threads: int | None = None,
    isa: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Per row (ce, kd without T squared), fp64 [N]; with ``write_gradient`` the gradient replaces ``student`` [N, V].

    Meaning of the arguments as in ``reference.row_losses``. Labels and ids are checked before anything is written.
    """
    module = native()
    rows, vocab = student.shape
    call, keep = _call(module, student, targets, labels)
    call.ignore_index = ignore_index
    call.temperature, call.teacher_temperature = temperature, teacher_temperature
    call.ce_scale, call.kd_scale = ce_scale, kd_scale
    call.write_gradient = write_gradient
    sums = torch.zeros(2, rows, dtype=torch.float64)
    call.results(sums[0].data_ptr(), sums[1].data_ptr())
    _refuse_bad_index(module.check_indices(call), vocab, ignore_index)
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


def _refuse_bad_index(bad: tuple[str, int, int], vocab: int, ignore_index: int) -> None:
    kind, row, value = bad
    if kind == "label":
        raise RefusedError(
            f"label {value} at row {row} is outside the vocabulary 0..{vocab - 1} (ignore_index is {ignore_index})",
            next="check that the data was packed with this vocabulary",
        )
    if kind == "id":
        raise RefusedError(f"top-k id {value} at row {row} is outside the vocabulary 0..{vocab - 1}")
    if kind == "duplicate":
        raise RefusedError(f"top-k id {value} is given twice at row {row}")


def check_indices(targets: Targets | None, labels: Tensor | None, vocab: int, ignore_index: int) -> None:
    """The same refusals in torch, for the reference backend on any device."""
    if labels is not None and labels.numel():
        wrong = ((labels < 0) | (labels >= vocab)) & (labels != ignore_index)
        if bool(wrong.any()):
            row = int(wrong.nonzero()[0, 0])
            _refuse_bad_index(("label", row, int(labels[row])), vocab, ignore_index)
    if isinstance(targets, TopKTargets) and targets.ids.numel():
        outside = (targets.ids < 0) | (targets.ids >= vocab)
        if bool(outside.any()):
            row, column = (int(i) for i in outside.nonzero()[0])
            _refuse_bad_index(("id", row, int(targets.ids[row, column])), vocab, ignore_index)
        ordered = targets.ids.sort(dim=-1).values
        twice = ordered[:, 1:] == ordered[:, :-1]
        if bool(twice.any()):
            row, column = (int(i) for i in twice.nonzero()[0])
            _refuse_bad_index(("duplicate", row, int(ordered[row, column])), vocab, ignore_index)
