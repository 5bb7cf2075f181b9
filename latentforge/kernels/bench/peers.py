"""Other people's kernels, where they are installed and can run on the tensors in question."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from latentforge.kernels.bench.contest import Action, Line
from latentforge.kernels.bench.machine import installed

LIGER, FLA, CCE = "liger-kernel", "flash-linear-attention", "cut-cross-entropy"


@dataclass(frozen=True)
class Peer:
    """A peer's line, with the reason on it where it cannot run, and one turn of its work."""

    line: Line
    action: Action


def _line(name: str, package: str, device: torch.device, *, on_cpu: bool = False) -> Line:
    version = installed(package)
    line = Line(f"{name} {version or ''}".rstrip(), "peer")
    if version is None:
        line.note = f"{package} is not installed"
    elif device.type == "cpu" and not on_cpu:
        line.note = "its kernels need a CUDA device"
    return line


def over_logits(student: Tensor, teacher: Tensor, temperature: float, direction: str) -> list[Peer]:
    """Peers of ``kd_loss`` on dense targets, KL alone: Liger's JSD at beta 0 or 1, from the log-softmax it starts at.

    Loss and gradient over the logits, which is a second [N, V] tensor there.
    """
    line = _line("Liger JSD", LIGER, student.device)

    def action() -> None:
        from liger_kernel.transformers.jsd import LigerJSD

        leaf = student.detach().requires_grad_()
        log_q = torch.log_softmax(leaf / temperature, -1)
        log_p = torch.log_softmax(teacher / temperature, -1)
        loss = LigerJSD(beta=0.0 if direction == "forward" else 1.0)(log_q, log_p)
        torch.autograd.grad(loss, leaf)

    return [Peer(line, action)]


def over_hidden(
    hidden: Tensor, weight: Tensor, labels: Tensor, teacher: tuple[Tensor, Tensor] | None, temperature: float
) -> list[Peer]:
    """Peers of ``linear_kd_loss``: loss, d_hidden and d_weight from ``hidden`` [N, H] and ``weight`` [V, H].

    With a teacher's layer, Liger's fused linear JSD (forward KL) and fla's fused KL divergence; cut-cross-entropy has
    the cross-entropy alone, which is less work, and is the only one that has a path without CUDA.
    """
    device = hidden.device
    cce = _line("cut-cross-entropy, CE only", CCE, device, on_cpu=True)
    if cce.note is None and device.type == "cpu":
        cce.backend += " (torch_compile)"

    def cross_entropy() -> None:
        from cut_cross_entropy import linear_cross_entropy

        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        implementation = "torch_compile" if device.type == "cpu" else "cce"
        torch.autograd.grad(linear_cross_entropy(h, w, labels, impl=implementation), (h, w))

    found = [Peer(cce, cross_entropy)]
    if teacher is None:
        for name, package in (("Liger", LIGER), ("fla", FLA)):
            line = _line(name, package, device)
            line.note = "has no top-k targets"
            found.append(Peer(line, lambda: None))
        return found

    def liger() -> None:
        from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        loss = LigerFusedLinearJSD(jsd_beta=0.0, temperature=temperature)(h, w, *teacher, None)
        torch.autograd.grad(loss, (h, w))

    def fla() -> None:
        from fla.modules import FusedKLDivLoss

        h, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
        torch.autograd.grad(FusedKLDivLoss()(h, teacher[0], w, teacher[1]), (h, w))

    return [
        *found,
        Peer(_line("Liger fused linear JSD", LIGER, device), liger),
        Peer(_line("fla fused KL (T = 1)", FLA, device), fla),
    ]
