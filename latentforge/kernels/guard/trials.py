"""One operator on one shape: inputs between bands, the call as training makes it, and what it must give.

The reference computes in fp32 on the same device (in fp64 where the shape is small); what is allowed is twice the
error that torch's own result has after rounding to the operator's precision, with hard bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from latentforge.kernels.guard.bands import Bands
from latentforge.kernels.guard.variants import Variant
from latentforge.kernels.parity.kd import mixed_counts
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, Targets, TopKTargets, cut_rows, topk_targets

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CAPS = {torch.bfloat16: 2.0**-6, torch.float32: 1e-5}
FLOOR = 1e-5
SMALL = 10_000
TOP_K = 32


@dataclass(frozen=True)
class Wanted:
    """What an output must be (fp32 or fp64), and by how much of its length it may be off.

    ``least`` is the length that counts at least: losses below one nat a row are off by parts of a nat.
    """

    value: Tensor
    tolerance: float
    least: float = 0.0

    def off(self, found: Tensor) -> float:
        """The length of the difference over that of the wanted."""
        return off(found, self.value, self.least)


class Trial(Protocol):
    """Inputs of one shape; ``call`` may be repeated and finds them as they were."""

    wanted: dict[str, Wanted]
    bands: Bands

    def run(self, entry: Callable[..., Any], **options: Any) -> Any:
        """The bare call, as it is timed: what it gives, without copies, on inputs as they lie."""
        ...

    def call(self, entry: Callable[..., Any], **options: Any) -> dict[str, Tensor]:
        """The outputs of one call with a gradient, by name; they are copies."""
        ...

    def read_only(self, entry: Callable[..., Any], **options: Any) -> dict[str, Tensor] | None:
        """The outputs of a call that may write nothing; None where the operator has none."""
        ...


def allowed(value: Tensor, dtype: torch.dtype) -> Wanted:
    """An output with what is allowed at a precision."""
    rounded = value.to(dtype).to(value.dtype)
    return Wanted(value, min(CAPS[dtype], 2.0 * off(rounded, value) + FLOOR))


def allowed_loss(value: Tensor) -> Wanted:
    """Losses [N] in nats: within 1e-5 of a nat, or of the loss where that is more than one."""
    return Wanted(value, CAPS[torch.float32], math.sqrt(value.numel()))


def off(found: Tensor, wanted: Tensor, least: float = 0.0) -> float:
    """The length of the difference over that of the wanted, over the finite entries of the wanted."""
    finite = wanted.isfinite()
    difference = torch.where(finite, found.to(wanted.dtype) - wanted, torch.zeros_like(wanted))
    size = max(float(torch.where(finite, wanted, torch.zeros_like(wanted)).norm()), least)
    return float(difference.norm()) / size if size > 0 else float(difference.norm())


class KDTrial:
    """``row_losses`` of a backend: student logits with a row stride, dense or top-k targets, labels with ignored rows.

    Odd shapes have padding, minus infinity on both sides, an ignored row, and rows with fewer entries than k.
    """

    def __init__(self, variant: Variant, shape: tuple[int, ...], device: torch.device, seed: int) -> None:
        rows, vocab = shape
        dtype = DTYPES[variant.dtype]
        generator = torch.Generator(device=device).manual_seed(seed)
        teacher = torch.randn(rows, vocab, generator=generator, device=device) * 3.0
        student = (teacher + 0.7 * torch.randn(rows, vocab, generator=generator, device=device)).to(dtype)
        teacher = teacher.to(dtype)
        labels = torch.randint(0, vocab, (rows,), generator=generator, device=device)
        if rows > 1 and vocab % 2:
            teacher[:, -3:] = -torch.inf
            student[:, -3:] = -torch.inf
            labels.clamp_(max=vocab - 4)
            labels[rows // 2] = -100
        self.bands = Bands()
        targets: Targets
        if variant.targets == "topk":
            found = topk_targets(teacher, min(TOP_K, vocab // 2), 2.0)
            if rows > 2 and vocab % 2:
                found = cut_rows(found, mixed_counts(rows, found.ids.shape[1]).to(device), 2.0)
            targets = TopKTargets(
                self.bands.place("top-k ids", found.ids),
                self.bands.place("top-k logprobs", found.logprobs),
                self.bands.place("top-k tail", found.tail),
            )
        else:
            targets = DenseTargets(self.bands.place("teacher logits", teacher, gap=5))
        self.targets = targets
        self.labels = self.bands.place("labels", labels)
        self.student = self.bands.place("student logits", student, output=True, gap=3)
        self.settings = KDSettings(
            2.0, 2.0, ce_scale=0.3 / rows, kd_scale=0.7 * 4.0 / rows, direction=variant.direction, beta=0.5
        )
        self.wanted = self._reference(dtype)

    def _reference(self, dtype: torch.dtype) -> dict[str, Wanted]:
        exact = self.student.numel() < SMALL
        ce: list[Tensor] = []
        kd: list[Tensor] = []
        gradient: list[Tensor] = []
        for rows, part in reference.chunks(self.student, self.targets):
            student, labels = self.student[rows], self.labels[rows]
            if exact:
                student, labels, part = student.cpu().double(), labels.cpu(), _exact(part)
            else:
                student = student.float()
            found = reference.row_losses(student, part, labels, self.settings, gradient=True)
            assert found.gradient is not None
            for values, value in ((ce, found.ce), (kd, found.kd), (gradient, found.gradient)):
                values.append(value.to(self.student.device))
        return {
            "gradient": allowed(torch.cat(gradient), dtype),
            "ce": allowed_loss(torch.cat(ce)),
            "kd": allowed_loss(torch.cat(kd)),
        }

    def run(self, entry: Callable[..., Any], **options: Any) -> Any:
        """The bare call with its gradient."""
        return entry(self.student, self.targets, self.labels, self.settings, write_gradient=True, **options)

    def call(self, entry: Callable[..., Any], **options: Any) -> dict[str, Tensor]:
        """Losses [N] and the gradient [N, V] that replaced the student's logits."""
        self.bands.restore()
        ce, kd = self.run(entry, **options)
        return {"gradient": self.student.clone(), "ce": ce.clone(), "kd": kd.clone()}

    def read_only(self, entry: Callable[..., Any], **options: Any) -> dict[str, Tensor]:
        """Losses [N]; the student's logits stay."""
        self.bands.restore()
        ce, kd = entry(self.student, self.targets, self.labels, self.settings, write_gradient=False, **options)
        return {"ce": ce.clone(), "kd": kd.clone()}


def _exact(targets: Targets | None) -> Targets | None:
    if isinstance(targets, DenseTargets):
        return DenseTargets(targets.logits.cpu().double())
    assert isinstance(targets, TopKTargets)
    return TopKTargets(targets.ids.cpu(), targets.logprobs.cpu(), targets.tail.cpu())


def reference_rows(
    student: Tensor,
    targets: Targets | None,
    labels: Tensor | None,
    settings: KDSettings,
    *,
    bias: Tensor | None = None,
    write_gradient: bool = False,
) -> tuple[Tensor, Tensor]:
    """The reference with the signature of a backend's ``row_losses``: the ladder's last rung for ``kd_loss``."""
    from latentforge.kernels.backends import kd_rows

    return kd_rows("reference", student, targets, labels, settings, bias=bias, write_gradient=write_gradient)
