"""``linear_kd_loss`` on one shape: a last layer between bands, its gradients against those over logits in fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from latentforge.kernels.guard.bands import Bands
from latentforge.kernels.guard.trials import DTYPES, SMALL, TOP_K, Wanted, allowed
from latentforge.kernels.guard.variants import Variant
from latentforge.kernels.reference import kd as reference
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import DenseTargets, LinearTargets, Targets, TopKTargets, topk_targets

LOSS = 1e-4
"""Of the loss, relative: products in bf16 with sums in fp32 differ by their order."""
TEMPERATURE, CE_WEIGHT, KD_WEIGHT = 2.0, 0.3, 0.7


class LinearTrial:
    """A student's last layer against a teacher's (``dense``) or top-k rows, labels with an ignored row."""

    def __init__(self, variant: Variant, shape: tuple[int, ...], device: torch.device, seed: int) -> None:
        rows, width, vocab = shape
        self.dtype = DTYPES[variant.dtype]
        generator = torch.Generator(device=device).manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator, device=device)

        self.bands = Bands()
        self.hidden = self.bands.place("hidden", normal(rows, width).to(self.dtype))
        self.weight = self.bands.place("weight", (normal(vocab, width) * 3 / width**0.5).to(self.dtype))
        labels = torch.randint(0, vocab, (rows,), generator=generator, device=device)
        if rows > 1:
            labels[rows // 2] = -100
        self.labels = self.bands.place("labels", labels)
        teacher = (self.hidden.float() + 0.5 * normal(rows, width)).to(self.dtype)
        self.targets: Targets | LinearTargets
        if variant.targets == "topk":
            found = topk_targets(teacher.float() @ self.weight.float().T, min(TOP_K, vocab // 2), TEMPERATURE)
            self.targets = TopKTargets(
                self.bands.place("top-k ids", found.ids),
                self.bands.place("top-k logprobs", found.logprobs),
                self.bands.place("top-k tail", found.tail),
            )
        else:
            self.targets = LinearTargets(self.bands.place("teacher's hidden", teacher), self.weight)
        self.rows = rows
        self.wanted = self._reference()

    def _reference(self) -> dict[str, Wanted]:
        exact = torch.float64 if self.rows * self.weight.shape[0] < SMALL else torch.float32
        hidden, weight = self.hidden.to(exact), self.weight.to(exact)
        scales = (CE_WEIGHT / self.rows, KD_WEIGHT * TEMPERATURE**2 / self.rows)
        settings = KDSettings(TEMPERATURE, TEMPERATURE, ce_scale=scales[0], kd_scale=scales[1])
        d_hidden, d_weight = torch.zeros_like(hidden), torch.zeros_like(weight)
        loss = torch.zeros((), dtype=torch.float64, device=hidden.device)
        for start in range(0, self.rows, reference.CHUNK_ROWS):
            rows = slice(start, start + reference.CHUNK_ROWS)
            part: Targets
            if isinstance(self.targets, LinearTargets):
                part = DenseTargets(self.targets.hidden[rows].to(exact) @ weight.T)
            else:
                assert isinstance(self.targets, TopKTargets)
                part = TopKTargets(self.targets.ids[rows], self.targets.logprobs[rows], self.targets.tail[rows])
            found = reference.row_losses(hidden[rows] @ weight.T, part, self.labels[rows], settings, gradient=True)
            assert found.gradient is not None
            loss += scales[0] * found.ce.double().sum() + scales[1] * found.kd.double().sum()
            d_hidden[rows] = found.gradient @ weight
            d_weight += found.gradient.T @ hidden[rows]
        return {
            "loss": Wanted(loss, LOSS),
            "d_hidden": allowed(d_hidden, self.dtype),
            "d_weight": allowed(d_weight, self.dtype),
        }

    def run(self, entry: Callable[..., Any], **options: Any) -> Any:
        """Loss, and the gradients of hidden [N, H] and weight [V, H]."""
        hidden, weight = self.hidden.detach().requires_grad_(), self.weight.detach().requires_grad_()
        found = self._call(entry, hidden, weight, options)
        found.loss.backward()
        return found.loss.detach(), hidden.grad, weight.grad

    def call(self, entry: Callable[..., Any], **options: Any) -> dict[str, Tensor]:
        """The same by name."""
        self.bands.restore()
        loss, d_hidden, d_weight = self.run(entry, **options)
        return {"loss": loss, "d_hidden": d_hidden, "d_weight": d_weight}

    def read_only(self, entry: Callable[..., Any], **options: Any) -> dict[str, Tensor]:
        """The loss of a call without a gradient."""
        self.bands.restore()
        with torch.no_grad():
            return {"loss": self._call(entry, self.hidden, self.weight, options).loss}

    def _call(self, entry: Callable[..., Any], hidden: Tensor, weight: Tensor, options: dict[str, Any]) -> Any:
        return entry(
            hidden,
            weight,
            self.targets,
            self.labels,
            temperature=TEMPERATURE,
            ce_weight=CE_WEIGHT,
            kd_weight=KD_WEIGHT,
            denominator=float(self.rows),
            **options,
        )


def reference_linear(*arguments: Any, **named: Any) -> Any:
    """The reference with the signature of the public function, as it is timed."""
    from latentforge.kernels.linear import linear_kd_loss

    return linear_kd_loss(*arguments, **{**named, "backend": "reference"})
