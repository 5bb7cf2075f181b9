"""What the code says of itself stands in a contract, and what a contract names is there."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import get_args

import pytest

from latentforge.contracts import load_contracts
from latentforge.contracts.runner import resolve_check
from latentforge.contracts.schema import EventKind, Precondition
from latentforge.events.event import KINDS
from latentforge.spec.fields import RUN_FALSIFIERS
from latentforge.verdicts import FALSIFIER_ID

ROOT = Path(__file__).parents[2]
CONTRACTS = load_contracts()
KNOWN = {falsifier.id: falsifier for _, falsifier in CONTRACTS.falsifiers()}
PLACEHOLDER = "F-NAME-001"
"""What messages show as the form of an id."""
_ID = re.compile(rf"(?<![A-Za-z0-9-]){FALSIFIER_ID.pattern}(?![0-9])")


def ids_in(folder: Path, *patterns: str) -> dict[str, str]:
    """Each falsifier id that stands in the files of ``folder``, with the first place: ``file:line``."""
    found: dict[str, str] = {}
    for file in sorted(file for pattern in patterns for file in folder.rglob(pattern)):
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            for one in _ID.findall(line):
                found.setdefault(one, f"{file.relative_to(folder)}:{number}")
    return found


@pytest.mark.parametrize("folder", ["latentforge", "dispatch", "examples"])
def test_every_falsifier_that_the_code_names_has_a_contract(folder: str) -> None:
    named = ids_in(ROOT / folder, "*.py", "*.toml", "*.html", "*.j2")
    assert {one: where for one, where in named.items() if one not in KNOWN and one != PLACEHOLDER} == {}


def test_every_falsifier_that_a_page_names_has_a_contract() -> None:
    named = ids_in(ROOT / "docs", "*.md")
    for file in ("README.md", "CHANGELOG.md"):
        named |= dict.fromkeys(_ID.findall((ROOT / file).read_text(encoding="utf-8")), file)
    assert {one: where for one, where in named.items() if one not in KNOWN} == {}


def test_an_id_without_a_contract_would_be_found(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text('first = 1\nname = "F-PLANTED-NOWHERE-001"  # xF-X-001, F-SHORT-01, F-LONG-0001\n')
    assert ids_in(tmp_path, "*.py") == {"F-PLANTED-NOWHERE-001": "a.py:2"}


def test_what_a_run_may_be_required_to_pass_is_claimed_and_not_superseded() -> None:
    assert [one for one in RUN_FALSIFIERS if one not in KNOWN or CONTRACTS.superseded_by(one)] == []


@pytest.mark.parametrize("falsifier_id", sorted(KNOWN))
def test_its_check_is_there_beside_what_it_checks_and_takes_both_calls(falsifier_id: str) -> None:
    falsifier = KNOWN[falsifier_id]
    check = resolve_check(falsifier.function)
    module = falsifier.function.partition(":")[0]
    assert check.__module__ == module  # defined there, not lent from elsewhere
    assert module.endswith("checks")
    for arguments in (falsifier.arguments, falsifier.control_arguments):
        inspect.signature(check).bind(*([0] if isinstance(falsifier.check, Precondition) else []), **arguments)


def test_predicates_know_every_kind_of_event() -> None:
    assert set(get_args(EventKind)) == KINDS
