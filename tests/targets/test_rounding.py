"""A store that rounds nothing, and what a store refuses to be made for or to hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from latentforge.errors import RefusedError
from latentforge.targets import SequenceTargets, TargetStore

IDENTITY = {"model": "M", "sha256": "ab" * 32}
TOKENS = np.array([3, 1, 2])


def row(*, tail: float = np.log(0.25)) -> SequenceTargets:
    ids = np.array([[5, 7], [9, -1]], np.int32)
    logprobs = np.log(np.array([[0.5, 0.25], [0.75, 0.0]], np.float32))
    return SequenceTargets(ids, logprobs, {1.0: np.full(2, tail, np.float32)})


def drawn(*, tail: float = -np.inf) -> SequenceTargets:
    ids, counts = np.array([[5, 7], [9, -1]], np.int32), np.array([[5, 2], [7, 0]])
    return SequenceTargets(ids, np.log(counts / 7).astype(np.float32), {1.0: np.full(2, tail, np.float32)})


@pytest.mark.filterwarnings("ignore:divide by zero")
def test_a_store_that_rounds_nothing_says_so_is_keyed_by_it_and_gives_every_bit(tmp_path: Path) -> None:
    made = {"identity": IDENTITY, "k": 2, "temperatures": [1.0], "vocab_size": 20}
    with TargetStore.create(tmp_path / "none.sqlite", **made, rounding="none") as store:
        store.put(TOKENS, row())
        stats = store.stats()
        key = store.key(TOKENS)
    assert (stats["rounding"], stats["steps_nats"], stats["reader"]) == ("none", None, "numpy")
    with TargetStore.open(tmp_path / "none.sqlite", rounding="none") as store:
        assert store.get(TOKENS).logprobs.tobytes() == row().logprobs.tobytes()
        assert store.get(TOKENS).tails[1.0].tobytes() == row().tails[1.0].tobytes()
    with TargetStore.create(tmp_path / "fine.sqlite", **made) as store:
        assert store.key(TOKENS) != key
        store.put(TOKENS, row())
        assert store.get(TOKENS).tails[1.0].tobytes() != row().tails[1.0].tobytes(), "the control"
    with pytest.raises(RefusedError, match="made for rounding 'none', not for 'fine'"):
        TargetStore.open(tmp_path / "none.sqlite", rounding="fine")


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize("rounding", ["fine", "none"])
def test_drawn_rows_are_whole_draws_and_have_nothing_outside(tmp_path: Path, rounding: str) -> None:
    made = {"mode": "sample", "draws": 7, "seed": 1, "vocab_size": 20, "rounding": rounding}
    with TargetStore.create(tmp_path / "t.sqlite", IDENTITY, 2, [1.0], **made) as store:
        with pytest.raises(RefusedError, match="nothing lies outside"):
            store.put(TOKENS, drawn(tail=-20.0))
        store.put(TOKENS, drawn())
        assert np.allclose(store.get(TOKENS).logprobs, drawn().logprobs, atol=1e-6)


def test_a_sequence_of_one_token_takes_no_part_in_the_mean_mass(tmp_path: Path) -> None:
    nothing = SequenceTargets(np.zeros((0, 2), np.int32), np.zeros((0, 2), np.float32), {1.0: np.zeros(0, np.float32)})
    with TargetStore.create(tmp_path / "t.sqlite", IDENTITY, 2, [1.0], vocab_size=20) as store:
        store.put(np.array([4]), nothing)
        assert store.stats()["tail_mass"] == {"1": None}
        assert store.get(np.array([4])).ids.shape == (0, 2)


def test_an_identity_that_is_not_json_is_refused(tmp_path: Path) -> None:
    for wrong in ({"model": Path("x")}, {"model": float("nan")}):
        with pytest.raises(RefusedError, match="identity is not JSON"):
            TargetStore.create(tmp_path / "t.sqlite", wrong, 2, [1.0], vocab_size=20)
    assert list(tmp_path.iterdir()) == []
