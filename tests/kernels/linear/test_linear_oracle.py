"""linear_kd_loss against an oracle that shares no line with it: logits in fp64, and torch's autograd behind them.

Everything that a call can vary is drawn: targets, directions, paddings of either vocabulary, masks, dtypes, places in
memory, chunks, frozen arguments, autocast. The bounds are those of the rounding of the operands' own precision.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentforge.kernels import DenseTargets, KDLoss, LinearTargets, TopKTargets, linear_kd_loss
from latentforge.kernels.linear_products import Upcast, products_for

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
INF = float("inf")
WEIGHTS = [(0.3, 0.7), (0.0, 1.0), (1.0, 0.0), (0.5, 3.0)]
PLACES = ("plain", "transposed", "gaps", "misaligned", "every other column")


@dataclass(frozen=True)
class Call:
    """One call; ``tensors`` makes what is passed."""

    rows: int
    vocab: int
    width: int
    kind: str
    direction: str
    seed: int = 0
    k: int = 1
    dtypes: tuple[torch.dtype, torch.dtype, torch.dtype] = (FP32, FP32, FP32)  # hidden, weight, the teacher's
    place: str = "plain"
    bias: bool = False
    padding: tuple[int, int] = (0, 0)  # the student's last columns, the teacher's
    scale: float = 1.0
    cap: float | None = None
    teacher_scale: float = 1.0
    teacher_cap: float | None = None
    temperature: float = 2.0
    teacher_temperature: float | None = None
    weights: tuple[float, float] = (0.3, 0.7)
    beta: float = 0.5
    masked: float = 0.2
    ignore_index: int = -100
    chunk_rows: int | None = None
    wanted: tuple[bool, bool, bool] = (True, True, True)
    autocast: bool = False
    backend: str = "auto"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Any, Tensor]:
        """hidden, weight, bias, targets, labels; the ignored rows hold NaN."""
        generator = torch.Generator().manual_seed(self.seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        n, v = self.rows, self.vocab
        ours, theirs = v - self.padding[0], v - self.padding[1]
        labels = torch.randint(0, ours, (n,), generator=generator)
        labels[torch.rand(n, generator=generator) < self.masked] = self.ignore_index
        ignored = labels == self.ignore_index

        def rows(t: Tensor) -> Tensor:
            return t.masked_fill(ignored.view(-1, *[1] * (t.dim() - 1)), torch.nan)

        hidden, weight = rows(random(n, self.width)).to(self.dtypes[0]), random(v, self.width).to(self.dtypes[1])
        bias = random(v).to(self.dtypes[1]) if self.bias or self.padding[0] else None
        if bias is not None:
            bias[ours:] = -INF
        logits = random(n, v) * 2
        logits[:, theirs:] = -INF
        targets: Any = None
        if self.kind == "dense":
            targets = DenseTargets(placed(rows(logits).to(self.dtypes[2]), self.place))
        elif self.kind == "linear":
            of_teacher = random(v).to(self.dtypes[2])
            of_teacher[theirs:] = -INF
            targets = LinearTargets(
                placed(rows(random(n, 5)).to(self.dtypes[2]), self.place),
                placed(random(v, 5).to(self.dtypes[2]), self.place),
                of_teacher if self.padding[1] or self.bias else None,
                self.teacher_scale,
                self.teacher_cap,
            )
        elif self.kind == "topk":
            known = logits.double().log_softmax(-1)
            values, ids = known.topk(self.k, -1)
            rest = known.scatter(-1, ids, -INF) / (self.teacher_temperature or self.temperature)
            tail = rest.exp().sum(-1).log()
            targets = TopKTargets(ids, rows(values.float()), rows(tail.float()))
        both = torch.stack([labels, labels + 1], 1)[:, 0] if self.place != "plain" else labels
        return placed(hidden, self.place), placed(weight, self.place), bias, targets, both

    def arguments(self, labels: Tensor) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "teacher_temperature": self.teacher_temperature,
            "ce_weight": self.weights[0],
            "kd_weight": self.weights[1],
            "direction": self.direction,
            "beta": self.beta,
            "denominator": max(1.0, float((labels != self.ignore_index).sum())),
            "logit_scale": self.scale,
            "soft_cap": self.cap,
            "ignore_index": self.ignore_index,
        }


def placed(t: Tensor, place: str) -> Tensor:
    """The same matrix elsewhere in memory, among NaN."""
    if place == "transposed":
        return t.T.contiguous().T
    if place == "gaps":
        return torch.nn.functional.pad(t, (2, 3), value=torch.nan)[:, 2 : 2 + t.shape[1]]
    if place == "misaligned":
        memory = torch.full((t.numel() + 1,), torch.nan, dtype=t.dtype)
        memory[1:] = t.flatten()
        return memory[1:].view(t.shape)
    if place == "every other column":
        return torch.stack([t, torch.full_like(t, torch.nan)], 2).flatten(1)[:, ::2]
    return t


def oracle(call: Call, leaves: list[Any], targets: Any, labels: Tensor) -> tuple[list[Tensor], list[Tensor | None]]:
    """loss, ce, kd and the gradients in fp64, from logits over the columns that are no padding."""
    hidden, weight, bias = (
        None if leaf is None else (leaf.detach().to(BF16) if call.autocast else leaf.detach()).double().requires_grad_()
        for leaf in leaves
    )
    assert hidden is not None
    assert weight is not None
    t, t_teacher = call.temperature, call.teacher_temperature or call.temperature
    counts = labels != call.ignore_index
    ours = call.vocab - call.padding[0]
    s = hidden[counts] @ weight[:ours].T
    s = shaped(s if bias is None else s + bias[:ours], call.scale, call.cap)
    labels = labels[counts]
    ce = (s.logsumexp(-1) - s.gather(-1, labels[:, None]).squeeze(-1)).sum()
    q = torch.nn.functional.pad((s / t).softmax(-1), (0, call.padding[0]))
    kd = ce * 0
    if isinstance(targets, TopKTargets):
        ids = targets.ids[counts]
        p = torch.cat([targets.logprobs[counts].double() / t_teacher, targets.tail[counts].double()[:, None]], -1)
        outside = torch.ones_like(q).scatter(-1, ids, 0.0)
        kd = divergence(p.softmax(-1), torch.cat([q.gather(-1, ids), (q * outside).sum(-1, keepdim=True)], -1), call)
    elif isinstance(targets, LinearTargets):
        x = targets.hidden[counts].double() @ targets.weight.double().T
        x = shaped(x if targets.bias is None else x + targets.bias.double(), call.teacher_scale, call.teacher_cap)
        x[:, call.vocab - call.padding[1] :] = -INF
        kd = divergence((x / t_teacher).softmax(-1), q, call)
    elif isinstance(targets, DenseTargets):
        kd = divergence((targets.logits[counts].double() / t_teacher).softmax(-1), q, call)
    denominator = call.arguments(labels)["denominator"]
    ce, kd = ce / denominator, kd * t**2 / denominator
    loss = call.weights[0] * ce + call.weights[1] * kd
    loss.backward()
    return [loss, ce, kd], [None if leaf is None else leaf.grad for leaf in (hidden, weight, bias)]


def shaped(x: Tensor, scale: float, cap: float | None) -> Tensor:
    return x * scale if cap is None else cap * torch.tanh(x * scale / cap)


def divergence(p: Tensor, q: Tensor, call: Call) -> Tensor:
    def cost(a: Tensor, b: Tensor) -> Tensor:
        there = a > 0
        a, b = torch.where(there, a, 1.0), torch.where(there, b, 1.0)
        return (a * (a / b).log()).sum()

    if call.direction == "forward":
        return cost(p, q)
    if call.direction == "reverse":
        return cost(q, p)
    m = call.beta * p + (1 - call.beta) * q
    return call.beta * cost(p, m) + (1 - call.beta) * cost(q, m)


def run(call: Call, function: Any = linear_kd_loss) -> None:
    """Both, and the bounds: of a value its own fp32, of a gradient its storage and the fp32 of its sums."""
    hidden, weight, bias, targets, labels = call.tensors()
    wanted = [*call.wanted[:2], call.wanted[2] and bias is not None]
    leaves = [None if t is None else t.detach() for t in (hidden, weight, bias)]
    for leaf, asked in zip(leaves, wanted, strict=True):
        if leaf is not None:
            leaf.requires_grad_(asked)
    before = [None if t is None else t.detach().clone() for t in (*leaves, labels)]
    values, gradients = oracle(call, leaves, targets, labels)
    with torch.autocast("cpu", dtype=BF16) if call.autocast else contextlib.nullcontext():
        found: KDLoss = function(
            *leaves[:2],
            targets,
            labels,
            bias=leaves[2],
            chunk_rows=call.chunk_rows,
            backend=call.backend,
            **call.arguments(labels),
        )
    for name, got, exact in zip(("loss", "ce", "kd"), found, values, strict=True):
        if name == "kd" and targets is None:
            assert got.isnan()
            continue
        assert abs(float(got) - float(exact)) <= 2e-5 * (1 + abs(float(exact))), (name, float(got), float(exact))
    assert found.loss.requires_grad == any(wanted)
    if any(wanted):
        found.loss.backward()
    kept, weight = hidden[labels != call.ignore_index].detach().double(), weight.detach().double()
    steep = 4.0 if call.direction == "forward" else 4.0 * (1 + float(max(abs(values[2].detach()), 1.0)) + 20.0)
    per_logit = (call.weights[0] + steep * call.weights[1] * call.temperature) * max(1.0, call.scale)
    per_logit /= call.arguments(labels)["denominator"]
    reach = (weight.abs().sum(0), kept.abs().sum(0), torch.full((), float(len(kept)), dtype=FP64))
    fine = 2e-6 if isinstance(products_for(*(t.detach() for t in leaves[:2] if t is not None)), Upcast) else 2**-8
    for which, (leaf, exact, size) in enumerate(zip(leaves, gradients, reach, strict=True)):
        if leaf is None or not wanted[which]:
            assert leaf is None or leaf.grad is None
            continue
        assert leaf.grad is not None
        assert exact is not None
        assert leaf.grad.dtype == leaf.dtype
        rounding = 2**-8 if leaf.dtype == BF16 or call.autocast else 2**-20
        off = (leaf.grad.double() - exact).abs()
        bound = rounding * exact.abs() + fine * per_logit * size.expand_as(exact)
        assert (off <= bound).all(), (("hidden", "weight", "bias")[which], float(off.max()), float((off - bound).max()))
    for now, then in zip((*leaves, labels), before, strict=True):
        assert now is then or torch.equal(now.detach().double().nan_to_num(1e300), then.double().nan_to_num(1e300))


@st.composite
def calls(draw: st.DrawFn) -> Call:
    kind = draw(st.sampled_from(["dense", "topk", "linear", "none"]))
    direction = draw(st.sampled_from(["forward", "reverse", "jsd"]))
    rows, vocab = draw(st.integers(0, 20)), draw(st.integers(1, 70) | st.sampled_from([255, 1100, 2100]))
    # What one side excludes and the other does not makes an infinite loss; another module looks at those.
    few, more = sorted((draw(st.integers(0, min(5, vocab - 1))), draw(st.integers(0, min(5, vocab - 1)))))
    padding = (more, few) if direction == "reverse" else (few, more)
    padding = (more, few) if direction == "jsd" and draw(st.booleans()) else padding
    dtype = st.sampled_from([BF16, FP32])
    same = draw(dtype)
    return Call(
        rows,
        vocab,
        draw(st.integers(1, 12)),
        kind,
        direction,
        draw(st.integers(0, 2**32)),
        k=draw(st.sampled_from([1, vocab, min(vocab, 7), max(1, vocab - 1)])),
        dtypes=draw(st.sampled_from([(same, same, same)]) | st.tuples(dtype, dtype, dtype)),
        place=draw(st.sampled_from(PLACES)),
        bias=draw(st.booleans()),
        padding=padding,
        scale=draw(st.sampled_from([1.0, 0.6, 1.7])),
        cap=draw(st.sampled_from([None, 6.0])),
        teacher_scale=draw(st.sampled_from([1.0, 0.6])),
        teacher_cap=draw(st.sampled_from([None, 6.0])),
        temperature=draw(st.sampled_from([2.0, 1.0, 0.7, 3.0])),
        teacher_temperature=draw(st.sampled_from([None, 1.5, 1.0])),
        weights=(1.0, 0.0)
        if kind == "none"
        else draw(st.sampled_from([(0.3, 0.7), (0.0, 1.0), (1.0, 0.0), (0.5, 3.0)])),
        beta=draw(st.sampled_from([0.5, 0.1, 0.9])),
        masked=draw(st.sampled_from([0.0, 0.3, 1.0])),
        ignore_index=draw(st.sampled_from([-100, -1, 0, 2**40])),
        chunk_rows=draw(st.none() | st.integers(1, rows + 2)),
        wanted=draw(st.tuples(st.booleans(), st.booleans(), st.booleans())),
        autocast=draw(st.sampled_from([False, False, False, True])),
        backend=draw(st.sampled_from(["auto", "auto", "reference"])),
    )


@settings(max_examples=400, suppress_health_check=[HealthCheck.too_slow])
@given(call=calls())
def test_any_call_is_what_autograd_finds_over_logits_in_fp64(call: Call) -> None:
    run(call)


@pytest.mark.soak
@settings(max_examples=20000, suppress_health_check=list(HealthCheck))
@given(call=calls())
def test_any_of_very_many_calls_is_what_autograd_finds(call: Call) -> None:
    run(call)


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("kind", ["dense", "linear"])
@pytest.mark.parametrize("chunk_rows", [None, 4])
def test_rows_further_apart_and_odd_addresses_change_no_more_than_the_order_of_a_sum(
    chunk_rows: int | None, kind: str, dtype: torch.dtype
) -> None:
    def bits(place: str) -> list[Tensor]:
        call = Call(17, 257, 31, kind, "forward", dtypes=(dtype, dtype, dtype), place=place)
        hidden, weight, _, targets, labels = call.tensors()
        leaves = [t.detach().requires_grad_() for t in (hidden, weight)]
        found = linear_kd_loss(*leaves, targets, labels, chunk_rows=chunk_rows, **call.arguments(labels))
        found.loss.backward()
        return [*(x.detach() for x in found), *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    # The products are the vendor's: MKL adds in another order at another address on an AMD EPYC with AVX2 (two of these
    # five tensors), and in the same one on an Intel Xeon with AVX-512.
    wanted = bits("plain")
    for place in ("gaps", "misaligned"):
        for found, plain in zip(bits(place), wanted, strict=True):
            last = 2.0**-7 if plain.dtype == BF16 else 4e-7
            assert float((found - plain).abs().max()) <= last * float(plain.abs().max()), place


COMPILED = Call(11, 37, 6, "topk", "forward", 3, k=5, chunk_rows=4)


@pytest.mark.parametrize(
    "call",
    [
        COMPILED,
        replace(COMPILED, kind="linear", direction="reverse", bias=True, padding=(3, 1), place="transposed"),
        replace(COMPILED, kind="dense", dtypes=(BF16, BF16, BF16), wanted=(True, False, False), cap=6.0),
        replace(COMPILED, rows=0, autocast=True),
    ],
)
def test_a_compiled_call_is_what_autograd_finds(call: Call) -> None:
    torch._dynamo.reset()
    run(call, torch.compile(linear_kd_loss, fullgraph=True, backend="aot_eager"))


def test_a_gradient_that_is_off_would_be_seen() -> None:
    for change in ({"temperature": 2.001}, {"kd_weight": 0.7007}, {"ignore_index": 1}, {"soft_cap": 5.99}):

        def wrong(*arguments: Any, change: dict[str, Any] = change, **named: Any) -> KDLoss:
            return linear_kd_loss(*arguments, **(named | change))

        with pytest.raises(AssertionError):
            run(replace(COMPILED, cap=6.0, masked=0.0, rows=40), wrong)
