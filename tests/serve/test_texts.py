"""Stop strings, whatever the pieces that a text comes in."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.serve.refusing import shown
from latentforge.serve.texts import Stops


@given(st.lists(st.text("ab", max_size=4)), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_a_text_in_pieces_is_cut_where_the_whole_one_is(pieces: list[str], stops: list[str]) -> None:
    one, found, whole = Stops(stops), [], "".join(pieces)
    for number, piece in enumerate(pieces):
        found.append(one.push(piece, last=number == len(pieces) - 1))
        # Nothing is said that is taken back later.
        assert whole.startswith("".join(found))
    # The first that is complete ends the text, at the earliest place that one of those has then.
    ends = [end for end in range(len(whole) + 1) if any(stop in whole[:end] for stop in stops)]
    if not ends:
        assert ("".join(found), one.found) == (whole, False)
        return
    assert one.found
    assert not any(stop in "".join(found) for stop in stops)
    assert any(whole[len("".join(found)) :].startswith(stop) for stop in stops)


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    one = Stops(["\n\n"])
    assert [one.push("a\n"), one.push("b\n"), one.push("\nc"), one.push("d")] == ["a", "\nb", "", ""]
    assert one.found


@pytest.mark.parametrize(
    ("value", "text"),
    [("x" * 999, "x" * 80), (list(range(999)), "a list of 999"), (10**999, "a whole number of 3319 bits"), (3, "3")],
)
def test_a_long_value_is_not_repeated_whole(value: object, text: str) -> None:
    assert text in shown(value)
    assert len(shown(value)) < 200
