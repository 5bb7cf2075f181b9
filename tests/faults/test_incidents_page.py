"""docs/incidents.md names tests; they are there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "incidents.md").read_text(encoding="utf-8")


def missing(page: str) -> list[str]:
    """Each named test that is not in the file that stands before it."""
    absent = []
    for file, names in re.findall(r"`([\w/]+\.py)`: ([^;|]+)", page):
        source = (TESTS / file).read_text(encoding="utf-8")
        absent += [f"{file}::{name}" for name in re.split(r",\s*", names.strip()) if f"def test_{name}(" not in source]
    return absent


def test_every_named_test_is_there() -> None:
    assert len(re.findall(r"^\| D\d+ \|", PAGE, re.MULTILINE)) >= 30
    assert missing(PAGE) == []


def test_a_renamed_test_would_be_missed() -> None:
    assert missing(PAGE.replace("d23_a_run_that", "d23_another_run_that")) != []
