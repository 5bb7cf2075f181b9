"""What a module carries is read from the lister's words, recorded with nvcc 13.0 for each target (``listings/``)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.kernels.guard.embedded import Embedded, accept, newest_ptx, parse_listing

LISTINGS = Path(__file__).parent / "listings"
GB10 = (12, 1)
DRIVER = (13, 0)

ON_GB10: list[tuple[str, tuple[str, ...], str | None]] = [
    ("sm_121", ("121",), None),
    ("sm_121a", ("121a",), None),
    ("sm_120f", ("120",), None),  # a family target shows as the plain one
    ("sm_121f", ("121",), None),
    ("sm_120a", ("120a",), "no_cubin"),
    ("sm_90", ("90",), "no_cubin"),
    ("four_architectures", ("89", "90", "120", "121"), None),
    ("sm_121_and_ptx", ("121",), None),
    ("ptx_only", (), "no_cubin"),
]


@pytest.mark.parametrize(("name", "code", "reason"), ON_GB10, ids=[row[0] for row in ON_GB10])
def test_a_listing_is_accepted_or_refused_for_gb10(name: str, code: tuple[str, ...], reason: str | None) -> None:
    found = parse_listing((LISTINGS / f"{name}.txt").read_text())
    assert found.code == code
    answer = accept(found, GB10, DRIVER)
    assert answer.reason == reason, answer
    assert "sm_1" in answer.detail


def test_ptx_newer_than_the_driver_is_told_from_ptx_that_is_only_slow() -> None:
    found = parse_listing((LISTINGS / "ptx_only.txt").read_text(), (LISTINGS / "ptx_only.dump").read_text())
    assert (found.ptx, found.ptx_version) == (("120",), (9, 0))
    assert accept(found, GB10, (12, 9)).reason == "ptx_too_new"
    assert "9.0" in accept(found, GB10, (12, 9)).detail
    assert accept(found, GB10, (13, 0)).reason == "no_cubin"
    # Not known is not too new.
    assert accept(found, GB10, None).reason == "no_cubin"
    assert newest_ptx((99, 0)) is None
    assert newest_ptx((11, 0)) is None


@pytest.mark.parametrize("listing", ["", "\n", "cuobjdump info: File 'x.so' does not contain device code", "ELF file"])
def test_a_listing_of_nothing_is_refused(listing: str) -> None:
    assert parse_listing(listing) == Embedded((), ())
    assert accept(parse_listing(listing), GB10, DRIVER).reason == "no_cubin"


@given(st.text())
def test_no_text_makes_the_parser_fail(text: str) -> None:
    parse_listing(text, text)


RUNS = [
    ("121", (12, 1), True),
    ("120", (12, 1), True),
    ("121", (12, 0), False),
    ("121a", (12, 0), False),
    ("121a", (12, 1), True),
    ("120a", (12, 0), True),
    ("100", (12, 1), False),
    ("103a", (12, 1), False),
    ("110", (12, 1), False),
    ("89", (8, 9), True),
    ("80", (8, 9), True),
    ("89", (9, 0), False),
    ("90a", (9, 0), True),
    ("90", (12, 1), False),
]


@pytest.mark.parametrize(("arch", "capability", "runs"), RUNS)
def test_code_runs_on_its_major_and_a_letter_on_its_own(arch: str, capability: tuple[int, int], runs: bool) -> None:
    assert (accept(Embedded((arch,), ()), capability, DRIVER).reason is None) is runs
