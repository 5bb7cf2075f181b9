"""The KD loss of the Triton backend."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets
from latentforge.kernels.triton import on_device_of, require
from latentforge.kernels.triton.configs import Config, frozen_config

DTYPES = (torch.bfloat16, torch.float32)

# Entries of a top-k at a time, and rows at a time where their top-k has to be marked in a map of bits.
PIECE = 128
ROWS_AT_A_TIME = 1024


def row_losses(
    student: Tensor,
    targets: Targets | None,
    labels: Tensor | None,
    settings: KDSettings,
    *,
    bias: Tensor | None = None,
    write_gradient: bool = False,
    config: Config | None = None,
) -> tuple[Tensor, Tensor]:
    """Per row (ce, kd without T squared), fp32 [N]; with ``write_gradient`` the gradient replaces ``student`` [N, V].

    Meaning of the arguments as in ``reference.kd.row_losses``; forward and reverse KL (RefusedError for ``jsd``). The
    caller has checked labels and ids. ``config`` is the tile, from the static table unless given; the bits of a row
    depend on it, and on nothing else than the row.
    """
    if settings.direction == "jsd":
        raise RefusedError(
            "direction 'jsd', and the backend is 'triton', which has forward and reverse KL",
            next="pass backend='reference' (or 'cpu', for tensors of the host)",
        )
    _check_logits(student, "student logits")
    rows = student.shape[0]
    ce = torch.empty(rows, dtype=torch.float32, device=student.device)
    kd = torch.empty_like(ce)
    if rows == 0:
        require("kd_dense")
        return ce, kd
    labels = None if labels is None else labels.contiguous()
    bias = None if bias is None else bias.contiguous()
    shared = _shared(settings, labels is not None, write_gradient)
    with on_device_of(student):
        if isinstance(targets, TopKTargets):
            _topk(student, targets, labels, bias, ce, kd, shared, config or frozen_config("kd_topk", student))
        else:
            teacher = targets.logits if isinstance(targets, DenseTargets) else None
            _dense(student, teacher, labels, bias, ce, kd, shared, config or frozen_config("kd_dense", student))
    return ce, kd


def _dense(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor | None,
    bias: Tensor | None,
    ce: Tensor,
    kd: Tensor,
    shared: dict[str, Any],
    config: Config,
) -> None:
    if teacher is not None:
        _check_logits(teacher, "teacher logits")
    rows, vocab = student.shape
    require("kd_dense").kd_dense[(rows,)](
        student,
        teacher,
        labels,
        bias,
        ce,
        kd,
        student.stride(0),
        0 if teacher is None else teacher.stride(0),
        vocab,
        **shared,
        ALIGNED=aligned(student) and (teacher is None or aligned(teacher)),
        **config.launch(),
    )


def _topk(
    student: Tensor,
    targets: TopKTargets,
    labels: Tensor | None,
    bias: Tensor | None,
    ce: Tensor,
    kd: Tensor,
    shared: dict[str, Any],
    config: Config,
) -> None:
    rows, vocab = student.shape
    k = targets.ids.shape[1]
    words = (vocab + 31) // 32
    saved = torch.empty(rows, k, dtype=torch.float32, device=student.device)
    # A sixteenth of logits in bf16: rows are taken in pieces so that it stays small, whatever their number.
    step = rows if shared["WRITE"] else ROWS_AT_A_TIME
    kernel = require("kd_topk").kd_topk
    for first in range(0, rows, step):
        some = slice(first, first + step)
        marks = None
        if not shared["WRITE"]:
            marks = torch.zeros(len(student[some]), words, dtype=torch.int32, device=student.device)
        kernel[(len(student[some]),)](
            student[some],
            targets.ids[some].to(torch.int32).contiguous(),
            targets.logprobs[some].contiguous(),
            targets.tail[some].contiguous(),
            None if labels is None else labels[some],
            bias,
            saved[some],
            marks,
            ce[some],
            kd[some],
            student.stride(0),
            vocab,
            k,
            words,
            **shared,
            ALIGNED=aligned(student),
            PIECE=PIECE,
            **config.launch(),
        )


def _shared(settings: KDSettings, with_labels: bool, write: bool) -> dict[str, Any]:
    """What both kernels are told, as fp32 numbers and compile-time switches."""
    temperature, of_teacher = settings.temperature, settings.teacher_temperature
    return {
        "ignore_index": settings.ignore_index,
        "inverse": 1 / temperature,
        "inverse_teacher": 1 / of_teacher,
        "exponent": math.log2(math.e) / temperature,
        "exponent_teacher": math.log2(math.e) / of_teacher,
        "ce_scale": settings.ce_scale,
        "kd_scale": settings.kd_scale / temperature,
        "logit_scale": settings.logit_scale,
        "soft_cap": 1.0 if settings.soft_cap is None else settings.soft_cap,
        "REVERSE": settings.direction == "reverse",
        "ROOT": int(temperature) if temperature in (1.0, 2.0, 4.0) or not with_labels else 0,
        "SCALED": settings.logit_scale != 1.0,
        "CAPPED": settings.soft_cap is not None,
        "WRITE": write,
    }


def aligned(logits: Tensor) -> bool:
    """Whether every row can be read 16 bytes at a time."""
    return logits.data_ptr() % 16 == 0 and logits.stride(0) % 16 == 0 and logits.shape[1] % 16 == 0


def _check_logits(logits: Tensor, name: str) -> None:
    if logits.dtype not in DTYPES:
        raise RefusedError(
            f"{name} are {logits.dtype}; the triton backend takes bfloat16 and float32", next="use backend='reference'"
        )
    if logits.shape[1] > 1 and logits.stride(1) != 1:
        raise RefusedError(
            f"{name} have column stride {logits.stride(1)}; columns must be contiguous", next="pass logits.contiguous()"
        )
