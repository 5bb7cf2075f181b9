"""Our losses beside those of Liger-Kernel and flash-linear-attention, whose Triton kernels run in the interpreter.

Their conventions, and what is done here to meet them:

- Liger's JSD takes log-probabilities (student first) and means over the rows that are not ignored. Its ``beta`` is
  ours: M = beta teacher + (1 - beta) student; 0 is forward KL, 1 is reverse KL, which we call by those names. It knows
  no cross-entropy and no T squared. The log-softmax is torch's here, so its gradient runs through torch's autograd.
- Liger's fused linear JSD takes hidden states and weights of both sides, divides both logits by one temperature and
  leaves T squared out: ``kd_weight`` is 1 / T^2 here.
- flash-linear-attention's fused KL is forward KL at temperature 1, over all rows ("batchmean"); no labels.

Liger's KLDIV and RMSNorm, and cut-cross-entropy's Triton kernels, do not run in Triton's interpreter.
"""

from __future__ import annotations

import pytest
import torch
from fla.modules.fused_kl_div import fused_kl_div_loss
from liger_kernel.ops.fused_linear_jsd import LigerFusedLinearJSDFunction
from liger_kernel.ops.jsd import LigerJSDFunction
from torch import Tensor

from latentforge.kernels import kd_loss
from latentforge.kernels.linear import linear_kd_loss
from latentforge.kernels.targets import DenseTargets, LinearTargets

DIRECTIONS = {0.0: "forward", 0.5: "jsd", 1.0: "reverse", 0.3: "jsd"}


def drawn(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def labels_of(rows: int) -> Tensor:
    labels = torch.arange(rows)
    labels[1::4] = -100
    return labels


def close(found: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """Both near the definition in fp64, ours no further than a few roundings more than theirs."""
    size = float(exact.norm())
    of_theirs, of_ours = (float((x.double() - exact).norm()) / size for x in (theirs, found))
    assert of_theirs < 1e-5
    assert of_ours <= max(2 * of_theirs, 5e-7)


def ours(student: Tensor, teacher: Tensor, labels: Tensor, beta: float, backend: str) -> tuple[Tensor, Tensor]:
    leaf = student.clone().requires_grad_()
    loss = kd_loss(
        leaf * 1,
        DenseTargets(teacher),
        labels,
        temperature=1.0,
        ce_weight=0.0,
        kd_weight=1.0,
        direction=DIRECTIONS[beta],
        beta=beta if DIRECTIONS[beta] == "jsd" else 0.5,
        denominator=float((labels != -100).sum()),
        backend=backend,
    ).loss
    loss.backward()
    assert leaf.grad is not None
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("beta", DIRECTIONS)
@pytest.mark.parametrize("backend", ["reference", "cpu", "triton"])
def test_liger_jsd_and_ours_are_the_same_divergence(beta: float, backend: str) -> None:
    if backend == "triton" and DIRECTIONS[beta] == "jsd":
        backend = "auto"  # which Triton does not have
    student, teacher, labels = drawn(9, 301, seed=1, scale=3.0), drawn(9, 301, seed=2, scale=3.0), labels_of(9)
    leaf = student.clone().requires_grad_()
    theirs = LigerJSDFunction.apply(leaf.log_softmax(-1), teacher.log_softmax(-1), labels, beta)
    theirs.backward()
    assert leaf.grad is not None
    true = ours(student.double(), teacher.double(), labels, beta, "reference")
    found = ours(student, teacher, labels, beta, backend)
    close(found[0], theirs.detach(), true[0])
    close(found[1], leaf.grad, true[1])


def test_a_planted_exchange_of_the_sides_is_seen_by_the_comparison() -> None:
    student, teacher, labels = drawn(9, 301, seed=1, scale=3.0), drawn(9, 301, seed=2, scale=3.0), labels_of(9)
    theirs = LigerJSDFunction.apply(student.log_softmax(-1), teacher.log_softmax(-1), labels, 0.3)
    true = ours(student, teacher, labels, 0.3, "reference")[0]
    exchanged = ours(teacher, student, labels, 0.3, "reference")[0]
    assert abs(float(true - theirs)) < 1e-6
    assert abs(float(exchanged - theirs)) > 1e-4


def layers(double: bool = False) -> tuple[Tensor, Tensor, LinearTargets]:
    parts = [drawn(8, 16, seed=3), drawn(157, 16, seed=4), drawn(8, 24, seed=5), drawn(157, 24, seed=6)]
    hidden, weight, of_teacher, teacher = [part.double() if double else part for part in parts]
    return hidden.requires_grad_(), weight.requires_grad_(), LinearTargets(of_teacher, teacher)


def our_layers(beta: float, temperature: float, labels: Tensor, backend: str) -> list[Tensor]:
    hidden, weight, targets = layers(double=backend == "reference")
    loss = linear_kd_loss(
        hidden,
        weight,
        targets,
        labels,
        temperature=temperature,
        ce_weight=0.0,
        kd_weight=1.0 / temperature**2,
        direction=DIRECTIONS[beta],
        beta=beta if DIRECTIONS[beta] == "jsd" else 0.5,
        denominator=float((labels != -100).sum()),
        backend=backend,
    ).loss
    loss.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [loss.detach(), hidden.grad, weight.grad]


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_liger_fused_linear_jsd_and_ours_have_the_same_gradients(beta: float, temperature: float) -> None:
    labels = labels_of(8)
    hidden, weight, targets = layers()
    theirs = LigerFusedLinearJSDFunction.apply(
        hidden, weight, targets.hidden, targets.weight, labels, beta, -100, temperature
    )
    theirs.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    true = our_layers(beta, temperature, labels, "reference")
    for found, other, exact in zip(
        our_layers(beta, temperature, labels, "cpu"), [theirs.detach(), hidden.grad, weight.grad], true, strict=True
    ):
        close(found, other, exact)


def test_flash_linear_attention_fused_kl_and_ours_have_the_same_gradients() -> None:
    labels = torch.arange(8)
    hidden, weight, targets = layers()
    theirs = fused_kl_div_loss(hidden, targets.hidden, weight, targets.weight)
    theirs.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    true = our_layers(0.0, 1.0, labels, "reference")
    for found, other, exact in zip(
        our_layers(0.0, 1.0, labels, "cpu"), [theirs.detach(), hidden.grad, weight.grad], true, strict=True
    ):
        close(found, other, exact)
