"""Loss and gradients of linear_kd_loss are those of the mathematics, on every path that a call can take."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from latentforge.kernels import DenseTargets, LinearTargets, TopKTargets, linear_kd_loss, linear_sweeps
from latentforge.kernels.linear_products import Split, Upcast
from latentforge.kernels.settings import KDSettings
from latentforge.kernels.targets import topk_targets

KINDS = ("linear", "dense", "topk", "none")
DIRECTIONS = ("forward", "reverse", "jsd")


class Case:
    """Random tensors of one call, ignored rows full of NaN included, and its settings."""

    def __init__(
        self,
        kind: str = "topk",
        direction: str = "forward",
        *,
        shaped: bool = False,
        dtype: torch.dtype = torch.float32,
        rows: int = 37,
        vocab: int = 211,
        width: int = 8,
        ignored: int = 5,
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.hidden = random(rows, width).to(dtype)
        self.weight = (random(vocab, width) * 0.5).to(dtype)
        self.bias = random(vocab).to(dtype) if shaped else None
        self.labels = torch.randint(0, vocab, (rows,), generator=generator)
        if ignored:
            self.labels[::ignored] = -100
            self.hidden[::ignored] = torch.nan
        teacher = LinearTargets(
            random(rows, width + 3).to(dtype),
            (random(vocab, width + 3) * 0.4).to(dtype),
            random(vocab).to(dtype) if shaped else None,
            1.3 if shaped else 1.0,
            11.0 if shaped else None,
        )
        logits = teacher.hidden.double() @ teacher.weight.double().T
        self.targets: Any = {
            "linear": teacher,
            "dense": DenseTargets(logits.to(dtype)),
            "topk": topk_targets(logits, min(7, vocab), 1.5),
            "none": None,
        }[kind]
        self.settings: dict[str, Any] = {
            "temperature": 2.0,
            "teacher_temperature": 1.5,
            "ce_weight": 0.3 if kind != "none" else 1.0,
            "kd_weight": 0.7 if kind != "none" else 0.0,
            "direction": direction,
            "beta": 0.3,
            "denominator": max(1.0, float((self.labels != -100).sum())),
            "logit_scale": 0.7 if shaped else 1.0,
            "soft_cap": 9.0 if shaped else None,
        }

    def run(self, dtype: torch.dtype | None = None, **more: Any) -> list[Tensor]:
        """loss, ce, kd, d_hidden, d_weight and d_bias where there is one, of ``linear_kd_loss``."""
        leaves = self.leaves(dtype or self.hidden.dtype)
        hidden, weight, bias = leaves
        found = linear_kd_loss(hidden, weight, self.targets, self.labels, bias=bias, **(self.settings | more))
        found.loss.backward()
        return [*(x.detach() for x in found), *(leaf.grad for leaf in leaves if leaf is not None)]

    def leaves(self, dtype: torch.dtype) -> list[Any]:
        tensors = (self.hidden, self.weight, self.bias)
        return [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in tensors]

    def plain(self) -> list[Tensor]:
        """The same in fp64 by torch's own operators and autograd, without a line of ours."""
        leaves = self.leaves(torch.float64)
        hidden, weight, bias = leaves
        counts = self.labels != -100
        s = hidden[counts] @ weight.T
        s = _shaped(s, bias, self.settings["logit_scale"], self.settings["soft_cap"])
        ce = F.cross_entropy(s, self.labels[counts], reduction="sum")
        kd = self._divergence((s / self.settings["temperature"]).softmax(-1), counts) if self.targets else ce * 0
        kd = kd * self.settings["temperature"] ** 2
        loss = self.settings["ce_weight"] * ce + self.settings["kd_weight"] * kd
        (loss / self.settings["denominator"]).backward()
        values = [x.detach() / self.settings["denominator"] for x in (loss, ce, kd)]
        return [*values, *(leaf.grad for leaf in leaves if leaf is not None)]

    def _divergence(self, q: Tensor, counts: Tensor) -> Tensor:
        t = self.settings["teacher_temperature"]
        if isinstance(self.targets, TopKTargets):
            ids = self.targets.ids[counts]
            entries = (self.targets.logprobs[counts].double() / t).exp()
            p = torch.cat([entries, self.targets.tail[counts].double().exp()[:, None]], -1)
            p = p / p.sum(-1, keepdim=True)
            inside = torch.zeros_like(q).scatter(-1, ids, 1.0)
            q = torch.cat([q.gather(-1, ids), (q * (1 - inside)).sum(-1, keepdim=True)], -1)
        elif isinstance(self.targets, LinearTargets):
            x = self.targets.hidden[counts].double() @ self.targets.weight.double().T
            bias = None if self.targets.bias is None else self.targets.bias.double()
            p = (_shaped(x, bias, self.targets.logit_scale, self.targets.soft_cap) / t).softmax(-1)
        else:
            p = (self.targets.logits[counts].double() / t).softmax(-1)
        if self.settings["direction"] == "forward":
            return (p * (p.log() - q.log())).sum()
        if self.settings["direction"] == "reverse":
            return (q * (q.log() - p.log())).sum()
        beta = self.settings["beta"]
        m = beta * p + (1 - beta) * q
        return beta * (p * (p / m).log()).sum() + (1 - beta) * (q * (q / m).log()).sum()


def _shaped(x: Tensor, bias: Tensor | None, scale: float, cap: float | None) -> Tensor:
    s = (x if bias is None else x + bias) * scale
    return s if cap is None else cap * torch.tanh(s / cap)


def furthest(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest relative error, a tensor's norm as the measure. What both call NaN is left out."""
    errors = [0.0]
    for a, b in zip(found, exact, strict=True):
        if not b.isnan().all():
            errors.append(float((a.double() - b).norm() / b.norm().clamp_min(1e-12)))
            assert not a.isnan().any()
    return max(errors)


@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_definition_is_what_autograd_finds_in_fp64(kind: str, direction: str, shaped: bool) -> None:
    case = Case(kind, direction, shaped=shaped, dtype=torch.float64, rows=70)
    # The top-k targets themselves are fp32.
    found, exact = case.run(), case.plain()
    if kind == "none":
        assert found.pop(2).isnan()
        exact.pop(2)
    assert furthest(found, exact) < (1e-7 if kind == "topk" else 1e-12)


# Between them the kinds of targets meet every plan: one chunk, sums kept over several, two sweeps, a row at a time.
CHUNKS = (1000, 40, 20, 1)


@pytest.mark.parametrize("chunk_rows", CHUNKS)
@pytest.mark.parametrize("shaped", [False, True])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("products", [Upcast, Split])
def test_every_path_of_the_cpu_backend_is_the_definition(
    kind: str, direction: str, shaped: bool, chunk_rows: int, products: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear_sweeps, "products_for", lambda hidden, weight: products())
    dtype = torch.float32 if products is Upcast else torch.bfloat16
    case = Case(kind, direction, shaped=shaped, dtype=dtype)
    exact = case.run(torch.float64, backend="reference")
    found = case.run(backend="cpu", chunk_rows=chunk_rows)
    assert furthest(found, exact) < (1e-5 if dtype == torch.float32 else 6e-3)


@pytest.mark.parametrize(
    ("kind", "plans"),
    [
        ("topk", ["one chunk", "one chunk", "sums kept", "two sweeps"]),
        ("dense", ["one chunk", "sums kept", "two sweeps", "two sweeps"]),
        ("linear", ["one chunk", "sums kept", "two sweeps", "two sweeps"]),
    ],
)
def test_these_chunks_meet_every_plan(kind: str, plans: list[str]) -> None:
    case = Case(kind)
    rule = KDSettings(2.0, 2.0)
    problem = linear_sweeps.without_ignored_rows(case.hidden, case.weight, None, case.targets, case.labels, rule)
    made = [linear_sweeps.Plan.of(problem, chunk_rows, True) for chunk_rows in CHUNKS]
    assert ["sums kept" if p.keep_sums else "two sweeps" if p.again else "one chunk" for p in made] == plans
    assert not any(linear_sweeps.Plan.of(problem, 1, False).again for _ in plans)


@settings(max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    direction=st.sampled_from(DIRECTIONS),
    shaped=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    rows=st.integers(0, 40),
    vocab=st.integers(2, 300),
    width=st.integers(1, 24),
    ignored=st.sampled_from([0, 1, 2, 7]),
    chunk_rows=st.integers(1, 64),
    seed=st.integers(0, 2**31),
)
def test_any_shape_mask_and_chunk_is_the_definition(
    kind: str,
    direction: str,
    shaped: bool,
    dtype: torch.dtype,
    rows: int,
    vocab: int,
    width: int,
    ignored: int,
    chunk_rows: int,
    seed: int,
) -> None:
    case = Case(
        kind,
        direction,
        shaped=shaped,
        dtype=dtype,
        rows=rows,
        vocab=vocab,
        width=width,
        ignored=ignored,
        seed=seed,
    )
    exact = case.run(torch.float64, backend="reference")
    found = case.run(backend="cpu", chunk_rows=chunk_rows)
    assert furthest(found, exact) < (1e-4 if dtype == torch.float32 else 2e-2)
