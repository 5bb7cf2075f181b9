"""On a real device: every variant of the CUDA decoder chooses what the definition chooses."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from latentforge.kernels.cuda import decode
from latentforge.kernels.decode_settings import DecodeSettings
from latentforge.kernels.reference import decode as reference
from latentforge.kernels.weights import Int8Weight, quantize_int8

DRAWS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 1.0, "top_k": 40, "top_p": 0.8},
]


@pytest.mark.parametrize("draw", DRAWS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int8], ids=str)
@pytest.mark.parametrize(("vocab", "width"), [(1003, 72), (50257, 768), (151936, 1024)])
def test_tokens_and_logprobs_are_the_definition(
    vocab: int, width: int, dtype: torch.dtype, draw: dict[str, Any]
) -> None:
    generator = torch.Generator(device="cuda").manual_seed(0)
    matrix = torch.randn(vocab, width, generator=generator, device="cuda") * 2.5 / width**0.5
    weight = quantize_int8(matrix) if dtype == torch.int8 else matrix.to(dtype)
    exact = weight if isinstance(weight, Int8Weight) else weight.double()
    settings = DecodeSettings(vocab, **draw)
    for rows in (1, 8, 13, 64, 65):
        hidden = torch.randn(rows, width, generator=generator, device="cuda").to(torch.bfloat16)
        seeds = torch.arange(rows, device="cuda") * 7919 - 5
        positions = torch.arange(rows, device="cuda")
        wanted, logprobs = reference.decode(hidden.double(), exact, settings, seeds, positions, None)
        first = decode.decode(hidden, weight, settings, seeds, positions, None)
        for _ in range(2):
            again = decode.decode(hidden, weight, settings, seeds, positions, None)
            assert torch.equal(first[0], again[0])
            assert torch.equal(first[1], again[1])
        same = first[0] == wanted
        assert float(same.float().mean()) > 0.98
        assert torch.allclose(first[1][same].double(), logprobs[same].double(), rtol=1e-6, atol=1e-5)
        alone = decode.decode(hidden[:1], weight, settings, seeds[:1], positions[:1], None)
        assert torch.equal(alone[1], first[1][:1])
