"""Faults of predicates over events, and of runs on which they are judged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from latentforge.contracts import check_run, load_contracts, overall
from latentforge.events import Event
from latentforge.verdicts import ExitCode

from .frame import mutant, refused

PREDICATE = """\
contract: planted
version: 1
title: a planted contract
description: planted
references: [none]
falsifiers:
  - id: F-PLANTED-001
    statement: each step trains rows
    prediction: rows > 0 in every step
    check:
      events: latentforge.contracts.checks:events
      of: [distill]
      kind: step
      quantifier: every
      field: rows
      comparison: ">"
      value: 0
    control: {name: a step of no row, change: {rows: 0}}
    if_fails: nothing is trained
"""
STEPS = [Event(seq, 1.0, "", "distill-" + "a" * 20, "step", {"rows": 4}) for seq in range(3)]


def _predicate(name: str, right: str, wrong: str, *, how: str, by: str = "the judge of predicates: not a pass") -> None:
    assert PREDICATE.count(right) == 1, right

    @mutant("predicates", name, how=how, by=by)
    def _(folder: Path, planted: bool) -> str | None:
        (folder / "planted.yaml").write_text(PREDICATE.replace(right, wrong) if planted else PREDICATE)
        said = refused(lambda: load_contracts(folder))
        if said is not None:
            return said
        results = check_run(load_contracts(folder), STEPS, kind="distill")
        return None if overall(results) is ExitCode.PASS else results[0].verdict.line()


def _run(name: str, told: Callable[[list[Event]], list[Event]], *, how: str) -> None:
    @mutant("predicates", name, how=how, by="the judge of predicates: not a pass")
    def _(folder: Path, planted: bool) -> str | None:
        (folder / "planted.yaml").write_text(PREDICATE)
        results = check_run(load_contracts(folder), told(STEPS) if planted else STEPS, kind="distill")
        return None if overall(results) is ExitCode.PASS else results[0].verdict.line()


_predicate("misspelt field", "field: rows", "field: row", how="a field that no event has")
_predicate("event that is never written", "kind: step", "kind: compile", how="of nothing every claim would hold")
_predicate(
    "count of zero over nothing",
    "kind: step\n      quantifier: every",
    "kind: warning\n      quantifier: none",
    how="`none` over a kind of event that the run never writes",
)
_predicate("control that changes nothing", "change: {rows: 0}", "change: {rows: 4}", how="the planted value passes")
_predicate("control beside the point", "change: {rows: 0}", "change: {loss: 0}", how="another field is planted")
_predicate(
    "two sides at once",
    "      value: 0\n",
    "      value: 0\n      other: denominator\n",
    how="`value` and `other`, of which one would be forgotten",
    by="the loader of contracts, with file and line",
)
_run("no events at all", lambda events: [], how="a run without a log")
_run(
    "field renamed by the trainer",
    lambda events: [Event(e.seq, e.t, e.wall, e.run, e.kind, {"trained_rows": 4}) for e in events],
    how="the trainer writes another word",
)
_run(
    "number written as text",
    lambda events: [Event(e.seq, e.t, e.wall, e.run, e.kind, {"rows": "4"}) for e in events],
    how='`"4"` in place of `4`',
)
