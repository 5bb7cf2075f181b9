"""linear_kd_loss as a citizen of torch: what it writes, what it refuses, autocast, torch.compile, operator checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentforge.errors import RefusedError
from latentforge.kernels import (
    DenseTargets,
    KDLoss,
    LinearKDCriterion,
    LinearTargets,
    kd_loss,
    linear_autograd,
    linear_kd_loss,
    linear_sweeps,
)
from latentforge.kernels.linear_products import Upcast
from latentforge.kernels.targets import topk_targets

N, V, H = 12, 101, 16
WEIGHTS: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7, "denominator": float(N)}
BACKENDS = ("cpu", "reference")


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, V, (N,), generator=generator)
    return torch.randn(N, H, generator=generator), torch.randn(N, V, generator=generator) * 3, labels


class Student(nn.Module):
    """A small model with the loss inside its forward."""

    def __init__(self, *, linear: bool = True, backend: str = "auto", chunk_rows: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(H, H), nn.Tanh())
        self.last = nn.Linear(H, V)
        self.linear = linear
        self.more: dict[str, Any] = {"backend": backend} | ({"chunk_rows": chunk_rows} if linear else {})

    def forward(self, inputs: Tensor, targets: Any, labels: Tensor) -> KDLoss:
        hidden = self.body(inputs)
        if not self.linear:
            return kd_loss(self.last(hidden), targets, labels, **WEIGHTS, **self.more)
        return linear_kd_loss(hidden, self.last.weight, targets, labels, bias=self.last.bias, **WEIGHTS, **self.more)


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("chunk_rows", [None, 3])
def test_a_model_learns_the_same_with_and_without_its_logits(batch: Any, chunk_rows: int | None) -> None:
    inputs, teacher, labels = batch
    for targets in (DenseTargets(teacher), topk_targets(teacher, 5, 2.0)):
        plain = Student(linear=False, backend="reference")
        plain(inputs, targets, labels).loss.backward()
        for backend in BACKENDS:
            for factor in (1.0, 3.0):
                model = Student(backend=backend, chunk_rows=chunk_rows)
                found = model(inputs, targets, labels)
                (found.loss * factor).backward()
                for a, b in zip(gradients(model), gradients(plain), strict=True):
                    assert torch.allclose(a / factor, b, atol=1e-6)
                assert not found.ce.requires_grad


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_that_is_passed_is_written(batch: Any, backend: str) -> None:
    inputs, teacher, labels = batch
    hidden, weight = inputs.clone().requires_grad_(), torch.randn(V, H, requires_grad=True)
    bias = torch.randn(V, requires_grad=True)
    of_teacher = LinearTargets(torch.randn(N, 7), torch.randn(V, 7), torch.randn(V))
    given = (hidden, weight, bias, of_teacher.hidden, of_teacher.weight, of_teacher.bias, teacher, labels)
    kept = [t.detach().clone() for t in given if t is not None]
    for targets in (of_teacher, DenseTargets(teacher), topk_targets(teacher, 5, 2.0)):
        for chunk_rows in (None, 1):
            linear_kd_loss(
                hidden, weight, targets, labels, bias=bias, backend=backend, chunk_rows=chunk_rows, **WEIGHTS
            ).loss.backward()
    assert all(torch.equal(a.detach(), b) for a, b in zip(given, kept, strict=True) if a is not None)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_grad_only_the_loss_is_computed(batch: Any, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, teacher, labels = batch
    model = Student(backend=backend)
    expected = model(inputs, DenseTargets(teacher), labels)
    products = counted(monkeypatch)
    with torch.no_grad():
        found = model(inputs, DenseTargets(teacher), labels)
    assert not found.loss.requires_grad
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    assert products["times"] == 0


def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many products of each sort are made from here on."""
    found = {"logits": 0, "times": 0}

    class Counted(Upcast):
        def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
            found["logits"] += 1
            return super().logits(hidden, weight)

        def times(self, gradient: Tensor, operand: Tensor) -> Tensor:
            found["times"] += 1
            return super().times(gradient, operand)

    monkeypatch.setattr(linear_sweeps, "products_for", lambda hidden, weight: Counted())
    return found


@pytest.mark.parametrize(
    ("trained", "chunk_rows", "logits", "times"),
    [
        ("both", None, 1, 2),
        ("hidden", None, 1, 1),
        ("weight", None, 1, 1),
        ("bias", None, 1, 0),
        ("hidden", 3, 4, 4),
        ("hidden", 6, 2, 2),
    ],
)
def test_what_is_frozen_costs_no_product(
    batch: Any, trained: str, chunk_rows: int | None, logits: int, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, teacher, labels = batch
    hidden, weight, bias = inputs.clone(), torch.randn(V, H), torch.randn(V)
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        tensor.requires_grad_(trained in (name, "both"))
    products = counted(monkeypatch)
    found = linear_kd_loss(hidden, weight, DenseTargets(teacher), labels, bias=bias, chunk_rows=chunk_rows, **WEIGHTS)
    found.loss.backward()
    assert products == {"logits": logits, "times": times}
    assert [t.grad is not None for t in (hidden, weight, bias)] == [t.requires_grad for t in (hidden, weight, bias)]


def test_an_ignored_row_costs_no_product(batch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, teacher, labels = batch
    labels = labels.clone()
    labels[2:] = -100
    seen: list[int] = []

    class Seen(Upcast):
        def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
            seen.append(len(hidden))
            return super().logits(hidden, weight)

    monkeypatch.setattr(linear_sweeps, "products_for", lambda hidden, weight: Seen())
    Student()(inputs, DenseTargets(teacher), labels).loss.backward()
    assert seen == [2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_second_backward_is_refused(batch: Any, backend: str) -> None:
    inputs, teacher, labels = batch
    for retain in (True, False):
        loss = Student(backend=backend)(inputs, DenseTargets(teacher), labels).loss
        loss.backward(retain_graph=retain)
        with pytest.raises((RefusedError, RuntimeError), match=r"second (backward|time)"):
            loss.backward()


def test_a_gradient_of_the_gradient_is_refused(batch: Any) -> None:
    inputs, teacher, labels = batch
    model = Student()
    loss = model(inputs, DenseTargets(teacher), labels).loss
    with pytest.raises(RefusedError, match="create_graph=True"):
        torch.autograd.grad(loss, model.last.weight, create_graph=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_same_call_gives_the_same_bits(batch: Any, backend: str) -> None:
    inputs, teacher, labels = batch
    found = []
    for _ in range(2):
        model = Student(backend=backend, chunk_rows=3)
        loss = model(inputs, DenseTargets(teacher), labels).loss
        loss.backward()
        found.append([loss.detach(), *gradients(model)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_valid_rows_are_zero_and_not_nan(batch: Any, backend: str) -> None:
    inputs, teacher, _ = batch
    for rows in (0, N):
        model = Student(backend=backend)
        of_teacher = LinearTargets(torch.full((rows, 3), torch.nan), torch.randn(V, 3))
        for targets in (DenseTargets(teacher[:rows]), of_teacher):
            found = model(inputs[:rows], targets, torch.full((rows,), -100))
            assert [x.item() for x in found] == [0.0, 0.0, 0.0]
            found.loss.backward()
            assert all((g == 0).all() for g in gradients(model))


@pytest.mark.parametrize("kind", ["dense", "topk", "linear", "none"])
@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (torch.bfloat16, (True, True, True)),
        (torch.float32, (True, False, False)),
        (torch.float32, (False, False, False)),
    ],
)
def test_the_operator_is_what_it_declares(batch: Any, kind: str, dtype: torch.dtype, wanted: Any) -> None:
    inputs, teacher, labels = batch
    topk = topk_targets(teacher, 5, 2.0)
    absent = (None, None, None)
    dense, rows, of_teacher = {
        "dense": (teacher.to(dtype), absent, absent),
        "topk": (None, (topk.ids, topk.logprobs, topk.tail), absent),
        "linear": (None, absent, (torch.randn(N, 7), torch.randn(V, 7), None)),
        "none": (None, absent, absent),
    }[kind]
    arguments = (
        inputs.to(dtype),
        torch.randn(V, H).to(dtype),
        torch.randn(V).to(dtype),
        dense,
        *rows,
        *of_teacher,
        labels,
        1.0,
        None,
        2.0,
        2.0,
        0.3,
        0.0 if kind == "none" else 0.7,
        12.0,
        "forward",
        0.5,
        1.0,
        None,
        -100,
        5,
        "cpu",
        *wanted,
    )
    torch.library.opcheck(linear_autograd.linear_kd, arguments)


@pytest.mark.parametrize(("kind", "chunk_rows"), [("dense", None), ("topk", 4), ("linear", 4)])
def test_a_compiled_model_trains_like_an_eager_one(batch: Any, kind: str, chunk_rows: int | None) -> None:
    inputs, teacher, labels = batch
    given: Any = {
        "dense": DenseTargets(teacher),
        "topk": topk_targets(teacher, 5, 2.0),
        "linear": LinearTargets(torch.randn(N, 7), torch.randn(V, 7)),
    }[kind]
    torch._dynamo.reset()
    model, twin = Student(chunk_rows=chunk_rows), Student(chunk_rows=chunk_rows)
    compiled = torch.compile(twin, fullgraph=True)
    slow = torch.optim.SGD(model.parameters(), lr=0.5)
    fast = torch.optim.SGD(twin.parameters(), lr=0.5)
    for _ in range(3):
        expected, found = model(inputs, given, labels), compiled(inputs, given, labels)
        expected.loss.backward()
        found.loss.backward()
        assert torch.allclose(found.loss, expected.loss, atol=1e-5)
        assert torch.allclose(found.kd, expected.kd, atol=1e-5)
        for a, b in zip(gradients(twin), gradients(model), strict=True):
            assert torch.allclose(a, b, atol=1e-6)
        for optimizer in (slow, fast):
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        assert torch.allclose(compiled(inputs, given, labels).loss, model(inputs, given, labels).loss, atol=1e-5)


def test_under_autocast_operands_are_rounded_as_torch_rounds_them_and_logits_are_not(batch: Any) -> None:
    inputs, teacher, labels = batch
    hidden, weight = inputs.clone().requires_grad_(), torch.randn(V, H, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = linear_kd_loss(hidden, weight, DenseTargets(teacher), labels, **WEIGHTS)
    found.loss.backward()
    rounded = [t.detach().bfloat16().requires_grad_() for t in (hidden, weight)]
    expected = linear_kd_loss(rounded[0], rounded[1], DenseTargets(teacher), labels, **WEIGHTS)
    expected.loss.backward()
    assert torch.equal(found.loss, expected.loss)
    for leaf, twin in zip((hidden, weight), rounded, strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, twin.grad.float())
    exact = linear_kd_loss(
        rounded[0].detach().double(), rounded[1].detach().double(), DenseTargets(teacher), labels, **WEIGHTS
    )
    assert found.loss.item() == pytest.approx(exact.loss.item(), rel=1e-6)


@pytest.mark.parametrize("linear", [False, True])
def test_a_model_under_autocast_trains(batch: Any, linear: bool) -> None:
    inputs, teacher, labels = batch
    plain = Student(linear=False, backend="reference")
    plain(inputs, DenseTargets(teacher), labels).loss.backward()
    model = Student(linear=linear)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(inputs, DenseTargets(teacher), labels)
    found.loss.backward()
    assert found.loss.dtype == torch.float32
    for a, b in zip(gradients(model), gradients(plain), strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 2e-2


def test_the_module_holds_its_settings(batch: Any) -> None:
    inputs, teacher, labels = batch
    weight, bias = torch.randn(V, H), torch.randn(V)
    criterion = LinearKDCriterion(temperature=2.0, ce_weight=0.3, kd_weight=0.7, direction="reverse", soft_cap=20.0)
    more = WEIGHTS | {"direction": "reverse", "soft_cap": 20.0, "backend": "reference"}
    criterion.backend = "reference"
    direct = linear_kd_loss(inputs, weight, DenseTargets(teacher), labels, bias=bias, **more)
    found = criterion(inputs, weight, DenseTargets(teacher), labels, N, bias)
    assert all(torch.equal(a, b) for a, b in zip(found, direct, strict=True))


NAN = float("nan")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"ce_weight": -1.0}, "ce_weight = -1.0"),
        ({"denominator": NAN}, "denominator = nan"),
        ({"chunk_rows": 0}, "chunk_rows = 0"),
        ({"chunk_rows": True}, "chunk_rows = True"),
        ({"chunk_rows": 2.5}, "chunk_rows = 2.5"),
        ({"direction": "sideways"}, "'sideways'"),
        ({"backend": "triton"}, "'triton' has no linear_kd_loss"),
        ({"soft_cap": -3.0}, "soft_cap = -3.0"),
        ({"hidden": torch.randn(2, 6, H)}, r"hidden states have shape \(2, 6, 16\)"),
        ({"hidden": torch.randn(N, H).half()}, "hidden states are torch.float16"),
        ({"weight": torch.randn(V, H + 1)}, r"weight have shape \(101, 17\)"),
        ({"weight": torch.randn(0, H)}, r"weight has shape \(0, 16\)"),
        ({"bias": torch.randn(V - 1)}, r"bias have shape \(100,\)"),
        ({"labels": torch.full((N,), V)}, "label 101 at row 0"),
        ({"labels": torch.zeros(N, dtype=torch.int32)}, "labels are torch.int32"),
        ({"targets": None}, r"kd_weight = 0\.7"),
        ({"targets": LinearTargets(torch.randn(N, 3), torch.randn(V, 4))}, "teacher weight have shape"),
        ({"targets": LinearTargets(torch.randn(3), torch.randn(V, 4))}, "teacher hidden states have shape"),
        ({"targets": LinearTargets(torch.randn(N, 3), torch.randn(V, 3), logit_scale=0.0)}, "logit_scale = 0.0"),
        ({"targets": LinearTargets(torch.randn(N, 3), torch.randn(V, 3), torch.randn(3))}, "teacher bias have shape"),
        ({"targets": LinearTargets(torch.randn(N, 3), torch.randn(V, 3).double()), "backend": "cpu"}, "fp64"),
    ],
)
def test_what_makes_no_sense_is_named(batch: Any, change: dict[str, Any], said: str) -> None:
    inputs, teacher, labels = batch
    call: dict[str, Any] = {
        "hidden": inputs,
        "weight": torch.randn(V, H),
        "targets": DenseTargets(teacher),
        "labels": labels,
    }
    with pytest.raises(RefusedError, match=said):
        linear_kd_loss(**(call | WEIGHTS | change))


def test_a_criterion_refuses_what_the_call_would_refuse() -> None:
    good: dict[str, Any] = {"temperature": 1.0, "ce_weight": 0.3, "kd_weight": 0.7}
    for wrong in ({"chunk_rows": -1}, {"temperature": NAN}, {"ce_weight": -0.1}, {"direction": "up"}):
        with pytest.raises(RefusedError):
            LinearKDCriterion(**(good | wrong))
