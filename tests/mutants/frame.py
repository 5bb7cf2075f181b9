"""What a mutant is: a fault planted into the product, what must catch it, and the table of all of them.

A mutant is a function ``(folder, planted) -> what caught it, in one line, or None``. It does the same work twice: with
``planted`` False it must not be caught (a net that catches everything shows nothing), with ``planted`` True it must.
``folder`` is an empty folder of its own. ::

    @mutant("contracts", "misspelt key", how="'perdiction' in place of 'prediction'", by="the loader, with the line")
    def _(folder: Path, planted: bool) -> str | None:
        ...

A module of mutants stands in this folder as ``*_mutants.py`` and is found by its name. A fault that nothing catches yet
is declared with ``survives="why"``: the test then holds that it is really not caught, and the table lists it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from latentforge.contracts import Finding

Planted = Callable[[Path, bool], str | None]
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Mutant:
    """One planted fault. ``by`` names what must catch it: a falsifier's id, or a part of the product."""

    area: str
    name: str
    how: str
    by: str
    run: Planted
    survives: str | None = None

    def __str__(self) -> str:
        return f"{self.area}/{self.name}"


_ALL: dict[tuple[str, str], Mutant] = {}


def mutant(area: str, name: str, *, how: str, by: str, survives: str | None = None) -> Callable[[Planted], Planted]:
    """Enter the decorated function as a mutant; ValueError for a second one of that area and name."""

    def enter(run: Planted) -> Planted:
        if (area, name) in _ALL:
            raise ValueError(f"there are two mutants {area}/{name}")
        _ALL[area, name] = Mutant(area, name, how, by, run, survives)
        return run

    return enter


def mutants() -> list[Mutant]:
    """Every mutant of every ``*_mutants.py`` of this folder, by area, in the order in which they are written."""
    for file in sorted(HERE.glob("*_mutants.py")):
        importlib.import_module(f"{__package__}.{file.stem}")
    return sorted(_ALL.values(), key=lambda one: one.area)


def refused(call: Callable[[], object]) -> str | None:
    """The refusal that a call ends with, in one line; None where it is accepted."""
    from latentforge.errors import LatentForgeError

    try:
        call()
    except LatentForgeError as error:
        return " ".join(str(error).split())
    return None


@functools.cache
def claim(falsifier: str) -> Callable[[], Finding]:
    """The check of a falsifier as its contract calls it, so that what catches a mutant is what is named."""
    from latentforge.contracts import load_contracts
    from latentforge.contracts.runner import resolve_check

    (found,) = (one for _, one in load_contracts().falsifiers() if one.id == falsifier)
    return functools.partial(resolve_check(found.function), **found.arguments)


@functools.cache
def untouched(falsifier: str) -> Finding:
    """What it says where nothing is planted, found out once a process; it must be a pass."""
    found = claim(falsifier)()
    assert found.passed is True, found.text
    return found


def table(found: list[tuple[Mutant, str | None]]) -> Iterator[str]:
    """The lines of docs/mutants.md: each mutant with what caught it, then the survivors."""
    caught = [one for one, said in found if said is not None]
    yield "# Mutants"
    yield ""
    yield "Faults that were planted into the product, one at a time, and what caught each. `python -m tests.mutants`"
    yield "plants all of them and prints this page; `tests/mutants` is its source, and `make test` plants each again."
    yield "The same work without the fault is seen to be caught by nothing."
    yield ""
    yield f"{len(found)} mutants: {len(caught)} caught, {len(found) - len(caught)} survive."
    for area in dict.fromkeys(one.area for one, _ in found):
        yield ""
        yield f"## {area.capitalize()}"
        yield ""
        yield "| mutant | planted | must be caught by |"
        yield "|---|---|---|"
        for one, said in found:
            if one.area == area:
                net = one.by if said is not None else "**nothing**"
                yield f"| {one.name} | {_cell(one.how)} | {_cell(net)} |"
    yield ""
    yield "## Survivors"
    yield ""
    survivors = [(one, one.survives) for one, said in found if said is None]
    if not survivors:
        yield "None."
    for one, why in survivors:
        yield f"- {one.area}, {one.name}: {why or 'it should have been caught'}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
