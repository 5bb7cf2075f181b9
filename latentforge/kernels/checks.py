"""The executable checks that the contract ``kd-mathematics`` names.

Each takes ``mutant``: the planted mistake with which it must fail. A mutant changes what is checked, never the check.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from latentforge.contracts import Finding
    from latentforge.kernels.targets import Targets


# The mistake that is planted for each direction: another direction's gradient, or the other way of mixing.
_DIRECTION_MUTANTS = {"forward": "reverse_kl", "reverse": "forward_kl", "jsd": "beta_swapped"}


def loss_gradient_consistent(*, direction: str = "forward", beta: float = 0.3, mutant: str | None = None) -> Finding:
    """The analytic gradient is the derivative of the reported loss: central differences in fp64.

    Dense and top-k targets, T in {1, 2, 4}, five pairs of weights (two for reverse KL and JSD: the cross-entropy is the
    same), once with a teacher temperature of its own.
    """
    from latentforge.contracts import Finding
    from latentforge.kernels.fixtures import TEMPERATURES, WEIGHTS, gradient_of, known_mutant

    known_mutant(mutant, (_DIRECTION_MUTANTS[direction],))
    student, teacher, labels = _pair(direction)
    worst, at = 0.0, ""
    for temperature in TEMPERATURES:
        for ce_weight, kd_weight in WEIGHTS if direction == "forward" else ((0.3, 0.7), (0.0, 1.0)):
            for kind, teacher_temperature in (("dense", None), ("dense", 1.5), ("topk", None)):
                t_teacher = teacher_temperature or temperature
                targets, settings = _asked(direction, beta, temperature, ce_weight, kd_weight, kind, t_teacher)
                planted = {"forward_kl": {"direction": "forward"}, "beta_swapped": {"beta": 1 - beta}}
                given = settings | planted.get(mutant or "", {})
                analytic = gradient_of(student, targets, labels, **given)
                if mutant == "reverse_kl" and kind == "dense" and kd_weight > 0:
                    analytic = _reverse_kl_gradient(
                        student, teacher, labels, temperature, t_teacher, ce_weight, kd_weight
                    )
                numeric = _numeric_gradient(direction, beta, temperature, ce_weight, kd_weight, kind, t_teacher)
                error = float((analytic - numeric).abs().max())
                if not (math.isnan(worst) or error <= worst):
                    worst, at = error, f"T={temperature:g}, weights {ce_weight:g}/{kd_weight:g}, {kind}"
    return Finding(
        worst < 1e-6,
        f"max |analytic − numeric| {worst:.1e} (bound 1e-6; worst at {at})",
        {"max_abs_error": worst, "bound": 1e-6, "worst_at": at},
    )


def _pair(direction: str) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and labels of the comparison with central differences."""
    from latentforge.kernels.fixtures import labels_of, normal

    rows, vocab = (3, 7) if direction == "forward" else (2, 6)
    return normal(1, rows, vocab, scale=1.5), normal(2, rows, vocab, scale=2.0), labels_of(3, rows, vocab)


def _asked(
    direction: str,
    beta: float,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    kind: str,
    teacher_temperature: float,
) -> tuple[Targets, dict[str, Any]]:
    """Targets and settings of one such comparison."""
    from latentforge.kernels.targets import DenseTargets, topk_targets

    _, teacher, labels = _pair(direction)
    targets = DenseTargets(teacher) if kind == "dense" else topk_targets(teacher, 3, teacher_temperature)
    return targets, {
        "temperature": temperature,
        "teacher_temperature": teacher_temperature,
        "ce_weight": ce_weight,
        "kd_weight": kd_weight,
        "denominator": float(len(labels)),
        "direction": direction,
        "beta": beta,
        "backend": "reference",
    }


@cache
def _numeric_gradient(
    direction: str,
    beta: float,
    temperature: float,
    ce_weight: float,
    kd_weight: float,
    kind: str,
    teacher_temperature: float,
) -> Tensor:
    """Central differences of the reported loss; a check and its control need the same ones, and they are the cost."""
    import torch

    from latentforge.kernels.fixtures import value_of

    student, _, labels = _pair(direction)
    targets, settings = _asked(direction, beta, temperature, ce_weight, kd_weight, kind, teacher_temperature)
    numeric, step = torch.zeros_like(student), 1e-5
    for i in range(student.shape[0]):
        for j in range(student.shape[1]):
            values = []
            for sign in (1.0, -1.0):
                moved = student.clone()
                moved[i, j] += sign * step
                values.append(value_of(moved, targets, labels, **settings))
            numeric[i, j] = (values[0] - values[1]) / (2 * step)
    return numeric


def _reverse_kl_gradient(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    temperature: float,
    teacher_temperature: float,
    ce_weight: float,
    kd_weight: float,
) -> Tensor:
    """The gradient of the same loss with KL(student || teacher), by torch's own autograd."""
    import torch
    from torch.nn import functional

    leaf = student.clone().requires_grad_()
    log_q, log_p = (leaf / temperature).log_softmax(-1), (teacher / teacher_temperature).log_softmax(-1)
    reverse = (log_q.exp() * (log_q - log_p)).sum() / student.shape[0]
    loss = ce_weight * functional.cross_entropy(leaf, labels) + kd_weight * temperature**2 * reverse
    (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient


def temperature_power(*, mutant: str | None = None) -> Finding:
    """The gradient of the KD term carries T to the first power: T² of the loss, less one T by the chain rule."""

    from latentforge.contracts import Finding, worse
    from latentforge.kernels.fixtures import gradient_of, known_mutant, labels_of, normal
    from latentforge.kernels.targets import DenseTargets

    known_mutant(mutant, ("t_squared", "t_zero"))
    rows, vocab = 4, 11
    student, teacher, labels = (
        normal(4, rows, vocab, scale=2.0),
        normal(5, rows, vocab, scale=2.0),
        labels_of(6, rows, vocab),
    )
    powers, worst = {}, 0.0
    for temperature in (2.0, 3.0, 4.0):
        gradient = gradient_of(
            student,
            DenseTargets(teacher),
            labels,
            temperature=temperature,
            ce_weight=0.0,
            kd_weight=1.0,
            denominator=1.0,
            backend="reference",
        )
        if mutant is not None:
            gradient = gradient * (temperature if mutant == "t_squared" else 1 / temperature)
        direction = (student / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
        factor = float((gradient * direction).sum() / (direction * direction).sum())
        powers[f"{temperature:g}"] = math.log(factor) / math.log(temperature) if factor > 0 else math.nan
        off = abs(powers[f"{temperature:g}"] - 1.0)
        worst = worse(worst, off)
    shown = ", ".join(f"T={t}: {p:.6f}" for t, p in powers.items())
    return Finding(worst < 1e-6, f"gradient = T^n (q − p) with n = {shown} (expected 1)", {"powers": powers})


def weights_named(*, mutant: str | None = None) -> Finding:
    """ce_weight weighs the cross-entropy and kd_weight the divergence, in loss and gradient, as torch computes them."""
    import torch
    from torch.nn import functional

    from latentforge.contracts import Finding, worse
    from latentforge.kernels.fixtures import WEIGHTS, gradient_of, known_mutant, labels_of, normal, value_of
    from latentforge.kernels.targets import DenseTargets

    known_mutant(mutant, ("swapped",))
    rows, vocab, temperature = 5, 13, 2.0
    student, teacher, labels = (
        normal(7, rows, vocab, scale=2.0),
        normal(8, rows, vocab, scale=2.0),
        labels_of(9, rows, vocab),
    )
    worst = 0.0
    for ce_weight, kd_weight in WEIGHTS:
        leaf = student.clone().requires_grad_()
        ce = functional.cross_entropy(leaf, labels)
        kd = functional.kl_div(
            (leaf / temperature).log_softmax(-1),
            (teacher / temperature).log_softmax(-1),
            log_target=True,
            reduction="batchmean",
        )
        expected = ce_weight * ce + kd_weight * temperature**2 * kd
        (expected_gradient,) = torch.autograd.grad(expected, leaf)
        given = (kd_weight, ce_weight) if mutant == "swapped" else (ce_weight, kd_weight)
        settings = {
            "temperature": temperature,
            "ce_weight": given[0],
            "kd_weight": given[1],
            "denominator": float(rows),
            "backend": "reference",
        }
        error = abs(value_of(student, DenseTargets(teacher), labels, **settings) - expected.item())
        difference = gradient_of(student, DenseTargets(teacher), labels, **settings) - expected_gradient
        worst = worse(worst, worse(error, float(difference.abs().max())))
    return Finding(
        worst < 1e-10,
        f"max difference from torch's cross_entropy and kl_div {worst:.1e} (bound 1e-10)",
        {"max_abs_error": worst, "bound": 1e-10},
    )


def tail_exact(*, mutant: str | None = None) -> Finding:
    """With the exact tail, the top-k gradient is close to the dense one for a peaked teacher."""
    import torch

    from latentforge.contracts import Finding
    from latentforge.kernels.fixtures import gradient_of, known_mutant
    from latentforge.kernels.targets import DenseTargets, TopKTargets, topk_targets

    known_mutant(mutant, ("renormalised",))
    rows, vocab, k = 16, 8192, 32
    generator = torch.Generator().manual_seed(10)
    # A few likely tokens over a broad floor, as a language model's rows are; about a tenth of the mass in the tail.
    teacher = torch.randn(rows, vocab, generator=generator, dtype=torch.float64) * 1.5
    peaks = torch.stack([torch.randperm(vocab, generator=generator)[:48] for _ in range(rows)])
    heights = torch.linspace(10.7, 3.0, 48, dtype=torch.float64).expand(rows, -1)
    teacher.scatter_(-1, peaks, heights)
    student = teacher + 0.5 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)
    labels = torch.zeros(rows, dtype=torch.int64)
    errors, masses = {}, {}
    for temperature in (1.0, 1.5):
        settings = {
            "temperature": temperature,
            "ce_weight": 0.0,
            "kd_weight": 1.0,
            "denominator": float(rows),
            "backend": "reference",
        }
        dense = gradient_of(student, DenseTargets(teacher), labels, **settings)
        targets = topk_targets(teacher, k, temperature)
        masses[f"{temperature:g}"] = float(
            torch.softmax(torch.cat([targets.logprobs.double() / temperature, targets.tail.double()[:, None]], -1), -1)[
                :, -1
            ].mean()
        )
        if mutant == "renormalised":
            logprobs = torch.log_softmax(targets.logprobs, dim=-1)
            targets = TopKTargets(targets.ids, logprobs, torch.full_like(targets.tail, -torch.inf))
        folded = gradient_of(student, targets, labels, **settings)
        errors[f"{temperature:g}"] = float((folded - dense).norm() / dense.norm())
    worst = errors["1"]
    passed = worst < 0.03
    return Finding(
        passed,
        f"gradient error {100 * worst:.1f} % at T=1, k={k}, tail mass {masses['1']:.2f} (bound 3 %); "
        f"T=1.5: {100 * errors['1.5']:.0f} %, tail mass {masses['1.5']:.2f}",
        {"relative_errors": errors, "tail_masses": masses, "bound": 0.03, "k": k},
    )


def every_row_trained(*, mutant: str | None = None) -> Finding:
    """Each row of a batch gets its own gradient, whatever the backend; an ignored row gets none."""
    import torch

    from latentforge.contracts import Finding
    from latentforge.kernels.fixtures import gradient_of, known_mutant, labels_of, normal
    from latentforge.kernels.targets import DenseTargets

    known_mutant(mutant, ("last_row_only",))
    rows, vocab, ignored = 16, 37, 5
    student, teacher, labels = (
        normal(11, rows, vocab).float(),
        normal(12, rows, vocab).float(),
        labels_of(13, rows, vocab),
    )
    labels[ignored] = -100
    moved: dict[str, int] = {}
    wrong = 0
    for backend in ("reference", "cpu"):
        gradient = gradient_of(
            student,
            DenseTargets(teacher),
            labels,
            temperature=2.0,
            ce_weight=0.3,
            kd_weight=0.7,
            denominator=float(rows - 1),
            backend=backend,
        )
        if mutant == "last_row_only":
            gradient[:-1] = 0.0
        alive = gradient.abs().sum(-1) > 0
        # Each row against its own gradient computed alone: rows that merely copy another one would pass a norm.
        for row in range(rows):
            alone = gradient_of(
                student[row : row + 1],
                DenseTargets(teacher[row : row + 1]),
                labels[row : row + 1],
                temperature=2.0,
                ce_weight=0.3,
                kd_weight=0.7,
                denominator=float(rows - 1),
                backend="reference",
            )
            wrong += int(not torch.allclose(gradient[row], alone[0], rtol=1e-4, atol=1e-7))
        moved[backend] = int(alive.sum())
    expected = rows - 1
    return Finding(
        wrong == 0 and all(count == expected for count in moved.values()),
        ", ".join(f"{backend}: {count} of {expected} valid rows have a gradient" for backend, count in moved.items())
        + f"; {wrong} rows differ from the row computed alone",
        {"rows_with_gradient": moved, "expected": expected, "rows_wrong": wrong},
    )
