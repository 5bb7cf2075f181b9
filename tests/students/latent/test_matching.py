"""A token-level student of equal cost: chosen by counting, and what it differs by is said."""

from __future__ import annotations

import pytest

from latentforge.errors import RefusedError
from latentforge.students.causal import ModelShape, new_model, shape_of
from latentforge.students.latent.backbone import DecoderShape
from latentforge.students.latent.codec import CodecShape
from latentforge.students.latent.flops import latent_inference, token_inference
from latentforge.students.latent.matching import TOLERANCE, matched_shape
from latentforge.students.latent.student import LatentShape


@pytest.mark.parametrize("draws", [1, 20, 200])
@pytest.mark.parametrize(
    ("width", "vocabulary", "like"),
    [
        (64, 320, ModelShape(2, 64, 4, 2, 96)),
        (128, 2048, ModelShape(2, 64, 2, 1, 160)),
        (1024, 128_256, ModelShape(12, 768, 12, 4, 2048)),
    ],
)
def test_the_costs_agree_within_5_percent_with_the_sampler_that_is_used(
    width: int, vocabulary: int, like: ModelShape, draws: int
) -> None:
    student = LatentShape(vocabulary, 4, 128, DecoderShape(like.layers, width, 4, 2, 3 * width), head_blocks=1)
    codec = CodecShape(vocabulary, 4, 128, width, 3 * width)
    cost = latent_inference(student, codec, positions=64, draws=draws).total
    found = matched_shape(cost, like=like, vocab_size=vocabulary, positions=256)
    real = token_inference(found.shape, vocab_size=vocabulary, positions=256).total
    assert real == found.flops
    assert found.difference == pytest.approx(real / cost - 1)
    assert abs(found.difference) <= TOLERANCE
    assert found.shape.layers == like.layers
    assert (found.shape.hidden // found.shape.heads) % 2 == 0
    if width == 64 and draws == 1:
        assert shape_of(new_model(found.shape, vocab_size=10, positions=8, eos_id=0, seed=1)) == found.shape


def test_its_own_cost_gives_a_size_back() -> None:
    like = ModelShape(2, 64, 4, 2, 160)
    cost = token_inference(like, vocab_size=320, positions=128).total
    assert matched_shape(cost, like=like, vocab_size=320, positions=128).shape == like


def test_a_cost_below_the_smallest_student_is_refused_and_the_nearest_is_named() -> None:
    with pytest.raises(RefusedError, match=r"no token-level student of 2 layers costs 1e\+04 .* the nearest, of width"):
        matched_shape(1e4, like=ModelShape(2, 64, 4, 2, 96), vocab_size=128_256, positions=128)


def test_the_size_of_a_model_is_read_from_it() -> None:
    shape = ModelShape(2, 32, 4, 2, 48)
    model = new_model(shape, vocab_size=50, positions=16, eos_id=0, seed=1)
    assert shape_of(model) == shape
    model.config.head_dim = 16
    assert shape_of(model) is None
