"""Top-k and top-p end at exactly the right token, on rows of every kind.

With one column and a hidden row of 1 the logits are the weight, exactly. A seed that favours one id above all others
asks the kernel whether that id is allowed: the last allowed and the first refused token are asked about.
"""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import pytest
import torch
from torch import Tensor

from latentforge.kernels.cpu import decode as cpu
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.fixtures import TIES_AT_TOP_P, ties_at_top_p
from latentforge.kernels.native import native
from latentforge.kernels.noise import philox_words
from latentforge.kernels.reference import decode as reference

VARIANTS = list(native().decode_variants())
VOCAB = 6000
SEEDS = 60_000


@cache
def favouring(identity: int) -> int:
    """The seed whose noise at this id is the largest (about 11): that of the smallest word."""
    best = (1 << 32, 0)
    for start in range(0, SEEDS, 10_000):
        words = philox_words(torch.arange(start, start + 10_000), torch.tensor(0), torch.tensor(identity))
        best = min(best, (int(words.min()), start + int(words.argmin())))
    return best[1]


def rows() -> dict[str, Tensor]:
    some = torch.Generator().manual_seed(11)
    normal = torch.randn(VOCAB, generator=some)
    peaked = normal * 2
    peaked[1234], peaked[77] = 14.0, 13.0
    masked = normal.clone()
    masked[torch.randperm(VOCAB, generator=some)[: VOCAB // 3]] = -math.inf
    return {
        "peaked": peaked,
        "flat": normal * 0.3,
        "equal": torch.zeros(VOCAB),
        "two levels": torch.where(torch.arange(VOCAB) % 2 == 0, 0.0, -0.5),
        "coarse": (normal * 2).round() / 2,
        "a few ulps apart": 1 + torch.randint(0, 9, (VOCAB,), generator=some) * 2.0**-23,
        "around zero": normal * 1e-30,
        "signed zeros": torch.where(torch.arange(VOCAB) % 3 == 0, 0.0, -0.0),
        "masked": masked,
        "one finite": torch.full((VOCAB,), -math.inf).index_fill(0, torch.tensor([4321]), -2.0),
        "far below": torch.where(torch.arange(VOCAB) < 40, normal, normal * 0.2 - 30),
    }


def order(z: Tensor) -> list[int]:
    return [i for i in sorted(range(VOCAB), key=lambda i: (-float(z[i]), i)) if z[i] > -math.inf]


def allowed_count(z: Tensor, ranked: list[int], temperature: float, top_k: int | None, top_p: float | None) -> int:
    """How many of the ranked tokens are allowed, by summing exactly rounded masses as fractions."""
    count = len(ranked) if top_k is None else min(top_k, len(ranked))
    if top_p is None or top_p == 1:
        return count
    inverse = float(torch.tensor(1 / temperature, dtype=torch.float32))
    top = float(z[ranked[0]])
    masses = [Fraction(math.exp((float(z[i]) - top) * inverse)) for i in ranked[:count]]
    goal, total = Fraction(top_p) * sum(masses), Fraction(0)
    for number, mass in enumerate(masses):
        total += mass
        if total >= goal * (1 - Fraction(1, 10**6)) and total < goal * (1 + Fraction(1, 10**6)):
            return -number - 1  # too close to call in fp32: the token may be the last or the last but one
        if total >= goal:
            return number + 1
    return count


CASES = [
    (1.0, None, 0.9),
    (1.0, None, 0.35),
    (0.5, None, 0.5),
    (2.0, None, 0.999),
    (1.0, 1, None),
    (1.0, 7, None),
    (1.0, 1023, None),
    (1.0, 1500, None),
    (1.0, 4097, None),
    (1.0, 5000, None),
    (1.0, VOCAB + 5, None),
    (1.0, 50, 0.7),
    (1.0, 2500, 0.8),
    (1.0, 5500, 0.9),
    (1.0, 5500, 0.05),
]


def asked(z: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> list[tuple[int, bool]]:
    """(id, whether it must be chosen where the noise favours it)."""
    ranked = order(z)
    count = allowed_count(z, ranked, temperature, top_k, top_p)
    if count < 0:
        last, first_out = -count - 2, -count + 1
    else:
        last, first_out = count - 1, count
    # Far down a peaked row no noise of 11 wins: there the question has no answer.
    heard = float(z[ranked[0]]) / temperature + 2.5
    questions = [(ranked[i], i == last) for i in (last, first_out) if 0 <= i < len(ranked)]
    return [(i, inside) for i, inside in questions if float(z[i]) / temperature + 10 > heard + math.log(VOCAB) - 3]


@pytest.mark.parametrize("variant", [VARIANTS[0], "baseline"])
@pytest.mark.parametrize("name", sorted(rows()))
def test_the_last_token_is_in_and_the_next_is_out(name: str, variant: str) -> None:
    z = rows()[name]
    said = 0
    for temperature, top_k, top_p in CASES:
        questions = asked(z, temperature, top_k, top_p)
        if not questions:
            continue
        ids = [identity for identity, _ in questions]
        seeds = torch.tensor([favouring(identity) for identity in ids])
        hidden, zero = torch.ones(len(ids), 1), torch.zeros(len(ids), dtype=torch.int64)
        chosen = DecodeSettings(VOCAB, temperature, top_k, top_p)
        found, _ = cpu.decode(hidden, z[:, None].contiguous(), chosen, seeds, zero, None, isa=variant, threads=1)
        wanted, _ = reference.decode(hidden.double(), z[:, None], chosen, seeds, zero, None)
        for token, best, (identity, inside) in zip(found.tolist(), wanted.tolist(), questions, strict=True):
            assert (token == identity) <= inside, (temperature, top_k, top_p, identity)
            if inside and best == identity:
                said += 1
            assert token == best, (temperature, top_k, top_p, identity, inside)
    if name not in ("peaked", "one finite", "far below", "masked"):
        assert said >= 4  # the questions were heard


def test_the_questions_catch_a_set_that_is_one_too_large_or_too_small() -> None:
    z = rows()["equal"]
    hidden, zero = torch.ones(1, 1), torch.zeros(1, dtype=torch.int64)
    ranked = order(z)
    for k in (7, 1500, 5000):
        for wrong in (k - 1, k + 1):
            answers = []
            for top_k in (k, wrong):
                seed = torch.tensor([favouring(ranked[max(k, wrong) - 1])])
                chosen = DecodeSettings(VOCAB, 1.0, top_k, None)
                answers.append(int(cpu.decode(hidden, z[:, None].contiguous(), chosen, seed, zero, None)[0]))
            assert answers[0] != answers[1], (k, wrong)


@pytest.mark.parametrize("case", TIES_AT_TOP_P)
@pytest.mark.parametrize("backend", ["reference", *VARIANTS])
def test_of_equal_logits_at_the_top_p_crossing_the_fewest_are_kept_and_no_more(backend: str, case: str) -> None:
    call, wanted = ties_at_top_p(case)
    found = reference.decode(*call) if backend == "reference" else cpu.decode(*call, isa=backend)
    assert found[0].tolist() == wanted
    if backend == "reference":
        hidden, *rest = call
        assert reference.decode(hidden.double(), *rest)[0].tolist() == wanted


@pytest.mark.parametrize("top_p", [0.2, 0.9])
def test_limits_of_many_rows_at_once_are_those_of_each_alone(top_p: float) -> None:
    some = torch.Generator().manual_seed(3)
    weight = torch.randn(3000, 24, generator=some)
    hidden = torch.randn(40, 24, generator=some) * torch.logspace(-2, 0.5, 40)[:, None]  # from flat to peaked
    seeds, positions = torch.arange(40), torch.arange(40) * 3
    for top_k in (None, 2000):
        chosen = DecodeSettings(3000, 1.0, top_k, top_p)
        together = cpu.decode(hidden, weight, chosen, seeds, positions, None, threads=2)
        for row in range(40):
            one = slice(row, row + 1)
            alone = cpu.decode(hidden[one], weight, chosen, seeds[one], positions[one], None, threads=1)
            assert torch.equal(alone[0], together[0][one])
            assert torch.equal(alone[1], together[1][one])
