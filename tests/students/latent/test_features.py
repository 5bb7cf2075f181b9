"""The table of features in docs/latent.md names a check for each; this holds it to the tests that there are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[2]
PAGE = (TESTS.parent / "docs" / "latent.md").read_text(encoding="utf-8").partition("## Features")[2]
NOT_MET = {17, 24, 32, 33, 36}
ELSEWHERE = {30, 31}  # prefetch and rate limits: docs/teachers.md


def named(page: str) -> set[tuple[str, str, bool]]:
    """(file below tests/, test without ``test_``, whether it is for soak) of each check that the table names."""
    return {(file, name, bool(soak)) for file, name, soak in re.findall(r"`([\w/]+\.py)::(\w+)`( \(soak\))?", page)}


def there() -> set[tuple[str, str, bool]]:
    found = set()
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                soak = any("mark.soak" in ast.unparse(mark) for mark in node.decorator_list)
                found.add((path.relative_to(TESTS).as_posix(), node.name.removeprefix("test_"), soak))
    return found


def test_every_feature_that_is_met_has_a_row() -> None:
    rows = [int(one) for numbers in re.findall(r"^\| ([\d, ]+) \|", PAGE, re.M) for one in numbers.split(",")]
    assert sorted(rows) == sorted(set(range(1, 59)) - NOT_MET - ELSEWHERE)


def test_every_check_is_a_test_that_there_is() -> None:
    assert named(PAGE) - there() == set()
    assert len(named(PAGE)) > 60


def test_a_renamed_test_would_be_missed() -> None:
    assert named(PAGE.replace("::a_cache_changes_nothing", "::a_cache_changes_little")) - there()
