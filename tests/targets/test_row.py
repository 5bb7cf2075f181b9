"""Rows of format LFT2: ids exact, log-probabilities within the rounding that is promised, nonsense refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from latentforge.errors import RefusedError
from latentforge.targets import SequenceTargets, native, packing
from latentforge.targets.exact import EXACT
from latentforge.targets.integers import LARGEST, join, split
from latentforge.targets.levels import TAIL_STEP, CountLevels, GradedLevels, Levels
from latentforge.targets.row import GRADED, check_targets, pack_row, unpack_row

KEY = b"k" * 32
READERS = [packing.unpack, native.unpack]


@st.composite
def rows(draw: st.DrawFn) -> SequenceTargets:
    """Any rows that the store takes: positions of any number of entries, masses from none to all."""
    positions, k = draw(st.integers(0, 12)), draw(st.integers(1, 9))
    generator = np.random.Generator(np.random.PCG64(draw(st.integers(0, 2**32))))
    top = draw(st.sampled_from([20, 3000, 151_936, 2_000_000]))
    ids = np.array([generator.choice(top, k, replace=False) for _ in range(positions)], dtype=int).reshape(positions, k)
    scale = draw(st.sampled_from([0.01, 1.0, 40.0, 2000.0]))
    logprobs = -np.sort(generator.exponential(scale, (positions, k)), axis=1)
    counts = generator.integers(0, k + 1, positions) if draw(st.booleans()) else np.full(positions, k)
    absent = np.arange(k)[None, :] >= counts[:, None]
    ids[absent], logprobs[absent] = -1, -np.inf
    tails = {t: generator.normal(-3, 2, positions) for t in draw(st.sampled_from([(1.0,), (1.0, 2.0), (0.5,)]))}
    tails = {t: np.where(generator.random(positions) < 0.1, -np.inf, np.minimum(x, 0)) for t, x in tails.items()}
    return SequenceTargets(
        ids.astype(np.int32), logprobs.astype(np.float32), {t: x.astype(np.float32) for t, x in tails.items()}
    )


@pytest.mark.parametrize("reader", READERS, ids=["numpy", "native"])
@settings(max_examples=50)
@given(row=rows(), levels=st.sampled_from([GRADED, GradedLevels(1e-5, 1e-2), GradedLevels(0.25, 0.5)]))
def test_ids_come_back_exactly_and_numbers_within_their_rounding(
    reader: Any, row: SequenceTargets, levels: GradedLevels
) -> None:
    found = unpack_row(KEY, pack_row(KEY, row, levels=levels), temperatures=tuple(row.tails), reader=reader)
    assert np.array_equal(found.ids, row.ids)
    there = row.ids >= 0
    assert np.array_equal(np.isneginf(found.logprobs), ~there)
    with np.errstate(invalid="ignore"):
        apart, bound = np.abs(found.logprobs - row.logprobs), levels.error(row.logprobs)
    # float32 has 24 bits: of a logprob of -20 000 it keeps less than the steps do.
    assert (apart[there] <= bound[there] - row.logprobs[there] * 2.0**-22).all()
    assert not (np.diff(found.logprobs, axis=1) > 0)[there[:, 1:]].any(), "still descending"
    for t, tail in row.tails.items():
        assert np.array_equal(np.isneginf(found.tails[t]), np.isneginf(tail))
        finite = np.isfinite(tail)
        assert (np.abs(found.tails[t] - tail)[finite] <= TAIL_STEP / 2 + 1e-5).all()


@settings(max_examples=60)
@given(row=rows())
def test_rows_that_are_not_rounded_come_back_bit_for_bit(row: SequenceTargets) -> None:
    found = unpack_row(KEY, pack_row(KEY, row, levels=EXACT), temperatures=tuple(row.tails))
    assert found.ids.tobytes() == row.ids.tobytes()
    assert found.logprobs.tobytes() == row.logprobs.tobytes()
    assert {t: tail.tobytes() for t, tail in found.tails.items()} == {t: x.tobytes() for t, x in row.tails.items()}


@settings(max_examples=50)
@given(row=rows(), levels=st.sampled_from([GRADED, GradedLevels(1e-5, 1e-2)]))
def test_the_extension_reads_the_bits_that_numpy_reads(row: SequenceTargets, levels: Levels) -> None:
    value = pack_row(KEY, row, levels=levels)
    mine, theirs = (unpack_row(KEY, value, temperatures=tuple(row.tails), reader=reader) for reader in READERS)
    assert mine.ids.tobytes() == theirs.ids.tobytes()
    assert mine.logprobs.tobytes() == theirs.logprobs.tobytes()
    assert [t.tobytes() for t in mine.tails.values()] == [t.tobytes() for t in theirs.tails.values()]


@pytest.mark.parametrize("draws", [1, 50, 40_000, 65_536])
def test_every_count_of_every_number_of_draws_can_be_stored(draws: int) -> None:
    """A float32 logarithm of a count of thousands is off by thousandths of a draw."""
    counts = np.arange(1, draws + 1)[:, None]
    logprobs = np.log(counts / draws).astype(np.float32)
    _, levels = CountLevels(draws).quantise(logprobs, np.ones_like(counts, dtype=bool))
    assert np.array_equal(draws - levels, counts)


@pytest.mark.parametrize("reader", READERS, ids=["numpy", "native"])
@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), draws=st.sampled_from([1, 7, 50, 5000]), k=st.integers(1, 12))
def test_drawn_rows_come_back_with_their_exact_counts(reader: Any, seed: int, draws: int, k: int) -> None:
    generator = np.random.Generator(np.random.PCG64(seed))
    ids, counts = np.full((6, k), -1, np.int32), np.zeros((6, k))
    for position in range(6):
        drawn, found = np.unique(generator.integers(0, k, draws), return_counts=True)
        order = np.argsort(-found, kind="stable")
        ids[position, : len(drawn)], counts[position, : len(drawn)] = drawn[order], found[order]
    with np.errstate(divide="ignore"):
        logprobs = np.log(counts / draws).astype(np.float32)
    row = SequenceTargets(ids, logprobs, {1.0: np.full(6, -np.inf, np.float32)})
    check_targets(row, k=k, temperatures=(1.0,), vocab_size=k)
    found = unpack_row(KEY, pack_row(KEY, row, levels=CountLevels(draws)), temperatures=(1.0,), reader=reader)
    assert np.array_equal(found.ids, ids)
    assert np.array_equal(np.rint(np.exp(found.logprobs.astype(np.float64)) * draws), counts)


def test_a_logprob_that_no_count_gives_is_refused_among_drawn_rows() -> None:
    row = SequenceTargets(np.array([[3]], np.int32), np.array([[-0.1]], np.float32), {1.0: np.zeros(1, np.float32)})
    with pytest.raises(RefusedError, match=r"drawn 45\.24 times of 50"):
        pack_row(KEY, row, levels=CountLevels(50))


@settings(max_examples=60)
@given(values=st.lists(st.integers(0, LARGEST) | st.integers(0, 40), max_size=60), lead=st.integers(0, 9))
def test_integers_come_back_from_their_tokens_and_bits_at_any_offset(values: list[int], lead: int) -> None:
    tokens, bits = split(np.array(values, dtype=np.int64))
    packed = np.packbits(np.concatenate([np.ones(lead, bool), bits]), bitorder="little")
    found, end = join(tokens, packed, lead)
    assert found.tolist() == values
    assert end == lead + len(bits)


def a_row() -> SequenceTargets:
    generator = np.random.Generator(np.random.PCG64(5))
    logprobs = -np.sort(generator.exponential(2, (7, 5)), axis=1) - 1
    ids = np.stack([generator.permutation(500)[:5] for _ in range(7)])
    return SequenceTargets(ids.astype(np.int32), logprobs.astype(np.float32), {1.0: np.full(7, -2, np.float32)})


@pytest.mark.parametrize("wrong", ["unsorted", "twice", "gap", "half"])
def test_rows_with_absent_entries_in_the_wrong_place_or_a_token_twice_are_refused(wrong: str) -> None:
    row = a_row()
    ids, logprobs = row.ids.copy(), row.logprobs.copy()
    if wrong == "unsorted":
        logprobs[2] = logprobs[2, ::-1]
    elif wrong == "twice":
        ids[3, 4] = ids[3, 0]
    elif wrong == "gap":
        ids[1, 2], logprobs[1, 2] = -1, -np.inf
    else:
        ids[1, 4] = -1
    with pytest.raises(RefusedError):
        check_targets(SequenceTargets(ids, logprobs, {}), k=5, temperatures=(), vocab_size=500)


@pytest.mark.parametrize("reader", READERS, ids=["numpy", "native"])
def test_a_body_that_contradicts_itself_is_refused_although_its_checksum_is_right(
    reader: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = a_row()
    shape, streams, bits = packing.pack(row.ids, row.logprobs, row.tails, GRADED)
    wrong = {
        "fewer bits": (shape, streams, bits[:-3]),
        "a place that is not listed": (shape, [*streams[:2], np.full_like(streams[2], 34), streams[3]], bits),
        "too few entries": (shape, [*streams[:2], streams[2][:-1], streams[3]], bits),
        "too few falls": (shape, [*streams[:3], streams[3][:-1]], bits),
        "no scalars": (shape, [streams[0][:-2], *streams[1:]], bits),
    }
    for what, content in wrong.items():
        monkeypatch.setattr("latentforge.targets.packing.pack", lambda *_, content=content: content)
        value = pack_row(KEY, row)
        monkeypatch.undo()
        assert refusal(value, reader) is not None, what


def refusal(value: bytes, reader: Any) -> str | None:
    try:
        unpack_row(KEY, value, temperatures=(1.0,), reader=reader)
    except RefusedError as error:
        return str(error) if "contradicts itself" in str(error) else None
    return None


@pytest.mark.parametrize("levels", [GRADED, EXACT], ids=["fine", "none"])
def test_a_row_with_any_byte_changed_or_its_end_cut_off_is_refused(levels: Any) -> None:
    value = pack_row(KEY, a_row(), levels=levels)
    for at in range(len(value)):
        for wrong in (value[:at] + bytes([value[at] ^ 0x10]) + value[at + 1 :], value[:at]):
            with pytest.raises(RefusedError):
                unpack_row(KEY, wrong, temperatures=(1.0,))
