"""Which implementation does the work: by name, or by the device that the tensors are on.

Every backend lives in a package of its name and is imported when it is first needed, so that a machine without Triton
or without a driver can use the others.
"""

from __future__ import annotations

import os
from importlib import import_module

import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels.arguments import check_name
from latentforge.kernels.indices import check_indices
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import Targets

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")

# The operators, and who implements them.
OPS = {
    "kd_loss": ("reference", "cpu", "cuda", "triton"),
    "linear_kd_loss": ("reference", "cpu", "cuda"),
    "latent_decode": ("reference", "cpu", "cuda", "triton"),
}


def choose(op: str, tensor: Tensor, *others: Tensor | None, backend: str, direction: str = "forward") -> str:
    """The backend that will run ``op`` on these tensors, all on one device. RefusedError where it cannot.

    ``auto`` takes the C++ kernels for tensors of the host (the definition where one of them is fp64) and, for tensors
    of a CUDA device, what the warm-up guard has passed there; it never tries anything out. ``direction`` jsd is in
    ``reference`` and ``cpu`` alone: on a GPU it has to be asked of ``reference`` by name.
    """
    check_backend(op, backend)
    exact = any(t is not None and t.dtype == torch.float64 for t in (tensor, *others))
    device = tensor.device.type
    if backend == "reference":
        return backend
    if backend == "auto" and exact and device == "cpu":
        return "reference"
    if exact:
        raise RefusedError(
            f"fp64 tensors, and the backend is {backend!r}, which computes in fp32", next="pass backend='reference'"
        )
    if device == "cuda":
        if direction == "jsd":
            raise RefusedError(
                f"direction 'jsd', and the tensors are on {tensor.device}: no kernel of a GPU has it",
                next="pass backend='reference', or direction='forward' or 'reverse'",
            )
        return _on_cuda(op, tensor, backend)
    if device != "cpu":
        raise RefusedError(
            f"the tensors are on {tensor.device}; there is no kernel for {device} tensors",
            next="pass backend='reference', or move them to the CPU",
        )
    if backend == "cuda":
        raise RefusedError("backend 'cuda', and the tensors are on the CPU", next="pass backend='cpu' or move them")
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") != "1":
        raise RefusedError(
            "backend 'triton', and the tensors are on the CPU",
            next="pass backend='cpu', or set TRITON_INTERPRET=1 to run Triton's interpreter",
        )
    return "cpu" if backend == "auto" else backend


def check_backend(op: str, backend: str) -> None:
    """Refuse what is no backend, and one that does not implement ``op``."""
    check_name("backend", backend, BACKENDS)
    if backend not in ("auto", *OPS[op]):
        raise RefusedError(f"backend {backend!r} has no {op}", next=f"use one of {', '.join(OPS[op])}")


def _on_cuda(op: str, tensor: Tensor, backend: str) -> str:
    if backend == "cpu":
        raise RefusedError(f"backend 'cpu', and the tensors are on {tensor.device}", next="pass backend='auto'")
    if backend == "auto":
        index = tensor.device.index
        return _proven(op, tensor.dtype, torch.cuda.current_device() if index is None else index)
    return backend


def _proven(op: str, dtype: torch.dtype, device_index: int) -> str:
    """What the warm-up guard's record of this machine allows; RefusedError naming the warm-up where there is none."""
    ladder = import_module("latentforge.kernels.guard.ladder")
    return str(ladder.chosen(op, dtype, device_index))


# What torch.compiler.assume_constant_result does: the record is read once, when a program is compiled. The decorator
# itself imports the whole compiler, seconds that a program which compiles nothing should not spend.
_proven._dynamo_marked_constant = True  # type: ignore[attr-defined]


def kd_rows(
    backend: str,
    student: Tensor,
    targets: Targets | None,
    labels: Tensor | None,
    settings: KDSettings,
    *,
    bias: Tensor | None = None,
    write_gradient: bool = False,
    checked: bool = False,
) -> tuple[Tensor, Tensor]:
    """Per row (ce, kd without T squared) [N]; with ``write_gradient`` the gradient replaces ``student`` [N, V].

    ``checked`` says that the caller has searched labels and ids already, which costs a CUDA device a wait.
    """
    if backend != "cpu" and not checked:  # which searches them itself, faster
        check_indices(targets, labels, student.shape[1], settings.ignore_index)
    if backend == "reference":
        return _reference_rows(student, targets, labels, settings, bias, write_gradient)
    kernel = import_module(f"latentforge.kernels.{backend}.kd")
    ce, kd = kernel.row_losses(student, targets, labels, settings, bias=bias, write_gradient=write_gradient)
    return ce, kd


def _reference_rows(
    student: Tensor,
    targets: Targets | None,
    labels: Tensor | None,
    settings: KDSettings,
    bias: Tensor | None,
    write_gradient: bool,
) -> tuple[Tensor, Tensor]:
    from latentforge.kernels.reference import kd as reference

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
    return summed(ce, kd)


def summed(ce: Tensor, kd: Tensor) -> Tensor:
    """Sums of [N] and [N] as [2] fp64, on their device, in an order that does not depend on the threads."""
    if ce.device.type == "cpu":
        # numpy adds in one fixed order; torch splits a long sum over its threads.
        return torch.tensor([float(ce.double().numpy().sum()), float(kd.double().numpy().sum())], dtype=torch.float64)
    return torch.stack([ce.double().sum(), kd.double().sum()])
