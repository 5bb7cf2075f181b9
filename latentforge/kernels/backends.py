"""Which implementation does the work: by name, or by the device that the tensors are on."""

from __future__ import annotations

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.indices import check_indices
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets

BACKENDS = ("auto", "reference", "cpu")


def choose(op: str, student: Tensor, targets: Targets | None, backend: str) -> str:
    """The backend that will run ``op`` on these tensors. RefusedError where it cannot."""
    if backend not in BACKENDS:
        raise RefusedError(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    device = student.device.type
    teacher = targets.logits.dtype if isinstance(targets, DenseTargets) else None
    exact = torch.float64 in (student.dtype, teacher)
    if backend == "reference":
        return backend
    if device != "cpu":
        raise RefusedError(
            f"the logits are on {student.device}; this version has no kernel for {device} tensors",
            next="pass backend='reference', or move the logits to the CPU",
        )
    if backend == "auto" and exact:
        return "reference"
    if backend == "cpu" and exact:
        raise RefusedError("the cpu backend computes in fp32, the logits are fp64", next="pass backend='reference'")
    return "cpu"


def kd_rows(
    backend: str,
    student: Tensor,
    targets: Targets | None,
    labels: Tensor | None,
    settings: KDSettings,
    *,
    bias: Tensor | None = None,
    write_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """Per row (ce, kd without T squared) [N]; with ``write_gradient`` the gradient replaces ``student`` [N, V]."""
    if backend == "cpu":
        from latentforge.kernels.cpu import kd as cpu

        return cpu.row_losses(student, targets, labels, settings, bias=bias, write_gradient=write_gradient)
    from latentforge.kernels.reference import kd as reference

    check_indices(targets, labels, student.shape[1], settings.ignore_index)
    ce, kd = [], []
    for rows, part in reference.chunks(student, targets):
        some = None if labels is None else labels[rows]
        found = reference.row_losses(student[rows], part, some, settings, bias=bias, gradient=write_gradient)
        ce.append(found.ce)
        kd.append(found.kd)
        if found.gradient is not None:
            student[rows] = found.gradient.to(student.dtype)
    nothing = student.new_zeros(0, dtype=reference.compute_dtype(student))
    return torch.cat([*ce, nothing]), torch.cat([*kd, nothing])


def kd_sums(
    backend: str,
    student: Tensor,
    targets: Targets | None,
    labels: Tensor | None,
    settings: KDSettings,
    *,
    bias: Tensor | None = None,
    write_gradient: bool = False,
) -> Tensor:
    """The two sums over the rows, [2] fp64."""
    ce, kd = kd_rows(backend, student, targets, labels, settings, bias=bias, write_gradient=write_gradient)
    if student.device.type == "cpu":
        # numpy adds in one fixed order; torch splits a long sum over its threads.
        return torch.tensor([float(ce.double().numpy().sum()), float(kd.double().numpy().sum())], dtype=torch.float64)
    return torch.stack([ce.double().sum(), kd.double().sum()])
