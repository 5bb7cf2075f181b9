"""A real vLLM goes on with texts as the same model does in this process: not the same draws, the same distribution."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from latentforge.data import ShardSet
from latentforge.errors import FailedError
from latentforge.targets.continued import absorbed, contexts
from latentforge.teachers.continuing import Continuing
from latentforge.teachers.continuing_agreement import DEVIATIONS, check_draws
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.http.openai import OpenAITeacher
from latentforge.teachers.serving.local import ServedTeacher
from latentforge.teachers.serving.server import VLLMServer

from .conftest import LENGTH

CHUNK = 6


class Rows:
    """The model here, asked for rows alone."""

    def __init__(self, teacher: HFTeacher) -> None:
        self.capabilities, self.limits, self.vocab_size = frozenset({"score"}), teacher.limits, teacher.vocab_size
        self.score = teacher.score


def one_late(ids: npt.NDArray[np.int32], row: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """What a teacher would draw that begins one token earlier: the text's own last token, and then its draws."""
    last = np.broadcast_to(row.reshape(-1, CHUNK)[:-1, -1:, None], (*ids.shape[:2], 1))
    shifted = np.concatenate([last, ids[:, :, :-1]], axis=2).astype(np.int32)
    return np.where(ids < 0, ids, shifted)


def test_draws_of_a_server_are_as_likely_under_the_model_here_as_its_own(
    vllm_server: VLLMServer, served_folder: Path, served_data: ShardSet
) -> None:
    asked = Continuing(chunk=CHUNK, count=8, temperatures=(1.0, 0.5), eos_id=served_data.eos_id, seed=7)
    rows = list(served_data.train.rows(np.arange(2)))
    client = OpenAITeacher.open(vllm_server.url, vllm_server.name, served_folder)
    own = ServedTeacher(vllm_server, client)  # not closed: it would end the server of the other tests
    drawn = dict(own.continuations(rows, asked))
    again = dict(own.continuations(rows[1:], asked))
    by_itself = check_draws(own, [(rows[number], drawn[number]) for number in drawn], asked)
    late = {t: one_late(ids, rows[0]) for t, ids in drawn[0].items()}
    with pytest.raises(FailedError, match="asked another way"):
        check_draws(own, [(rows[0], late)], asked)
    client.close()
    here = check_draws(Rows(HFTeacher.open(served_folder)), [(rows[number], drawn[number]) for number in drawn], asked)
    assert by_itself is not None
    assert here is not None
    print(f"draws of vLLM: {by_itself.worst:.2f} deviations by its own rows, {here.worst:.2f} by transformers'")
    assert max(by_itself.worst, here.worst) < DEVIATIONS
    for number, row in enumerate(rows):
        given = contexts(row, CHUNK, asked.eos_id)
        for ids in drawn[number].values():
            assert ids.shape == (LENGTH // CHUNK - 1, 8, CHUNK)
            assert (ids[given] >= 0).all()
            assert (ids[~given] == -1).all()
    for temperature in asked.temperatures:
        same = [absorbed(one[temperature], asked.eos_id) for one in (drawn[1], again[0])]
        assert np.mean(same[0] == same[1]) > 0.9, "seeds are ours; what a batch rounds may differ"
