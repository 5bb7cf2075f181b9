"""The executable checks of the contract ``kd-step``: the loss in the limits where its answer is known.

Each takes ``mutant``: the planted mistake with which it must fail. A mutant changes what is checked, never the check.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentforge.contracts import Finding


def pure_cross_entropy(*, mutant: str | None = None) -> Finding:
    """kd_weight = 0 leaves exactly the gradient of the cross-entropy, whatever the teacher says."""
    import torch
    from torch.nn import functional

    from latentforge.contracts import Finding, worse
    from latentforge.kernels.fixtures import TEMPERATURES, gradient_of, known_mutant, labels_of, normal
    from latentforge.kernels.targets import DenseTargets

    known_mutant(mutant, ("leak",))
    rows, vocab = 6, 29
    student, teacher, labels = (
        normal(14, rows, vocab, scale=2.0),
        normal(15, rows, vocab, scale=2.0),
        labels_of(16, rows, vocab),
    )
    errors: dict[str, float] = {}
    for backend, dtype in (("reference", torch.float64), ("cpu", torch.float32)):
        s, t = student.to(dtype), teacher.to(dtype)
        leaf = s.double().detach().clone().requires_grad_()
        (expected,) = torch.autograd.grad(functional.cross_entropy(leaf, labels), leaf)
        worst = 0.0
        for temperature in TEMPERATURES:
            gradient = gradient_of(
                s,
                DenseTargets(t),
                labels,
                temperature=temperature,
                ce_weight=1.0,
                kd_weight=0.01 if mutant == "leak" else 0.0,
                denominator=float(rows),
                backend=backend,
            )
            error = float((gradient.double() - expected).abs().max())
            worst = worse(worst, error)
        errors[backend] = worst
    return Finding(
        errors["reference"] < 1e-12 and errors["cpu"] < 1e-6,
        f"max difference from torch's cross-entropy gradient: fp64 reference {errors['reference']:.1e} (bound 1e-12), "
        f"fp32 cpu {errors['cpu']:.1e} (bound 1e-6)",
        {"max_abs_error": errors},
    )


def zero_at_agreement(*, mutant: str | None = None) -> Finding:
    """A student that equals its teacher has nothing to learn from it: loss 0, gradient 0, at every temperature."""
    import torch

    from latentforge.contracts import Finding
    from latentforge.kernels.fixtures import TEMPERATURES, gradient_of, known_mutant, labels_of, normal, value_of
    from latentforge.kernels.targets import DenseTargets, topk_targets

    known_mutant(mutant, ("teacher_warmer",))
    rows, vocab, k = 6, 31, 8
    logits, labels = normal(17, rows, vocab, scale=3.0), labels_of(18, rows, vocab)
    worst: dict[str, float] = {}
    for backend, dtype in (("reference", torch.float64), ("cpu", torch.float32)):
        found = 0.0
        for temperature in TEMPERATURES:
            teacher_temperature = temperature * (1.5 if mutant == "teacher_warmer" else 1.0)
            for targets in (DenseTargets(logits.to(dtype)), topk_targets(logits.to(dtype), k, teacher_temperature)):
                settings = {
                    "temperature": temperature,
                    "teacher_temperature": teacher_temperature,
                    "ce_weight": 0.0,
                    "kd_weight": 1.0,
                    "denominator": float(rows),
                    "backend": backend,
                }
                size = float(gradient_of(logits.to(dtype), targets, labels, **settings).abs().max())
                size = max(size, abs(value_of(logits.to(dtype), targets, labels, **settings)))
                found = size if not size <= found else found
        worst[backend] = found
    # Top-k targets hold fp32 log-probabilities, so even fp64 is zero only to the rounding of those (times T squared).
    return Finding(
        all(size < 5e-6 for size in worst.values()),
        f"largest |loss| or |gradient|: reference {worst['reference']:.1e}, cpu {worst['cpu']:.1e} (bound 5e-6)",
        {"largest": worst, "bound": 5e-6},
    )


def rises_with_divergence(*, mutant: str | None = None) -> Finding:
    """Along a line away from the teacher the loss rises at each of 40 steps, and is the forward KL all along.

    KL(p || q) is convex along a line in the student's logits with its minimum at the teacher, so it must rise.
    """
    import torch

    from latentforge.contracts import Finding
    from latentforge.kernels.fixtures import known_mutant, labels_of, normal, value_of
    from latentforge.kernels.targets import DenseTargets

    known_mutant(mutant, ("reverse_kl",))
    rows, vocab, temperature, points = 4, 23, 2.0, 41
    teacher, away = normal(19, rows, vocab, scale=2.0), normal(20, rows, vocab, scale=2.0)
    labels = labels_of(21, rows, vocab)
    log_p = (teacher / temperature).log_softmax(-1)
    values, off, reverse_gap = [], 0.0, 0.0
    for i in range(points):
        student = teacher + (i / (points - 1)) * away
        log_q = (student / temperature).log_softmax(-1)
        forward = float(temperature**2 * (log_p.exp() * (log_p - log_q)).sum() / rows)
        reverse = float(temperature**2 * (log_q.exp() * (log_q - log_p)).sum() / rows)
        value = value_of(
            student,
            DenseTargets(teacher),
            labels,
            temperature=temperature,
            ce_weight=0.0,
            kd_weight=1.0,
            denominator=float(rows),
            backend="reference",
        )
        if mutant == "reverse_kl":
            value = reverse
        values.append(value)
        off = max(off, abs(value - forward))
        reverse_gap = max(reverse_gap, abs(reverse - forward))
    falls = int(sum(bool(later <= earlier) for earlier, later in itertools.pairwise(values)))
    assert reverse_gap > 1e-3, "the fixture cannot tell the two directions apart"
    return Finding(
        falls == 0 and off < 1e-10 and bool(torch.isfinite(torch.tensor(values)).all()),
        f"{points - 1 - falls} of {points - 1} steps rise, from {values[0]:.1e} to {values[-1]:.4f}; "
        f"off the forward KL by {off:.1e} (the reverse KL is off by {reverse_gap:.3f})",
        {"values": values, "falls": falls, "max_off_forward": off, "reverse_gap": reverse_gap},
    )
