"""The noise of sampling has the same bits on aarch64 as on this machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from latentforge.kernels import noise
from latentforge.kernels.native import native

# (seed, position, first id, how many): keys of all sizes and signs, counters beyond 32 bits, odd starts.
RUNS = [
    (0, 0, 0, 4096),
    (-1, 2**63 - 1, 12345, 777),
    (2**40 + 3, -7, 2**32 - 100, 300),
    (-(2**63), 2**32, 151_935, 65),
]


def drawn(run: tuple[int, int, int, int], variant: str) -> Tensor:
    seed, position, first, count = run
    out = torch.empty(count)
    native().gumbel_noise(seed, position, first, count, out.data_ptr(), variant)
    return out.view(torch.int32)


@pytest.fixture(scope="module")
def here() -> list[Tensor]:
    """The bits that this machine's best variant draws; they are also those of the definition."""
    found = [drawn(run, native().cpu_variants()[0]) for run in RUNS]
    for bits, (seed, position, first, count) in zip(found, RUNS, strict=True):
        ids = torch.arange(first, first + count)
        assert torch.equal(bits, noise.gumbel(torch.tensor(seed), torch.tensor(position), ids).view(torch.int32))
    return found


@pytest.mark.parametrize("processor", ["max", "cortex-a57"])
def test_the_noise_has_the_same_bits_as_here(here: list[Tensor], start: Callable[..., Any], processor: str) -> None:
    with start(processor).in_place() as extension:
        for variant in extension.cpu_variants():
            for run, bits in zip(RUNS, here, strict=True):
                assert torch.equal(drawn(run, variant), bits), (processor, variant, run)


def test_scalars_have_the_same_bits_as_vectors(here: list[Tensor], arm: Any) -> None:
    for (seed, position, first, _), bits in zip(RUNS, here, strict=True):
        alone = torch.tensor([arm.gumbel(seed, position, first + i) for i in range(9)])
        assert torch.equal(alone.view(torch.int32), bits[:9])
