"""What K tokens a step save: calls and multiplications beside a token-level student, counted; seconds in the soak."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from latentforge.students.causal import ModelShape, new_model
from latentforge.students.latent.backbone import DecoderShape
from latentforge.students.latent.codec import CodecShape, new_codec
from latentforge.students.latent.flops import latent_inference, token_inference
from latentforge.students.latent.generate import Request, generate
from latentforge.students.latent.requests import ChunkModel, Sampling
from latentforge.students.latent.session import LatentModel
from latentforge.students.latent.student import LatentShape, LatentStudent
from latentforge.students.token_session import TokenModel

CHUNK, VOCABULARY, EOS = 8, 2048, 0


class Pair:
    """A latent and a token-level student of the same decoder, with weights that end no text; the codec is the recipe's
    for K = 8."""

    def __init__(self, layers: int, width: int) -> None:
        heads = max(2, width // 64)
        decoder = DecoderShape(layers, width, heads, max(1, heads // 4), width * 11 // 64 * 16)
        self.shape = LatentShape(VOCABULARY, CHUNK, 256, decoder, head_blocks=max(1, layers // 4), tempered=True)
        self.codec_shape = CodecShape(VOCABULARY, CHUNK, 256, 192, 480)
        self.token_shape = ModelShape(layers, width, heads, decoder.kv_heads, decoder.intermediate)
        self.student, self.codec = LatentStudent.new(self.shape, seed=1), new_codec(self.codec_shape, seed=1)
        causal = new_model(self.token_shape, vocab_size=VOCABULARY, positions=4096, eos_id=EOS, seed=1)
        with torch.no_grad():
            self.student.head.to_latent.weight.normal_(std=0.05, generator=torch.Generator().manual_seed(2))
            self.codec.embedding.weight[EOS] = 0.0
        self.latent, self.token = LatentModel(self.student, self.codec, eos_id=EOS), TokenModel(causal, VOCABULARY, EOS)

    def uncached(self) -> LatentModel:
        return LatentModel(self.student, self.codec, eos_id=EOS, cache=False)


def tokens_of(model: ChunkModel, count: int) -> tuple[int, ...]:
    (found,) = generate(model, [Request((5,) * 16, count, seed=1, sampling=Sampling("head", 0.5))])
    return found.tokens


class Calls(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def calls_of(model: ChunkModel, begin: int, end: int) -> float:
    """Operations a step, between two lengths of a text."""
    counts = []
    for steps in (begin, end):
        with Calls() as calls:
            tokens_of(model, steps * model.chunk)
        counts.append(calls.count)
    return (counts[1] - counts[0]) / (end - begin)


def test_a_chunk_of_eight_takes_fewer_calls_than_two_tokens_of_a_token_level_student() -> None:
    pair = Pair(4, 64)
    latent, token = (calls_of(one, 2, 4) for one in (pair.latent, pair.token))
    assert latent < 2 * token, (latent, token)
    assert token < 80 + 61 * 4, token  # 61 a layer: transformers' own steps take 86
    assert latent == calls_of(pair.latent, 10, 11)  # as many further into a text


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds_of(model: ChunkModel, count: int) -> tuple[float, float]:
    """Seconds that passed and seconds of the processor a token."""
    wall, own = time.perf_counter(), time.process_time()
    assert len(tokens_of(model, count)) == count
    return (time.perf_counter() - wall) / count, (time.process_time() - own) / count


def shown(ratios: list[float]) -> str:
    return f"{ratios[len(ratios) // 2]:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


@pytest.mark.soak
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("layers", "width"), [(4, 256), (6, 512), (12, 512)])
def test_how_fast_eight_tokens_a_step_are(layers: int, width: int, count: int) -> None:
    """Prints; asserts nothing of the clock. In turns, so that what else runs meets both."""
    pair = Pair(layers, width)
    flops = [
        token_inference(pair.token_shape, vocab_size=VOCABULARY, positions=256).total,
        latent_inference(pair.shape, pair.codec_shape, positions=32).total,
    ]
    with threads(count):
        for one in (pair.token, pair.latent):
            tokens_of(one, 16)
        found = [[seconds_of(one, 256) for one in (pair.token, pair.latent)] for _ in range(5)]
    ratios = sorted(token[0] / latent[0] for token, latent in found), sorted(t[1] / s[1] for t, s in found)
    fastest = [1 / min(one[which][0] for one in found) for which in (0, 1)]
    print(
        f"\n{layers} layers of {width}, {count} threads, load {os.getloadavg()[0]:.1f}: token-level {fastest[0]:.0f} "
        f"and latent {fastest[1]:.0f} tokens/s at best; ratio {shown(ratios[0])}, by processor time "
        f"{shown(ratios[1])}; FLOPs a token {flops[0] / flops[1]:.2f}"
    )


@pytest.mark.soak
@pytest.mark.parametrize(("layers", "width"), [(4, 256), (6, 512)])
def test_how_much_a_cache_saves_at_256_chunks(layers: int, width: int) -> None:
    """Prints; the tokens are the same."""
    pair, tokens = Pair(layers, width), 256 * CHUNK
    with threads(1):
        assert tokens_of(pair.latent, tokens) == tokens_of(pair.uncached(), tokens)
        found = [[seconds_of(one, tokens) for one in (pair.uncached(), pair.latent)] for _ in range(3)]
    ratios = sorted(slow[0] / fast[0] for slow, fast in found), sorted(slow[1] / fast[1] for slow, fast in found)
    print(
        f"\n{layers} layers of {width}, 256 chunks, load {os.getloadavg()[0]:.1f}: "
        f"{min(fast[1] for _, fast in found) * tokens:.2f} s of the processor with a cache; ratio {shown(ratios[0])}, "
        f"by processor time {shown(ratios[1])}"
    )
