"""What a step of the student hands to the next one: tokens, and nothing of the latent that they were decoded from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from latentforge.students.latent.backbone import DecoderShape
from latentforge.students.latent.codec import Codec, CodecShape, new_codec
from latentforge.students.latent.generate import Request, generate
from latentforge.students.latent.session import LatentModel
from latentforge.students.latent.student import LatentShape, LatentStudent


def model() -> LatentModel:
    """Random weights, spread so that what is drawn depends on what was."""
    shape = LatentShape(40, 4, 6, DecoderShape(2, 32, 4, 2, 48), head_blocks=1, noise=8)
    student, codec = LatentStudent.new(shape, seed=3), new_codec(CodecShape(40, 4, 6, 16, 24), seed=4)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for weight in (student.table.weight, student.head.to_latent.weight):
            weight.normal_(generator=generator)
        for weight in student.head.blocks.parameters():
            weight.mul_(4)
        for weight in (codec.embedding.weight, codec.decoder_in.weight, codec.decoder_split.weight):
            weight.normal_(std=0.5, generator=generator)
        codec.embedding.weight[0] *= 0.3
    return LatentModel(student, codec, eos_id=0)


@pytest.mark.parametrize("spoilt", ["latent", "tokens"])
def test_noise_in_place_of_a_latent_changes_nothing_once_it_is_decoded(
    spoilt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a control the tokens are changed instead: those do matter."""
    request = Request(tuple(range(1, 9)), 40, seed=2)
    wanted = generate(model(), [request])[0].tokens
    decode, steps = Codec.decode, []

    def spoiling(self: Codec, latents: Tensor, **words: Any) -> Tensor:
        found = decode(self, latents, **words)
        steps.append(len(latents))
        if spoilt == "latent":
            latents.normal_()
        else:
            found = 1 + found % 39
        return found

    monkeypatch.setattr(Codec, "decode", spoiling)
    assert (generate(model(), [request])[0].tokens == wanted) == (spoilt == "latent")
    assert len(steps) > 3
    assert len(set(wanted)) > 5
