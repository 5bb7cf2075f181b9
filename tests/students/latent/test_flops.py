"""The cost of a token: what was published, and what torch counts in the student itself."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from latentforge.errors import RefusedError
from latentforge.students.causal import ModelShape, Student, new_model
from latentforge.students.latent.backbone import DecoderShape
from latentforge.students.latent.codec import Codec, CodecShape
from latentforge.students.latent.flops import latent_inference, latent_training, token_inference, token_training
from latentforge.students.latent.student import LatentShape, LatentStudent

VOCABULARY, POSITIONS, TOKENS = 128_256, 2048, 250_000 * 2_000_000
SIZES = {"S": (12, 768, 2048), "M": (16, 1024, 2752), "L": (16, 1536, 4096), "XL": (16, 2560, 6880)}
CODEC = CodecShape(vocab_size=VOCABULARY, chunk=4, latent=128, width=512, inner=1280)


def transformer(size: str) -> ModelShape:
    layers, width, inner = SIZES[size]
    return ModelShape(layers, width, 8, 8, inner)


def calm(size: str) -> LatentShape:
    layers, width, inner = SIZES[size]
    return LatentShape(VOCABULARY, 4, 128, DecoderShape(layers, width, 8, 8, inner), head_blocks=layers // 4)


@pytest.mark.parametrize(("size", "training", "inference"), [("S", 6.6, 4.4), ("M", 11.9, 7.9), ("L", 22.5, 15.0)])
def test_published_figures_of_the_token_level_models_come_out(size: str, training: float, inference: float) -> None:
    settings = {"vocab_size": VOCABULARY, "positions": POSITIONS}
    assert token_inference(transformer(size), **settings).total == pytest.approx(inference * 1e8, rel=0.05)
    assert token_training(transformer(size), **settings).total * TOKENS == pytest.approx(training * 1e20, rel=0.12)


@pytest.mark.parametrize(("size", "training", "inference"), [("M", 3.7, 2.9), ("L", 7.7, 4.6), ("XL", 19.5, 9.4)])
def test_published_figures_of_the_latent_models_come_out(size: str, training: float, inference: float) -> None:
    assert latent_inference(calm(size), CODEC, positions=POSITIONS).total == pytest.approx(inference * 1e8, rel=0.05)
    found = latent_training(calm(size), CODEC, positions=POSITIONS, draws=8, token_head=False)
    assert found.total * TOKENS == pytest.approx(training * 1e20, rel=0.12)


def test_the_sampler_that_is_used_is_counted() -> None:
    """Voting of 200, which the authors need for fluent text, costs 68 times the model it is compared with."""
    once = latent_inference(calm("M"), CODEC, positions=POSITIONS)
    voted = latent_inference(calm("M"), CODEC, positions=POSITIONS, draws=200)
    other = token_inference(transformer("S"), vocab_size=VOCABULARY, positions=POSITIONS)
    assert voted.total / once.total == pytest.approx(104, rel=0.02)
    assert voted.total / other.total == pytest.approx(68, rel=0.02)
    assert (voted.layers, voted.attention, voted.input) == (once.layers, once.attention, once.input)


def counted(work: Callable[[], object]) -> int:
    """torch's own count; of attention it knows that of the plain backend."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def test_a_latent_student_costs_what_torch_counts_in_it() -> None:
    shape = LatentShape(50, 4, 6, DecoderShape(2, 32, 4, 2, 48), head_blocks=2, noise=5, token_layers=1)
    small = CodecShape(vocab_size=50, chunk=4, latent=6, width=16, inner=24)
    student, codec = LatentStudent.new(shape, seed=1).eval(), Codec(small).eval()
    chunks, draws = torch.randint(1, 50, (1, 7, 4)), 3

    def inference() -> None:
        states = student.states(chunks, torch.ones_like(chunks).bool())[0]
        latents = student.draw_latents(states, torch.rand(7, draws, 5) - 0.5)
        codec.logits(latents.flatten(0, 1))

    # The state's way into the head is walked once for all draws.
    assert counted(inference) == latent_inference(shape, small, positions=7, draws=draws).total * 28
    encoding = counted(lambda: codec.encode(chunks[0], torch.ones_like(chunks[0]).bool()))
    tokens = counted(lambda: student.token_rows(torch.zeros(7, 32), chunks[0]) @ student.table.weight.T)
    trained = latent_training(shape, small, positions=7, draws=3, token_head=True)
    assert encoding == trained.codec * 28
    assert tokens == trained.token_head * 28 / 3


def test_a_gradient_through_the_frozen_codec_costs_what_decoding_does() -> None:
    codec = Codec(CodecShape(vocab_size=50, chunk=4, latent=6, width=16, inner=24)).requires_grad_(False).eval()
    latents = torch.randn(7, 6, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        codec.logits(latents).sum().backward()
    assert counter.get_total_flops() == 2 * 7 * codec.shape.decoding_flops


def test_a_token_level_student_costs_what_torch_counts_in_it() -> None:
    shape = ModelShape(2, 32, 4, 2, 48)
    student = Student(new_model(shape, vocab_size=50, positions=16, eos_id=0, seed=1), 50).eval()
    found = counted(lambda: student.logits(torch.randint(0, 50, (1, 10))))
    assert found == token_inference(shape, vocab_size=50, positions=9).total * 9


def test_a_student_beside_another_codec_is_refused() -> None:
    with pytest.raises(RefusedError, match="latent is 128 of the student and 64 of the codec"):
        latent_inference(calm("M"), CodecShape(VOCABULARY, 4, 64, 512, 1280), positions=1)
    with pytest.raises(RefusedError, match=r"draws = 0\.5"):
        latent_inference(calm("M"), CODEC, positions=1, draws=0.5)
