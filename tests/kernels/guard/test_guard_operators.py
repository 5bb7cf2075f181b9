"""Faults of the other operators are caught: tokens that are not the best, noise that is not drawn, a lost gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from latentforge.kernels.guard.parity import Proof, prove
from latentforge.kernels.guard.variants import Variant
from latentforge.kernels.guard.work import make_trial
from latentforge.kernels.linear import linear_kd_loss
from latentforge.kernels.reference.decode import decode

SHAPES = ((1, 16, 33), (7, 24, 203))


def proof_of(op: str, entry: Callable[..., Any], targets: str, **options: Any) -> Proof:
    variant = Variant(op, "bf16", "cpu", "stub:stub", targets, device="cpu")  # type: ignore[arg-type]
    return prove(entry, SHAPES, make_trial(variant, torch.device("cpu")), options=options)


@pytest.mark.parametrize("weight", ["float", "int8"])
def test_the_definition_of_decoding_is_right(weight: str) -> None:
    found = proof_of("latent_decode", decode, weight)
    assert found.reason is None, found.detail


@pytest.mark.parametrize("targets", ["dense", "topk"])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_the_loss_of_a_last_layer_is_right(targets: str, backend: str) -> None:
    found = proof_of("linear_kd_loss", linear_kd_loss, targets, backend=backend)
    assert found.reason is None, found.detail


def second_best(hidden: Any, weight: Any, settings: Any, seeds: Any, positions: Any, bias: Any) -> Any:
    """The best but one of the last row."""
    ids, logprobs = decode(hidden, weight, settings, seeds, positions, bias)
    other = bias.clone()
    other[ids[-1]] = -torch.inf
    ids[-1] = decode(hidden, weight, settings, seeds, positions, other)[0][-1]
    return ids, logprobs


def without_noise(hidden: Any, weight: Any, settings: Any, seeds: Any, positions: Any, bias: Any) -> Any:
    """The most likely token instead of a draw."""
    return decode(hidden, weight, replace(settings, temperature=0.0), None, None, bias)


def without_cut(hidden: Any, weight: Any, settings: Any, seeds: Any, positions: Any, bias: Any) -> Any:
    """Top-k and top-p left out, and with them most of the vocabulary never refused."""
    hot = replace(settings, top_k=None, top_p=None, temperature=settings.temperature and 50.0)
    return decode(hidden, weight, hot, seeds, positions, bias)


def without_bias(hidden: Any, weight: Any, settings: Any, seeds: Any, positions: Any, bias: Any) -> Any:
    """The bias is forgotten."""
    return decode(hidden, weight, settings, seeds, positions, None)


def logprob_of_the_cut(hidden: Any, weight: Any, settings: Any, seeds: Any, positions: Any, bias: Any) -> Any:
    """Log-probabilities that are a tenth of a nat too large."""
    ids, logprobs = decode(hidden, weight, settings, seeds, positions, bias)
    return ids, logprobs + 0.1


def no_token(hidden: Any, weight: Any, settings: Any, seeds: Any, positions: Any, bias: Any) -> Any:
    """An id outside the vocabulary."""
    ids, logprobs = decode(hidden, weight, settings, seeds, positions, bias)
    return ids + 1000, logprobs


@pytest.mark.parametrize("entry", [second_best, without_noise, without_cut, without_bias, logprob_of_the_cut, no_token])
def test_a_wrong_token_is_caught(entry: Callable[..., Any]) -> None:
    found = proof_of("latent_decode", entry, "float")
    assert found.reason == "mismatch_first_call", found.detail


def _scaled(which: str) -> Callable[..., Any]:
    def entry(hidden: Any, weight: Any, *rest: Any, **named: Any) -> Any:
        if which == "hidden" and hidden.requires_grad:
            hidden.register_hook(lambda gradient: gradient * 1.02)
        if which == "weight" and weight.requires_grad:
            weight.register_hook(lambda gradient: gradient * 0.0)
        found = linear_kd_loss(hidden, weight, *rest, **named)
        return found._replace(loss=found.loss * 1.001) if which == "loss" else found

    return entry


@pytest.mark.parametrize("which", ["hidden", "weight", "loss"])
def test_a_wrong_gradient_of_a_last_layer_is_caught(which: str) -> None:
    found = proof_of("linear_kd_loss", _scaled(which), "topk", backend="cpu")
    assert found.reason == "mismatch_first_call"
    assert which in found.detail
