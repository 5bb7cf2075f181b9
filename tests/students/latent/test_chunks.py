"""Chunks: where rows are cut, and what of a chunk is text."""

from __future__ import annotations

import pytest
import torch

from latentforge.errors import RefusedError
from latentforge.students.latent.chunks import absorbed, chunked, valid

EOS = 9


def test_text_ends_with_the_first_eos_of_its_chunk_and_begins_anew_in_the_next() -> None:
    row = torch.tensor([1, 2, 3, 4, 5, EOS, EOS, EOS, EOS, EOS, EOS, EOS, 6, 7, 8, EOS])
    found = valid(chunked(row, 4), EOS)
    assert found.long().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


def test_a_chunk_of_one_token_has_no_padding() -> None:
    assert valid(chunked(torch.tensor([[EOS, EOS, 3]]), 1), EOS).all()


def test_rows_keep_their_order_and_a_chunk_is_never_cut() -> None:
    rows = torch.arange(24).reshape(2, 12)
    assert chunked(rows, 3).shape == (2, 4, 3)
    assert torch.equal(chunked(rows, 3).flatten(1), rows)
    with pytest.raises(RefusedError, match="rows of 12 tokens do not split into chunks of 5"):
        chunked(rows, 5)
    with pytest.raises(RefusedError, match="chunks of 0"):
        chunked(rows, 0)


def test_what_follows_an_end_is_the_end_again() -> None:
    tokens = torch.tensor([[5, EOS, 7, 8], [EOS, 1, EOS, 2], [1, 2, 3, 4]])
    assert absorbed(tokens, EOS).tolist() == [[5, EOS, EOS, EOS], [EOS] * 4, [1, 2, 3, 4]]
