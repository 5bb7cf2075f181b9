"""The noise has the same bits in torch, in scalar C++ and in every instruction set, and they are those of Philox."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from latentforge.kernels import noise
from latentforge.kernels.native import native

VARIANTS = list(native().cpu_variants())
INT64 = st.integers(-(2**63), 2**63 - 1)
EXTREMES = st.sampled_from([0, 1, -1, 2**31, 2**32 - 1, 2**32, -(2**32), 2**63 - 1, -(2**63)])

# Known answers of Philox4x32-10, from the test vectors of the Random123 library: counter, key, output.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """Philox4x32-10 in Python's integers, from the paper's figure: S-boxes of multiply, then swap and xor."""
    left = list(counter)
    k = list(key)
    for round_number in range(10):
        if round_number:
            k = [(k[0] + 0x9E3779B9) % 2**32, (k[1] + 0xBB67AE85) % 2**32]
        high0, low0 = divmod(0xD2511F53 * left[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * left[2], 2**32)
        left = [high1 ^ left[1] ^ k[0], low1, high0 ^ left[3] ^ k[1], low0]
    return tuple(left)


def signed(low: int, high: int) -> int:
    value = low | high << 32
    return value - 2**64 if value >= 2**63 else value


def bits(x: Tensor) -> list[int]:
    return x.contiguous().view(torch.int32).tolist()


def run(variant: str, seed: int, position: int, first: int, count: int) -> Tensor:
    out = torch.full((count + 1,), -77.0)
    native().gumbel_noise(seed, position, first, count, out.data_ptr(), variant)
    assert out[count] == -77.0
    return out[:count]


@pytest.mark.parametrize(("counter", "key", "output"), KNOWN)
def test_the_independent_philox_gives_the_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], output: tuple[int, ...]
) -> None:
    assert philox(counter, key) == output
    # The planted fault: one word of the key changed must not pass.
    assert philox(counter, (key[0] ^ 1, key[1])) != output


def test_the_words_are_the_published_answer_at_zero() -> None:
    zero = torch.tensor(0)
    assert tuple(noise.philox_words(zero, zero, torch.arange(4)).tolist()) == KNOWN[0][2]


@settings(max_examples=200, derandomize=True)
@given(seed=INT64 | EXTREMES, position=INT64 | EXTREMES, identity=st.integers(0, 2**34 - 1))
def test_the_words_are_those_of_philox_at_any_key_and_counter(seed: int, position: int, identity: int) -> None:
    counter = (identity >> 2, 0, position % 2**32, (position >> 32) % 2**32)
    expected = philox(counter, (seed % 2**32, (seed >> 32) % 2**32))[identity & 3]
    assert int(noise.philox_words(torch.tensor(seed), torch.tensor(position), torch.tensor(identity))) == expected


@pytest.mark.parametrize("variant", VARIANTS)
@settings(max_examples=150, derandomize=True)
@given(
    seed=INT64 | EXTREMES,
    position=INT64 | EXTREMES,
    first=st.integers(0, 262144) | st.integers(2**32 - 200, 2**32 + 200),
    count=st.integers(0, 300),
)
def test_torch_and_every_variant_have_the_same_bits(
    variant: str, seed: int, position: int, first: int, count: int
) -> None:
    expected = noise.gumbel(torch.tensor(seed), torch.tensor(position), torch.arange(first, first + count))
    assert bits(run(variant, seed, position, first, count)) == bits(expected)


@settings(max_examples=200, derandomize=True)
@given(seed=INT64 | EXTREMES, position=INT64 | EXTREMES, identity=st.integers(0, 2**34 - 1))
def test_scalars_have_the_same_bits(seed: int, position: int, identity: int) -> None:
    alone = torch.tensor([native().gumbel(seed, position, identity)])
    assert bits(alone) == bits(noise.gumbel(torch.tensor([seed]), torch.tensor([position]), torch.tensor([identity])))


@settings(max_examples=500, derandomize=True)
@given(word=st.integers(0, 2**32 - 1))
def test_a_word_becomes_the_same_variate_in_torch_and_in_cpp(word: int) -> None:
    assert bits(torch.tensor([native().gumbel_of_word(word)])) == bits(noise.gumbel_of_words(torch.tensor([word])))


def test_seeds_positions_and_ids_all_matter() -> None:
    base = noise.gumbel(torch.tensor(3), torch.tensor(5), torch.arange(64))
    for seed, position in [(4, 5), (3, 6), (5, 3), (3 + 2**32, 5), (3, 5 + 2**32), (-3, 5), (3, -5)]:
        other = noise.gumbel(torch.tensor(seed), torch.tensor(position), torch.arange(64))
        assert not bool((other == base).any()), (seed, position)
    assert len(set(base.tolist())) == 64
