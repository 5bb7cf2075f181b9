"""Continuations of held-out text: of the right contexts, by the right model, in whatever blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from latentforge.errors import RefusedError
from latentforge.students.latent.brier import brier_lm, sample_scores
from latentforge.students.latent.chunks import valid
from latentforge.students.latent.evaluate import continuations
from latentforge.students.latent.generate import Keys

from .conftest import EOS, VOCABULARY, untrained_model


def rows(chunk: int, count: int = 3, chunks: int = 6) -> Tensor:
    found = torch.randint(1, VOCABULARY, (count, chunks, chunk), generator=torch.Generator().manual_seed(8))
    found[1, 2, chunk // 2 :] = EOS  # a document ends there
    return found


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 8])
def test_samples_are_the_students_own_after_each_chunk(chunk: int) -> None:
    model, text, draws = untrained_model(chunk), rows(chunk), 5
    found = continuations(model, text, draws=draws, seed=77)
    ahead = -(-4 // chunk)
    assert len(found.samples) == 3 * (6 - ahead)
    for context in range(len(found.samples)):
        row, place = int(found.rows[context]), int(found.places[context])
        for number in range(draws):
            said = text[row, : place + 1]
            for step in range(ahead):
                state = model.student.states(said[None], valid(said[None], EOS))[:, -1]
                key = Keys(torch.tensor([77 + (row * 6 + place) * draws + number]), torch.tensor([place + 1 + step]))
                said = torch.cat([said, model.draw_after(state, key, 0, 1, 1.0)[0]])
            drawn = said[place + 1 :].flatten()[:4].tolist()
            if EOS in drawn:
                drawn = drawn[: drawn.index(EOS)] + [EOS] * (4 - drawn.index(EOS))
            sample = found.samples[context, number].tolist()
            known = sample.index(-1) if -1 in sample else 4  # not drawn on: it agrees with nothing
            assert known >= min(chunk, 4)
            assert sample[:known] == drawn[:known]


def test_the_text_is_what_follows_and_an_end_is_its_last_word() -> None:
    text = rows(2)
    found = continuations(untrained_model(2), text, draws=2)
    truth = {(int(r), int(p)): t.tolist() for r, p, t in zip(found.rows, found.places, found.truth, strict=True)}
    assert truth[0, 1] == text[0, 2:4].flatten().tolist()
    assert truth[1, 1] == [int(text[1, 2, 0]), EOS, EOS, EOS]
    assert truth[1, 2] == text[1, 3:5].flatten().tolist()  # the next document
    assert set(truth) == {(row, place) for row in range(3) for place in range(4)}


@pytest.mark.parametrize("chunk", [2, 4])
def test_blocks_change_nothing(chunk: int) -> None:
    model, text = untrained_model(chunk), rows(chunk, 5)
    whole = continuations(model, text, draws=4, seed=1)
    blocks = continuations(model, text, draws=4, seed=1, most_rows=8)
    order = (blocks.rows * 100 + blocks.places).argsort()
    wanted = (whole.rows * 100 + whole.places).argsort()
    assert torch.equal(blocks.samples[order], whole.samples[wanted])
    assert torch.equal(blocks.truth[order], whole.truth[wanted])


def test_an_untrained_student_scores_nothing() -> None:
    found = continuations(untrained_model(4), rows(4, 8, 10), draws=4)
    assert brier_lm(sample_scores(found.samples, found.truth), groups=found.rows).value == 0


def test_rows_that_hold_no_context_are_refused() -> None:
    with pytest.raises(RefusedError, match="rows of 1 chunks of 4"):
        continuations(untrained_model(4), rows(4)[:, :1], draws=2)
    with pytest.raises(RefusedError, match=r"chunks are \[3, 6, 2\], not \[B, C, 4\]"):
        continuations(untrained_model(4), rows(2), draws=2)
