"""What a codec makes of text and of continuations: targets of the right rows, with nothing read that is not there."""

from __future__ import annotations

import pytest
import torch

from latentforge.errors import RefusedError
from latentforge.students.latent.backbone import DecoderShape
from latentforge.students.latent.chunks import valid
from latentforge.students.latent.codec import CodecShape, new_codec
from latentforge.students.latent.energy import EnergySettings
from latentforge.students.latent.signals import continuation_signal, text_signal
from latentforge.students.latent.student import LatentShape, LatentStudent

VOCAB, EOS, CHUNK, LATENT = 30, 0, 4, 8
CODEC = new_codec(CodecShape(VOCAB, CHUNK, LATENT, 16, 24), seed=1).requires_grad_(False).eval()


def text(rows: int = 3, count: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Chunks, one of which ends a text in its midst, and of one row the last two are padding alone."""
    chunks = torch.randint(1, VOCAB, (rows, count, CHUNK), generator=torch.Generator().manual_seed(2))
    chunks[0, 2, 1:] = EOS
    holds = valid(chunks, EOS)
    holds[1, 3:] = False
    return chunks, holds


def test_the_target_of_a_state_is_the_chunk_after_it() -> None:
    chunks, holds = text()
    signal = text_signal(CODEC, chunks, holds, denominator=10.0)
    assert signal.given.tolist() == [[True] * 4, [True, True, False, False], [True] * 4]
    for row, place in ((0, 0), (0, 1), (1, 1), (2, 3)):
        alone = CODEC.encode(chunks[row, place + 1][None], holds[row, place + 1][None])
        assert torch.allclose(signal.mean[row, place], alone.mean, atol=1e-6)
        assert torch.allclose(signal.log_std[row, place], alone.log_std, atol=1e-6)
    assert not signal.mean[1, 2:].any()


def test_what_stands_in_padding_changes_no_bit() -> None:
    chunks, holds = text()
    signal = text_signal(CODEC, chunks, holds, denominator=10.0)
    other = text_signal(CODEC, chunks.masked_fill(~holds, 17), holds, denominator=10.0)
    assert torch.equal(signal.mean, other.mean)


def test_continuations_are_encoded_each_by_itself_and_reach_the_loss() -> None:
    chunks, holds = text()
    drawn = torch.randint(1, VOCAB, (3, 4, 2, CHUNK), generator=torch.Generator().manual_seed(3))
    drawn[0, 0, 1, 2:] = EOS
    given = torch.tensor([[True, False, True, True], [True, False, False, False], [False] * 4])
    signal = continuation_signal(
        CODEC, drawn, valid(drawn, EOS), given=given, denominator=4.0, weight=0.5, temperature=torch.full((3, 4), 0.5)
    )
    alone = CODEC.encode(drawn[0, 0, 1][None], valid(drawn[0, 0, 1], EOS)[None])
    assert torch.allclose(signal.mean[0, 0, 1], alone.mean[0], atol=1e-6)
    shape = LatentShape(VOCAB, CHUNK, LATENT, DecoderShape(1, 16, 2, 1, 16), head_blocks=1, noise=4, tempered=True)
    student = LatentStudent.new(shape, seed=1, energy=EnergySettings(draws=2, samples=4))
    found = student(chunks, holds, torch.arange(3), energy={"tempered": signal})
    found.loss.backward()
    assert found.rows == {"tempered": 4}
    assert float(found.loss.detach()) == pytest.approx(0.5 * float(found.energy["tempered"]))


def test_a_given_continuation_without_a_token_is_refused() -> None:
    drawn = torch.ones(1, 2, 3, CHUNK, dtype=torch.int64)
    holds = torch.ones_like(drawn, dtype=torch.bool)
    holds[0, 1, 2] = False
    with pytest.raises(RefusedError, match="1 of the given continuations hold no token"):
        continuation_signal(CODEC, drawn, holds, given=torch.ones(1, 2, dtype=torch.bool), denominator=2.0)


def test_continuations_of_another_form_are_refused() -> None:
    drawn = torch.ones(1, 2, CHUNK, dtype=torch.int64)
    with pytest.raises(RefusedError, match=r"continuations \[1, 2, 4\]"):
        continuation_signal(CODEC, drawn, drawn > 0, given=drawn[:, :, 0] > 0, denominator=2.0)
