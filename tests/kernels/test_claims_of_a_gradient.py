"""A result requires grad exactly where a backward through it gives every leaf that asked its gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels import DenseTargets, LinearTargets, TopKTargets, kd_loss, latent_decode, linear_kd_loss
from latentforge.kernels.targets import topk_targets

N, V, H = 3, 11, 4
LOSS: dict[str, Any] = {"temperature": 2.0, "ce_weight": 0.3, "kd_weight": 0.7, "denominator": 3.0}
LABELS = torch.arange(N)
KINDS = ("dense", "topk", "linear")


def random(*shape: int, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_(grad)


def teacher(kind: str, grad: bool) -> Any:
    if kind == "topk":
        found = topk_targets(random(N, V), 3, 2.0)
        return TopKTargets(found.ids, found.logprobs.requires_grad_(grad), found.tail.requires_grad_(grad))
    if kind == "linear":
        return LinearTargets(random(N, H, grad=grad), random(V, H, grad=grad), random(V, grad=grad))
    return DenseTargets(random(N, V, grad=grad))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_linear_kd_loss_claims_what_hidden_weight_and_bias_ask_for(kind: str, backend: str) -> None:
    for of_teacher, *asked in itertools.product((False, True), repeat=4):
        leaves = [random(N, H, grad=asked[0]), random(V, H, grad=asked[1]), random(V, grad=asked[2])]
        hidden, weight, bias = leaves
        found = linear_kd_loss(hidden, weight, teacher(kind, of_teacher), LABELS, bias=bias, backend=backend, **LOSS)
        assert [part.requires_grad for part in found] == [any(asked), False, False]
        if any(asked):
            found.loss.backward()
        assert [leaf.grad is not None for leaf in leaves] == asked


@pytest.mark.parametrize("kind", ["dense", "topk"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_kd_loss_claims_what_logits_and_bias_ask_for(kind: str, backend: str) -> None:
    for of_teacher, of_logits, of_bias in itertools.product((False, True), repeat=3):
        leaf, bias = random(N, V, grad=of_logits), random(V, grad=of_bias)

        def call(leaf: Tensor = leaf, bias: Tensor = bias, of_teacher: bool = of_teacher) -> Any:
            return kd_loss(leaf * 1, teacher(kind, of_teacher), LABELS, bias=bias, backend=backend, **LOSS)

        with torch.no_grad():
            assert not any(part.requires_grad for part in call())
        if of_bias and not of_logits:
            with pytest.raises(RefusedError, match="the bias requires grad and the logits do not"):
                call()
            continue
        found = call()
        assert [part.requires_grad for part in found] == [of_logits, False, False]
        if of_logits:
            found.loss.backward()
        assert [leaf.grad is not None, bias.grad is not None] == [of_logits, of_bias]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("compiled", [False, True])
def test_latent_decode_claims_nothing(backend: str, compiled: bool) -> None:
    hidden, weight, bias = random(N, H, grad=True), random(V, H, grad=True), random(V, grad=True)

    def decode(hidden: Tensor) -> Any:
        return latent_decode(hidden * 1, weight, bias=bias, backend=backend)

    found = (torch.compile(decode, fullgraph=True, backend="aot_eager") if compiled else decode)(hidden)
    assert not found.ids.requires_grad
    assert not found.logprobs.requires_grad
