"""What fp32 logits buy: the gradient of a student that is close to its teacher, and nothing lost anywhere else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from latentforge.kernels import LinearTargets, TopKTargets, linear_kd_loss, linear_sweeps
from latentforge.kernels.linear_products import Split, Upcast
from latentforge.kernels.targets import topk_targets

ROWS, WIDTH = 48, 192


class RoundsLogits(Upcast):
    """The fault that this file exists for: a product that ends in bf16."""

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return super().logits(hidden, weight).bfloat16().float()


def setting(vocab: int, distance: float, temperature: float, *, peaked: float = 1.0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(vocab)
    hidden = torch.randn(ROWS, WIDTH, generator=generator) * peaked
    weight = (torch.randn(vocab, WIDTH, generator=generator) * 0.2).bfloat16()
    student = (hidden + distance * torch.randn(ROWS, WIDTH, generator=generator)).bfloat16()
    labels = torch.randint(0, vocab, (ROWS,), generator=generator)
    return {
        "hidden": student,
        "weight": weight,
        "labels": labels,
        "teacher": hidden.bfloat16(),
        "temperature": temperature,
    }


def gradients(case: dict[str, Any], dtype: torch.dtype, kind: str, weights: tuple[float, float], **more: Any) -> Any:
    """(kd, d_hidden, d_weight) of ``linear_kd_loss`` on a case."""
    hidden, weight = (case[name].to(dtype, copy=True).requires_grad_() for name in ("hidden", "weight"))
    targets: LinearTargets | TopKTargets = LinearTargets(case["teacher"], case["weight"])
    if kind == "topk":
        logits = case["teacher"].double() @ case["weight"].double().T
        targets = topk_targets(logits, 32, case["temperature"])
    found = linear_kd_loss(
        hidden,
        weight,
        targets,
        case["labels"],
        temperature=case["temperature"],
        ce_weight=weights[0],
        kd_weight=weights[1],
        denominator=float(ROWS),
        **more,
    )
    found.loss.backward()
    return found.kd.item(), hidden.grad, weight.grad


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("chunk_rows", [None, 16])
@pytest.mark.parametrize("kind", ["linear", "topk"])
@pytest.mark.parametrize("products", [Upcast, Split])
def test_a_close_student_gets_a_gradient_ten_times_better_than_bf16_logits_give(
    kind: str, chunk_rows: int | None, products: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = setting(8192, 0.01, 1.0)
    kd, *exact = gradients(case, torch.float64, kind, (0.0, 1.0))
    assert 0 < kd < 0.01
    errors = {}
    for name, kept in (("kept", products), ("rounded", RoundsLogits)):
        monkeypatch.setattr(linear_sweeps, "products_for", lambda hidden, weight, kept=kept: kept())
        _, *found = gradients(case, torch.bfloat16, kind, (0.0, 1.0), chunk_rows=chunk_rows)
        errors[name] = [error(a, b) for a, b in zip(found, exact, strict=True)]
    assert all(ours < 4e-3 for ours in errors["kept"])
    assert all(10 * ours < theirs for ours, theirs in zip(errors["kept"], errors["rounded"], strict=True))


def by_torch(case: dict[str, Any], weights: tuple[float, float]) -> list[Tensor]:
    """d_hidden and d_weight of the same loss by torch in bf16, the softmaxes in fp32."""
    hidden, weight = (case[name].clone().requires_grad_() for name in ("hidden", "weight"))
    t = case["temperature"]
    logits = (hidden @ weight.T).float()
    teacher = (case["teacher"] @ case["weight"].T).float()
    kd = F.kl_div((logits / t).log_softmax(-1), (teacher / t).log_softmax(-1), log_target=True, reduction="batchmean")
    (weights[0] * F.cross_entropy(logits, case["labels"]) + weights[1] * t * t * kd).backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    return [hidden.grad, weight.grad]


@pytest.mark.parametrize("chunk_rows", [None, 16])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(
    ("vocab", "distance", "peaked"), [(1519, 0.02, 1.0), (1003, 0.5, 1.0), (2048, 0.5, 4.0), (257, 1.0, 0.1)]
)
@pytest.mark.parametrize("weights", [(0.3, 0.7), (1.0, 0.0)])
def test_the_gradient_is_never_further_from_fp64_than_torchs_at_bf16(
    vocab: int, distance: float, peaked: float, temperature: float, weights: Any, chunk_rows: int | None
) -> None:
    case = setting(vocab, distance, temperature, peaked=peaked)
    _, *exact = gradients(case, torch.float64, "linear", weights)
    _, *found = gradients(case, torch.bfloat16, "linear", weights, chunk_rows=chunk_rows)
    for ours, theirs, oracle in zip(found, by_torch(case, weights), exact, strict=True):
        assert error(ours, oracle) <= 1.01 * error(theirs, oracle)


@pytest.mark.parametrize("chunk_rows", [12, 4, 1000])  # sums kept over 24 chunks; two sweeps; one chunk
def test_the_gradient_of_the_weight_is_rounded_once(chunk_rows: int) -> None:
    generator = torch.Generator().manual_seed(1)
    # Every row says the same: sums in bf16 would stop growing long before the last chunk.
    hidden = (1 + 0.1 * torch.randn(192, 4, generator=generator)).bfloat16()
    weight = (torch.randn(301, 4, generator=generator) * 0.1).bfloat16()
    labels = torch.randint(0, 301, (192,), generator=generator)
    found = {}
    for dtype, more in ((torch.float64, {}), (torch.bfloat16, {"chunk_rows": chunk_rows})):
        leaf = weight.to(dtype, copy=True).requires_grad_()
        loss = linear_kd_loss(
            hidden.to(dtype), leaf, None, labels, temperature=1.0, ce_weight=1.0, kd_weight=0.0, denominator=1.0, **more
        ).loss
        loss.backward()
        assert leaf.grad is not None
        found[dtype] = leaf.grad
    exact = found[torch.float64]
    assert error(found[torch.bfloat16], exact) < 1.05 * error(exact.bfloat16(), exact)


def test_the_product_of_two_bf16_products_keeps_fp32_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(33, 257, generator=generator).bfloat16()
    weight = torch.randn(9001, 257, generator=generator).bfloat16()
    exact = hidden.double() @ weight.double().T
    assert error(Split().logits(hidden, weight), exact) < 1e-5
    assert error(Upcast().logits(hidden, weight), exact) < 1e-6
    assert error(RoundsLogits().logits(hidden, weight), exact) > 1e-3
