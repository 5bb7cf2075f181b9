"""Top-k rows: exact tails at every temperature, a fixed order of equal values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from latentforge.errors import RefusedError
from latentforge.targets import topk
from latentforge.targets.topk import sequence_rows, topk_rows


def oracle(logits: torch.Tensor, k: int, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """float64, by sorting: (top-k logprobs, tail)."""
    logp = torch.log_softmax(logits.double(), dim=-1).sort(dim=-1, descending=True).values
    return logp[:, :k], torch.logsumexp(logp[:, k:] / temperature, dim=-1)


@pytest.mark.parametrize("scale", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_logprobs_and_tails_are_those_of_float64(scale: float, temperature: float) -> None:
    logits = torch.randn(50, 1000, generator=torch.Generator().manual_seed(1)) * scale
    ids, logprobs, tails = topk_rows(logits, 8, [temperature])
    want, tail = oracle(logits, 8, temperature)
    assert torch.allclose(logprobs.double(), want, atol=2e-5, rtol=1e-6)
    assert torch.allclose(tails[temperature].double(), tail, atol=5e-5, rtol=2e-6)
    assert ids.dtype == torch.int32
    assert torch.equal(torch.log_softmax(logits, -1).gather(1, ids.long()), logprobs)


def test_a_tail_far_below_rounding_is_still_right() -> None:
    """One minus the inside would be 0 or negative here; the outside is summed instead."""
    logits = torch.tensor([[60.0, 40.0, 1.0, 0.0, -1.0]])
    _, logprobs, tails = topk_rows(logits, 2, [1.0])
    assert 1.0 - float(logprobs.exp().sum()) <= 0.0
    want = math.log(math.exp(1) + 1 + math.exp(-1)) - 60.0
    assert float(tails[1.0]) == pytest.approx(want, rel=1e-6)


def test_with_the_whole_vocabulary_nothing_lies_outside() -> None:
    _, logprobs, tails = topk_rows(torch.randn(3, 7), 7, [1.0, 2.0])
    assert torch.isneginf(tails[1.0]).all()
    assert torch.isneginf(tails[2.0]).all()
    assert torch.allclose(logprobs.exp().sum(-1), torch.ones(3))


def test_padding_of_minus_infinity_adds_nothing() -> None:
    logits = torch.randn(4, 20)
    padded = torch.cat([logits, torch.full((4, 6), float("-inf"))], dim=1)
    for a, b in zip(topk_rows(logits, 5, [2.0])[:2], topk_rows(padded, 5, [2.0])[:2], strict=True):
        assert torch.allclose(a.double(), b.double())
    assert torch.allclose(topk_rows(logits, 5, [2.0])[2][2.0], topk_rows(padded, 5, [2.0])[2][2.0], atol=1e-6)


def test_equal_values_come_in_the_order_of_their_ids() -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0, 5.0, 1.0], [3.0, 2.0, 1.0, 0.0, -1.0, -2.0]])
    ids, _, _ = topk_rows(logits, 5, [1.0])
    assert ids.tolist() == [[1, 2, 4, 3, 5], [0, 1, 2, 3, 4]]


def test_rows_in_chunks_are_the_rows_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    logits = torch.randn(37, 50)
    whole = topk_rows(logits, 4, [1.0, 3.0])
    monkeypatch.setattr(topk, "_CHUNK_BYTES", 4 * 50 * 5)
    parts = topk_rows(logits, 4, [1.0, 3.0])
    assert torch.equal(whole[0], parts[0])
    assert torch.equal(whole[1], parts[1])
    assert all(torch.equal(whole[2][t], parts[2][t]) for t in (1.0, 3.0))


def test_the_callers_logits_are_not_written() -> None:
    logits = torch.randn(5, 30)
    before = logits.clone()
    topk_rows(logits, 3, [1.0])
    assert torch.equal(logits, before)


@pytest.mark.parametrize("k", [0, 11])
def test_a_k_that_does_not_fit_is_refused(k: int) -> None:
    with pytest.raises(RefusedError, match=f"k = {k} does not fit a vocabulary of 10"):
        topk_rows(torch.randn(2, 10), k, [1.0])


@given(seed=st.integers(0, 999), vocabulary=st.integers(2, 60), data=st.data())
def test_inside_and_tail_make_up_all_the_mass(seed: int, vocabulary: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, vocabulary))
    scale = data.draw(st.sampled_from([0.0, 1.0, 20.0]))
    logits = torch.randn(3, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale
    ids, logprobs, tails = topk_rows(logits, k, [1.0])
    assert torch.allclose(logprobs.exp().sum(-1) + tails[1.0].exp(), torch.ones(3), atol=1e-5)
    assert all(len(set(row)) == k for row in ids.tolist())
    assert bool((logprobs.diff(dim=-1) <= 0).all())


def test_flat_rows_split_in_row_major_order() -> None:
    ids, logprobs, tails = topk_rows(torch.randn(6, 10), 2, [1.0])
    rows = sequence_rows(ids, logprobs, tails, sequences=2)
    assert [row.ids.tolist() for row in rows] == [ids[:3].tolist(), ids[3:].tolist()]
    with pytest.raises(RefusedError, match="6 target rows do not split into 4"):
        sequence_rows(ids, logprobs, tails, sequences=4)
