"""docs/faults.md says which test injects which fault; this holds it to the marks in the tests."""

from __future__ import annotations

import ast
import re
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
PAGE = (TESTS.parent / "docs" / "faults.md").read_text(encoding="utf-8")
ROWS = range(1, 47)


def marked() -> set[tuple[int, str, str]]:
    """(row, file below tests/faults, function without ``test_``) of every mark, on functions and on whole modules."""
    found = set()
    for path in sorted(TESTS.rglob("test_*.py")):
        module = ast.parse(path.read_text(encoding="utf-8"))
        of_all = [row for node in module.body if isinstance(node, ast.Assign) for row in rows_in(ast.unparse(node))]
        for node in module.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                name = str(path.relative_to(TESTS)).removeprefix("faults/")
                for row in [*of_all, *(row for mark in node.decorator_list for row in rows_in(ast.unparse(mark)))]:
                    found.add((row, name, node.name.removeprefix("test_")))
    return found


def rows_in(source: str) -> list[int]:
    return [int(row) for row in re.findall(r"mark\.fault\(row=(\d+)\)", source)]


def told(page: str) -> set[tuple[int, str, str]]:
    """The same, as the page's table says it."""
    found = set()
    for line in page.splitlines():
        if head := re.match(r"\| (\d+) \|", line):
            for file, names in re.findall(r"`([\w/]+\.py)`: ([^;|]+)", line):
                for name in names.split(","):
                    found.add((int(head[1]), file, name.strip().removesuffix(" (soak)")))
    return found


def test_every_row_is_injected_by_a_test() -> None:
    assert {row for row, _file, _name in marked()} == set(ROWS)


def test_the_page_names_the_tests_that_are_marked_and_no_others() -> None:
    assert told(PAGE) == marked()


def test_a_renamed_test_would_be_missed() -> None:
    assert told(PAGE.replace("thirty_dispatchers_of_one_plan_start_it_once", "thirty_dispatchers")) != marked()
