"""How the loss behaves in a torch program: whose memory it takes, when it writes, and under torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from latentforge.errors import RefusedError
from latentforge.kernels import DenseTargets, KDCriterion, KDLoss, TopKTargets, kd_divergence, kd_loss
from latentforge.kernels import autograd as operators
from latentforge.kernels.targets import topk_targets

N, V, H = 12, 101, 16
WEIGHTS: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7, "denominator": float(N)}


class Head(nn.Module):
    """A last layer with the loss behind it, as a student has."""

    def __init__(self, backend: str = "auto") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.last = nn.Linear(H, V)
        self.backend = backend

    def forward(self, hidden: Tensor, targets: Any, labels: Tensor) -> KDLoss:
        return kd_loss(self.last(hidden), targets, labels, backend=self.backend, **WEIGHTS)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, V, (N,), generator=generator)
    return torch.randn(N, H, generator=generator), torch.randn(N, V, generator=generator) * 3, labels


def plain_loss(logits: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    kd = nn.functional.kl_div(
        (logits / 2.0).log_softmax(-1), (teacher / 2.0).log_softmax(-1), log_target=True, reduction="batchmean"
    )
    return 0.3 * nn.functional.cross_entropy(logits, labels) + 0.7 * 4.0 * kd


@pytest.mark.parametrize("backend", ["auto", "cpu", "reference"])
def test_a_model_gets_the_gradient_that_plain_torch_gives_it(batch: Any, backend: str) -> None:
    hidden, teacher, labels = batch
    model = Head(backend)
    plain = plain_loss(model.last(hidden), teacher, labels)
    plain.backward()
    expected = model.last.weight.grad.clone()
    for factor in (1.0, 3.0):
        model.zero_grad()
        found = model(hidden, DenseTargets(teacher), labels)
        (found.loss * factor).backward()
        assert torch.allclose(model.last.weight.grad / factor, expected, atol=1e-6)
        assert found.loss.item() == pytest.approx(plain.item(), abs=1e-5)
        assert 0.3 * found.ce.item() + 0.7 * found.kd.item() == pytest.approx(plain.item(), abs=1e-5)
    assert not found.ce.requires_grad
    assert not found.kd.requires_grad


def test_the_gradient_lies_over_the_logits_and_the_teacher_is_untouched(batch: Any) -> None:
    hidden, teacher, labels = batch
    kept = teacher.clone()
    logits = Head().last(hidden)
    before = logits.detach().clone()
    kd_loss(logits, DenseTargets(teacher), labels, **WEIGHTS)
    expected = before.clone().requires_grad_()
    plain_loss(expected, teacher, labels).backward()
    assert torch.allclose(logits.detach(), expected.grad, atol=1e-6)
    assert torch.equal(teacher, kept)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_call_without_grad_never_writes(batch: Any, backend: str) -> None:
    hidden, teacher, labels = batch
    model = Head()
    with torch.no_grad():
        quiet = model.last(hidden)
    for logits in (quiet, model.last(hidden).detach()):
        kept = logits.clone()
        for targets in (DenseTargets(teacher), topk_targets(teacher, 5, 2.0)):
            value = kd_loss(logits, targets, labels, backend=backend, **WEIGHTS)
            kd_divergence(logits, targets, 2.0, backend=backend)
            assert torch.equal(logits, kept)
            assert not value.loss.requires_grad
    attached = model.last(hidden)
    kept = attached.detach().clone()
    with torch.no_grad():
        kd_loss(attached, DenseTargets(teacher), labels, backend=backend, **WEIGHTS)
    kd_divergence(attached, DenseTargets(teacher), 2.0, backend=backend)
    assert torch.equal(attached.detach(), kept)


def test_a_second_backward_is_refused(batch: Any) -> None:
    hidden, teacher, labels = batch
    for retain in (True, False):
        loss = Head()(hidden, DenseTargets(teacher), labels).loss
        loss.backward(retain_graph=retain)
        with pytest.raises(RefusedError, match="second backward"):
            loss.backward()


def test_a_gradient_of_the_gradient_is_refused(batch: Any) -> None:
    hidden, teacher, labels = batch
    model = Head()
    loss = model(hidden, DenseTargets(teacher), labels).loss
    with pytest.raises(RefusedError, match="create_graph=True"):
        torch.autograd.grad(loss, model.last.weight, create_graph=True)


def test_logits_that_belong_to_somebody_else_are_refused_and_left_as_they_are(batch: Any) -> None:
    hidden, teacher, labels = batch
    model = Head()
    leaf = torch.randn(N, V, requires_grad=True)
    cube = model.last(hidden.view(3, 4, H))
    whole = model.last(hidden)
    larger = torch.cat([model.last(hidden), model.last(hidden)])
    for logits, reason in (
        (leaf, "leaf"),
        (cube.view(N, V), "view of a tensor of shape"),
        (whole[:], "view"),
        (larger[:N], "view"),
    ):
        kept = logits.detach().clone()
        with pytest.raises(RefusedError, match=reason) as refusal:
            kd_loss(logits, DenseTargets(teacher), labels, **WEIGHTS)
        assert "fresh contiguous" in str(refusal.value.next)
        assert torch.equal(logits.detach(), kept)


def test_logits_that_another_operator_saved_are_refused_by_autograd(batch: Any) -> None:
    hidden, teacher, labels = batch
    logits = Head().last(hidden)
    entropy = logits.softmax(-1).mean()  # saves its own result only
    soft_capped = torch.tanh(logits)  # saves its result, which then is the logits
    loss = kd_loss(soft_capped, DenseTargets(teacher), labels, **WEIGHTS).loss
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (loss + entropy).backward()


def test_changing_the_gradient_between_forward_and_backward_is_refused(batch: Any) -> None:
    hidden, teacher, labels = batch
    logits = Head().last(hidden)
    loss = kd_loss(logits, DenseTargets(teacher), labels, **WEIGHTS).loss
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("kind", ["dense", "topk", "none"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_operators_are_what_they_declare(batch: Any, kind: str, dtype: torch.dtype) -> None:
    _, teacher, labels = batch
    logits = torch.randn(N, V).to(dtype)
    topk = topk_targets(teacher, 5, 2.0)
    dense, rows = {
        "dense": (teacher.to(dtype), (None, None, None)),
        "topk": (None, (topk.ids, topk.logprobs, topk.tail)),
        "none": (None, (None, None, None)),
    }[kind]
    kd_weight = 0.0 if kind == "none" else 0.7
    arguments = (
        logits,
        dense,
        *rows,
        labels,
        None,
        2.0,
        2.0,
        0.3,
        kd_weight,
        12.0,
        "forward",
        0.5,
        1.0,
        None,
        -100,
        "cpu",
    )
    torch.library.opcheck(operators.kd_gradient_, arguments)
    torch.library.opcheck(operators.kd_parts, arguments)
    torch.library.opcheck(operators.kd_scale_, (logits, torch.tensor(2.0)))


def test_a_compiled_model_trains_like_an_eager_one(batch: Any) -> None:
    hidden, teacher, labels = batch
    targets = topk_targets(teacher, 5, 2.0)
    for given in (DenseTargets(teacher), targets):
        model, twin = Head(), Head()
        compiled = torch.compile(twin, fullgraph=True)
        slow = torch.optim.SGD(model.parameters(), lr=0.5)
        fast = torch.optim.SGD(twin.parameters(), lr=0.5)
        for _ in range(3):
            expected, found = model(hidden, given, labels), compiled(hidden, given, labels)
            expected.loss.backward()
            found.loss.backward()
            assert torch.allclose(found.loss, expected.loss, atol=1e-5)
            assert torch.allclose(found.kd, expected.kd, atol=1e-5)
            assert torch.allclose(twin.last.weight.grad, model.last.weight.grad, atol=1e-6)
            slow.step()
            fast.step()
            slow.zero_grad()
            fast.zero_grad()
        with torch.no_grad():
            assert torch.allclose(compiled(hidden, given, labels).loss, model(hidden, given, labels).loss, atol=1e-5)


def test_a_compiled_call_leaves_the_teacher_and_the_hidden_states_alone(batch: Any) -> None:
    hidden, teacher, labels = batch
    kept = hidden.clone(), teacher.clone()
    torch.compile(Head(), fullgraph=True)(hidden, DenseTargets(teacher), labels).loss.backward()
    assert torch.equal(hidden, kept[0])
    assert torch.equal(teacher, kept[1])


def test_accumulating_over_micro_batches_with_the_global_denominator_is_one_batch(batch: Any) -> None:
    hidden, teacher, labels = batch
    labels = labels.clone()
    labels[:5] = -100
    settings = WEIGHTS | {"denominator": 7.0}
    whole, parts = Head(), Head()
    kd_loss(whole.last(hidden), DenseTargets(teacher), labels, **settings).loss.backward()
    for rows in (slice(0, 5), slice(5, 6), slice(6, 12)):
        loss = kd_loss(parts.last(hidden[rows]), DenseTargets(teacher[rows]), labels[rows], **settings).loss
        loss.backward()
    assert torch.allclose(whole.last.weight.grad, parts.last.weight.grad, atol=1e-6)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_no_rows_and_no_valid_rows_are_zero_and_not_nan(batch: Any, backend: str) -> None:
    hidden, teacher, _ = batch
    model = Head(backend)
    for rows in (0, N):
        model.zero_grad()
        ignored = torch.full((rows,), -100)
        for targets in (DenseTargets(teacher[:rows]), topk_targets(teacher, 4, 2.0)):
            if isinstance(targets, TopKTargets):
                targets = TopKTargets(targets.ids[:rows], targets.logprobs[:rows], targets.tail[:rows])
            found = model(hidden[:rows], targets, ignored)
            assert [x.item() for x in found] == [0.0, 0.0, 0.0]
            found.loss.backward()
            assert (model.last.weight.grad == 0).all()
            assert kd_divergence(torch.randn(rows, V), targets, 2.0, backend=backend).shape == (rows,)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_without_targets_there_is_only_the_cross_entropy_and_kd_is_not_a_number(batch: Any, backend: str) -> None:
    hidden, _, labels = batch
    model = Head()
    settings = WEIGHTS | {"ce_weight": 1.0, "kd_weight": 0.0, "backend": backend}
    found = kd_loss(model.last(hidden), None, labels, **settings)
    found.loss.backward()
    gradient = model.last.weight.grad.clone()
    model.zero_grad()
    plain = nn.functional.cross_entropy(model.last(hidden), labels)
    plain.backward()
    assert torch.allclose(gradient, model.last.weight.grad, atol=1e-7)
    assert found.loss.item() == pytest.approx(plain.item(), abs=1e-6)
    assert found.kd.isnan()


def test_the_module_holds_its_settings(batch: Any) -> None:
    hidden, teacher, labels = batch
    criterion = KDCriterion(temperature=2.0, ce_weight=0.3, kd_weight=0.7)
    logits = Head().last(hidden).detach()
    direct = kd_loss(logits, DenseTargets(teacher), labels, **WEIGHTS)
    assert all(
        torch.equal(a, b) for a, b in zip(criterion(logits, DenseTargets(teacher), labels, N), direct, strict=True)
    )


def test_fp64_goes_to_the_definition_by_itself(batch: Any) -> None:
    hidden, teacher, labels = batch
    logits = Head().last(hidden).detach().double()
    found = kd_loss(logits, DenseTargets(teacher.double()), labels, **WEIGHTS)
    assert found.loss.dtype == torch.float64
    assert found.loss.item() == pytest.approx(plain_loss(logits, teacher.double(), labels).item(), abs=1e-12)


def largest_allocation(backend: str) -> int:
    from torch.profiler import ProfilerActivity, profile

    rows, vocab = 64, 20000
    hidden = torch.randn(rows, 8)
    weight = torch.randn(vocab, 8, requires_grad=True)
    teacher = torch.randn(rows, vocab).bfloat16()
    labels = torch.zeros(rows, dtype=torch.int64)
    logits = (hidden @ weight.T).bfloat16()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        loss = kd_loss(logits, DenseTargets(teacher), labels, backend=backend, **WEIGHTS).loss
        torch.autograd.grad(loss, logits)
    return max(event.cpu_memory_usage for event in recorded.events())


def test_the_cpu_kernel_allocates_nothing_of_the_logits_size() -> None:
    assert largest_allocation("cpu") < 64 * 64
    # The measurement sees such allocations where they are made.
    assert largest_allocation("reference") >= 64 * 20000 * 2
