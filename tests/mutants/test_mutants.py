"""Each planted fault is caught, the same work without it is not, and docs/mutants.md lists all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from .frame import Mutant, mutants, refused, table

ALL = mutants()
PAGE = Path(__file__).parents[2] / "docs" / "mutants.md"


@pytest.mark.parametrize("one", ALL, ids=str)
def test_it_is_caught_when_it_is_planted_and_not_before(one: Mutant, tmp_path: Path) -> None:
    for planted in (False, True):
        folder = tmp_path / str(planted)
        folder.mkdir()
        said = one.run(folder, planted)
        if planted and one.survives is None:
            assert said, f"{one} survives: {one.by} says nothing"
            assert "\n" not in said
        else:
            assert said is None, f"{one}: {said}"


def test_the_page_of_mutants_is_what_the_command_prints() -> None:
    found = [(one, "caught" if one.survives is None else None) for one in ALL]
    assert PAGE.read_text() == "\n".join(table(found)) + "\n", "python -m tests.mutants > docs/mutants.md"


def test_a_survivor_is_listed_with_its_reason_and_counted() -> None:
    one = Mutant("area", "name", "how", "a net", lambda folder, planted: None)
    page = "\n".join(table([(one, None)]))
    assert "1 mutants: 0 caught, 1 survive." in page
    assert "| name | how | **nothing** |" in page
    assert "- area, name: it should have been caught" in page


def test_only_a_refusal_counts_as_one() -> None:
    assert refused(lambda: None) is None
    with pytest.raises(ZeroDivisionError):
        refused(lambda: 1 / 0)
