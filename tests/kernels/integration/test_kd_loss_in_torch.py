"""kd_loss in a torch program, in every direction: whose logits it takes, gradient of the bias, autocast, compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentforge.errors import RefusedError
from latentforge.kernels import DenseTargets, KDLoss, TopKTargets, backends, kd_loss
from latentforge.kernels.targets import topk_targets

N, V, H = 10, 67, 12
WEIGHTS: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7, "denominator": float(N)}
DIRECTIONS = ("forward", "reverse", "jsd")
BACKENDS = ("cpu", "reference")


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[4] = -100
    return torch.randn(N, H, generator=generator), torch.randn(N, V, generator=generator) * 3, labels


def head() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(H, V, bias=False)


def kinds(teacher: Tensor) -> list[DenseTargets | TopKTargets]:
    return [DenseTargets(teacher), topk_targets(teacher, 5, 2.0)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_logits_of_somebody_else_are_refused_in_every_direction(batch: Any, direction: str, backend: str) -> None:
    inputs, teacher, labels = batch
    last = head()
    whole = last(inputs)
    for targets in kinds(teacher):
        for logits, reason in (
            (torch.randn(N, V, requires_grad=True), "leaf"),
            (last(inputs.view(2, 5, H)).view(N, V), "view of a tensor"),
            (whole[:], "view"),
            (torch.cat([last(inputs), last(inputs)])[:N], "view"),
            (last(inputs.T.contiguous().T).T.contiguous().T, "not contiguous|view"),
        ):
            kept = logits.detach().clone()
            with pytest.raises(RefusedError, match=reason):
                kd_loss(logits, targets, labels, direction=direction, backend=backend, **WEIGHTS)
            assert torch.equal(logits.detach(), kept)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_saved_logits_and_a_second_backward_are_refused_in_every_direction(
    batch: Any, direction: str, backend: str
) -> None:
    inputs, teacher, labels = batch
    more = WEIGHTS | {"direction": direction, "backend": backend}
    for targets in kinds(teacher):
        saved = torch.tanh(head()(inputs))  # tanh keeps its result, which are the logits
        loss = kd_loss(saved, targets, labels, **more).loss
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        loss = kd_loss(head()(inputs), targets, labels, **more).loss
        loss.backward(retain_graph=True)
        with pytest.raises(RefusedError, match="second backward"):
            loss.backward()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_without_grad_nothing_is_written_in_any_direction(batch: Any, direction: str, backend: str) -> None:
    inputs, teacher, labels = batch
    for targets in kinds(teacher):
        logits = head()(inputs)
        kept, of_teacher = logits.detach().clone(), teacher.clone()
        with torch.no_grad():
            found = kd_loss(logits, targets, labels, direction=direction, backend=backend, **WEIGHTS)
        assert not found.loss.requires_grad
        assert torch.equal(logits.detach(), kept)
        written = kd_loss(logits, targets, labels, direction=direction, backend=backend, **WEIGHTS)
        assert torch.allclose(found.loss, written.loss)
        assert not torch.equal(logits.detach(), kept)
        assert torch.equal(teacher, of_teacher)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_bias_receives_the_column_sums_that_fp64_gives_it(
    batch: Any, direction: str, dtype: torch.dtype, backend: str
) -> None:
    inputs, teacher, labels = batch
    start = torch.randn(V, generator=torch.Generator().manual_seed(4))
    for targets in kinds(teacher):
        found = {}
        for kind, name in ((dtype, backend), (torch.float64, "reference")):
            logits = head().to(kind)(inputs.to(dtype).to(kind))
            bias = start.to(dtype).to(kind, copy=True).requires_grad_()
            loss = kd_loss(
                logits,
                targets,
                labels,
                bias=bias,
                direction=direction,
                logit_scale=0.8,
                soft_cap=12.0,
                backend=name,
                **WEIGHTS,
            ).loss
            (3 * loss).backward()
            assert bias.grad is not None
            assert bias.grad.dtype == kind
            found[kind] = bias.grad.double()
        error = (found[dtype] - found[torch.float64]).norm() / found[torch.float64].norm()
        assert error < (1e-5 if dtype == torch.float32 else 2e-2)


def test_the_bias_of_the_loss_is_the_bias_of_the_layer(batch: Any) -> None:
    inputs, teacher, labels = batch
    start = torch.randn(V, generator=torch.Generator().manual_seed(4))
    gradients = []
    for inside in (False, True):
        last, bias = head(), start.clone().requires_grad_()
        logits = nn.functional.linear(inputs, last.weight, bias if inside else None)
        given = {"bias": None if inside else bias, "backend": "reference"}
        kd_loss(logits, DenseTargets(teacher), labels, **WEIGHTS, **given).loss.backward()
        gradients.append((bias.grad, last.weight.grad))
    for a, b in zip(*gradients, strict=True):
        assert torch.allclose(a, b, atol=1e-6)


class Capped(nn.Module):
    """A last layer whose bias, scale and cap are left to the loss."""

    def __init__(self, direction: str, backend: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(H, V)
        self.more = {"direction": direction, "backend": backend, "logit_scale": 0.8, "soft_cap": 15.0}

    def forward(self, inputs: Tensor, targets: Any, labels: Tensor) -> KDLoss:
        logits = nn.functional.linear(inputs, self.last.weight)
        return kd_loss(logits, targets, labels, bias=self.last.bias, **WEIGHTS, **self.more)


@pytest.mark.parametrize("direction", ["reverse", "jsd"])
def test_every_direction_compiles_as_one_graph(batch: Any, direction: str) -> None:
    inputs, teacher, labels = batch
    torch._dynamo.reset()
    model, twin = Capped(direction, "cpu"), Capped(direction, "cpu")
    expected = model(inputs, DenseTargets(teacher), labels)
    found = torch.compile(twin, fullgraph=True)(inputs, DenseTargets(teacher), labels)
    expected.loss.backward()
    found.loss.backward()
    assert torch.allclose(found.loss, expected.loss, atol=1e-5)
    for a, b in zip(twin.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_autocast_gives_bf16_logits_and_an_fp32_loss(batch: Any) -> None:
    inputs, teacher, labels = batch
    last = head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = last(inputs)
        found = kd_loss(logits, DenseTargets(teacher), labels, **WEIGHTS)
    found.loss.backward()
    assert logits.dtype == torch.bfloat16
    assert found.loss.dtype == torch.float32
    rounded = nn.functional.linear(inputs.bfloat16(), last.weight.detach().bfloat16())
    exact = kd_loss(rounded.double(), DenseTargets(teacher.double()), labels, **WEIGHTS)
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=1e-5)
    assert last.weight.grad is not None
    assert last.weight.grad.dtype == torch.float32


def test_autocast_does_not_reach_into_the_definition(batch: Any) -> None:
    inputs, teacher, labels = batch
    logits = head()(inputs).detach()
    plain = kd_loss(logits, DenseTargets(teacher), labels, backend="reference", **WEIGHTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = kd_loss(logits, DenseTargets(teacher), labels, backend="reference", **WEIGHTS)
    assert all(torch.equal(a, b) for a, b in zip(found, plain, strict=True))


def test_a_record_of_the_guard_is_read_when_a_program_is_compiled_and_then_held(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    class Ladder:
        @staticmethod
        def chosen(op: str, dtype: torch.dtype, device: int) -> str:
            asked.append((op, dtype, device))
            return "triton"

    monkeypatch.setattr(backends, "import_module", lambda name: Ladder)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def program(x: Tensor) -> Tensor:
        return x + 1 if backends._proven("kd_loss", torch.float32, 0) == "triton" else x - 1

    for _ in range(3):
        assert program(torch.zeros(1)).item() == 1.0
    assert asked == [("kd_loss", torch.float32, 0)]
