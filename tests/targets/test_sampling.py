"""Rows drawn from a teacher: the same for a seed anywhere, right on average, and refused where they would lie."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.kernels import kd_loss
from latentforge.kernels.targets import DenseTargets, TopKTargets
from latentforge.targets.sampling import Sampling
from latentforge.targets.sampling_checks import unbiased
from latentforge.teachers.fixture import FixtureTeacher
from latentforge.teachers.sampled import SampledTeacher

INF = float("inf")


def logits(rows: int, vocab: int, seed: int = 0, width: float = 3.0) -> Tensor:
    return width * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def keyed(rows: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows) * 7919, torch.arange(rows)


@settings(max_examples=80, derandomize=True)
@given(
    vocab=st.sampled_from([1, 2, 7, 320, 5003]),
    draws=st.integers(1, 70),
    rows=st.integers(0, 5),
    seed=st.integers(-(2**70), 2**70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    width=st.sampled_from([0.0, 1.0, 30.0]),
)
def test_a_row_is_its_draws_counted(
    vocab: int, draws: int, rows: int, seed: int, dtype: torch.dtype, width: float
) -> None:
    sampling = Sampling(draws, seed)
    ids, logprobs = sampling.rows(logits(rows, vocab, width=width).to(dtype), *keyed(rows))
    assert ids.shape == logprobs.shape == (rows, min(draws, vocab))
    assert (ids.dtype, logprobs.dtype) == (torch.int32, torch.float32)
    absent = ids == -1
    assert bool(((logprobs == -INF) == absent).all())
    assert not bool((absent[:, :-1] & ~absent[:, 1:]).any())
    assert not bool((logprobs[:, 1:] > logprobs[:, :-1]).any())
    counts = logprobs.double().exp() * draws
    assert bool((counts.round().sum(-1) == draws).all())
    assert float((counts - counts.round()).abs().max() if rows else 0.0) < 1e-4
    for row in ids:
        present = row[row >= 0].tolist()
        assert len(set(present)) == len(present) >= 1
        assert max(present) < vocab


def test_the_rows_do_not_depend_on_batch_dtype_of_the_copy_or_place_in_the_data() -> None:
    teacher = FixtureTeacher(300)
    sequences = [np.array(tokens, dtype=np.int64) for tokens in ([5, 9, 2, 7], [1, 2, 3, 4], [5, 9, 2, 8], [8, 8, 8])]
    sampled = SampledTeacher(teacher, Sampling(12, 7))
    together = dict(sampled.score(sequences, k=12, temperatures=(1.0,)))
    for number, tokens in enumerate(sequences):
        ((_, alone),) = sampled.score([tokens.astype(np.uint32)], k=12, temperatures=(1.0,))
        assert np.array_equal(alone.ids, together[number].ids)
        assert np.array_equal(alone.logprobs, together[number].logprobs)
    # Another sequence, another position and another seed are other draws of the same distribution.
    assert not np.array_equal(together[0].ids[0], together[2].ids[0])
    assert not np.array_equal(together[3].ids[0], together[3].ids[1])
    ((_, other),) = SampledTeacher(teacher, Sampling(12, 8)).score(sequences[:1], k=12, temperatures=(1.0,))
    assert not np.array_equal(other.ids, together[0].ids)


DRAWN = """
import hashlib, sys, torch
from latentforge.targets.sampling import Sampling
def digest(threads):
    torch.set_num_threads(threads)
    x = 3 * torch.randn(9, 40001, generator=torch.Generator().manual_seed(3))
    ids, logprobs = Sampling(50, 7).rows(x, torch.arange(9), torch.arange(9))
    return hashlib.sha256(ids.numpy().tobytes() + logprobs.numpy().tobytes()).hexdigest()
"""


def test_another_process_with_other_threads_draws_the_same_rows() -> None:
    here: dict[str, Any] = {}
    threads = torch.get_num_threads()
    exec(DRAWN, here)
    elsewhere = subprocess.run(
        [sys.executable, "-c", DRAWN + "print(digest(3))"], capture_output=True, text=True, check=True
    )
    assert here["digest"](1) == elsewhere.stdout.strip()
    torch.set_num_threads(threads)
    # What was drawn once is drawn for good: a store that is resumed years later, elsewhere, must go on alike.
    ids, logprobs = Sampling(5, 7).rows(torch.arange(6.0).repeat(2, 1), *keyed(2))
    assert ids.tolist() == [[5, 3, 4, -1, -1], [5, 4, -1, -1, -1]]
    assert logprobs.exp()[:, :3].tolist() == [pytest.approx([0.6, 0.2, 0.2]), pytest.approx([0.6, 0.4, 0.0])]
    assert Sampling(5, 7).key(np.array([1, 2, 3])) == 4213196847630492312


def test_draws_are_right_on_average_and_no_more_spread_than_independent_ones() -> None:
    teacher, seeds, draws = logits(1, 200, seed=4, width=2.0), 3000, 10
    p = teacher.double().softmax(-1)[0]
    ids, logprobs = Sampling(draws, 1).rows(
        teacher.expand(seeds, -1), torch.arange(seeds) * 13, torch.zeros(seeds).long()
    )
    frequency = torch.zeros(seeds, 201, dtype=torch.float64).scatter_(1, ids.long() % 201, logprobs.double().exp())
    frequency = frequency[:, :200]
    error = (frequency.mean(0) - p) / (p * (1 - p) / draws / seeds).sqrt()
    assert float(error.abs().max()) < 4.5
    independent = float((p * (1 - p)).sum()) / draws
    assert float((frequency - p).square().sum(1).mean()) < independent
    # A token with a probability of 1 / draws or more is nearly never left out.
    sure = p >= 2 / draws
    assert bool(sure.any())
    assert bool((frequency[:, sure] > 0).all())


def test_padding_is_never_drawn_and_a_sure_token_always() -> None:
    x = logits(4, 64)
    x[:, 32:] = -INF
    x[3] = -INF
    x[3, 17] = -4.0
    ids, logprobs = Sampling(200, 3).rows(x, *keyed(4))
    assert int(ids.max()) < 32
    assert ids[3, 0] == 17
    assert logprobs[3, 0] == 0.0
    assert bool((ids[3, 1:] == -1).all())


@pytest.mark.parametrize("wrong", [float("nan"), INF, None])
def test_logits_without_a_distribution_are_refused(wrong: float | None) -> None:
    x = logits(3, 64)
    if wrong is None:
        x[1] = -INF
    else:
        x[1, 5] = wrong
    with pytest.raises(RefusedError, match="no distribution"):
        Sampling(5, 3).rows(x, *keyed(3))


def test_what_would_bias_or_mean_nothing_is_refused_by_name() -> None:
    with pytest.raises(RefusedError, match="draws = 0"):
        Sampling(0, 1)
    sampled = SampledTeacher(FixtureTeacher(30), Sampling(50, 1))
    assert sampled.width == 30
    tokens = [np.array([1, 2, 3])]
    with pytest.raises(RefusedError, match="T = 1"):
        list(sampled.score(tokens, k=30, temperatures=(1.0, 2.0)))
    with pytest.raises(RefusedError, match=r"k = 8.*biased"):
        list(sampled.score(tokens, k=8, temperatures=(1.0,)))

    class Remote(FixtureTeacher):
        capabilities = frozenset({"score"})  # type: ignore[assignment]

    with pytest.raises(RefusedError, match="fixture gives none"):
        SampledTeacher(Remote(30), Sampling(5, 1))


def test_the_loss_of_drawn_rows_pulls_towards_the_drawn_frequencies() -> None:
    sampled = SampledTeacher(FixtureTeacher(40), Sampling(9, 5))
    targets = sampled.targets(torch.tensor([[3, 4, 5, 6], [7, 8, 9, 1]]), temperature=1.0)
    assert isinstance(targets, TopKTargets)
    student = logits(6, 40).requires_grad_()
    labels = torch.zeros(6, dtype=torch.int64)
    loss = kd_loss(student * 1, targets, labels, temperature=1.0, ce_weight=0.0, kd_weight=1.0, denominator=1.0)
    loss.loss.backward()
    frequency = torch.zeros(6, 41).scatter_(1, targets.ids.long() % 41, targets.logprobs.exp())[:, :40]
    assert student.grad is not None
    assert torch.allclose(student.grad, student.detach().softmax(-1) - frequency, atol=1e-6)
    assert bool((targets.ids == -1).any())


@pytest.mark.parametrize("mutant", ["largest", "same_noise"])
def test_other_biases_than_the_contracts_are_caught(mutant: str) -> None:
    finding = unbiased(mutant=mutant)
    assert finding.passed is False, finding.text


def test_dense_targets_of_the_same_teacher_are_what_the_draws_tend_to() -> None:
    teacher = FixtureTeacher(24)
    tokens = torch.tensor([[3, 4, 5]])
    dense = teacher.targets(tokens, temperature=1.0)
    assert isinstance(dense, DenseTargets)
    drawn = SampledTeacher(teacher, Sampling(200_000, 2)).targets(tokens, temperature=1.0)
    p = dense.logits.softmax(-1)
    found = torch.zeros(2, 25).scatter_(1, drawn.ids.long() % 25, drawn.logprobs.exp())[:, :24]
    assert float((found - p).abs().max()) < 1e-5
