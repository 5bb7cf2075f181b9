"""Faults of contract files: what the loader must refuse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from latentforge.contracts import load_contracts

from .frame import mutant, refused

GOOD = """\
contract: planted
version: 1
title: a planted contract
description: planted
references: ["a paper, section 2"]
depends_on: []
supersedes: []
scope: {arch: any, device: any, profile: any}
falsifiers:
  - id: F-PLANTED-001
    statement: one is one
    prediction: difference 0
    check: latentforge.contracts.checks:planted
    with: {}
    control: {name: two, with: {mutant: two}}
    if_fails: arithmetic is broken
"""
OTHER = GOOD.replace("contract: planted", "contract: other").replace("F-PLANTED", "F-OTHER")
LOADER = "the loader of contracts, with file and line"


def _text(name: str, right: str, wrong: str, *, how: str) -> None:
    """A mutant that is one replacement in the text of a contract."""
    assert GOOD.count(right) == 1, right

    @mutant("contracts", name, how=how, by=LOADER)
    def _(folder: Path, planted: bool) -> str | None:
        (folder / "planted.yaml").write_text(GOOD.replace(right, wrong) if planted else GOOD)
        return refused(lambda: load_contracts(folder))


_text("misspelt key", "prediction:", "perdiction:", how="`perdiction` in place of `prediction`")
_text("near-miss key", "depends_on:", "depends-on:", how="`depends-on` in place of `depends_on`")
_text("near-miss key inside a control", "name: two", "nmae: two", how="`nmae` in place of `name`")
_text("duplicate key", "version: 1\n", "version: 1\nversion: 2\n", how="a second `version`, which YAML would let win")
_text("unknown key", "version: 1\n", "version: 1\nstatus: DISCHARGED\n", how="`status: DISCHARGED`, as prose")
_text("missing check", "    check: latentforge.contracts.checks:planted\n", "", how="a falsifier without its check")
_text("check outside the project", "latentforge.contracts.checks:planted", "os:getcwd", how="`os:getcwd` as a check")
_text(
    "missing control",
    "    control: {name: two, with: {mutant: two}}\n",
    "",
    how="a falsifier without a planted control",
)
_text("control that plants nothing", "with: {mutant: two}}", "with: {}}", how="a control without arguments")
_text(
    "control with the check's own arguments",
    "with: {}\n",
    "with: {mutant: two}\n",
    how="the check is called with what its control plants",
)
_text("no reference", 'references: ["a paper, section 2"]', "references: []", how="an empty list of references")
_text("prediction left empty", "difference 0", '" "', how="a prediction of blanks")
_text("unknown dependency", "depends_on: []", "depends_on: [absent]", how="`depends_on` names no contract")
_text("depends on itself", "depends_on: []", "depends_on: [planted]", how="a contract that depends on itself")
_text("supersedes itself", "supersedes: []", "supersedes: [F-PLANTED-001]", how="a contract that retires its own claim")
_text(
    "supersedes a claim that is not there",
    "supersedes: []",
    "supersedes: [F-OTHR-001]",
    how="a misspelt id, with which the old claim goes on to count",
)
_text("scope that is none", "device: any", "device: gpu", how="`device: gpu` in place of `cuda`")
_text("version as text", "version: 1", 'version: "1"', how='`version: "1"`')
_text("contract under another name", "contract: planted", "contract: plantd", how="a name unlike that of its file")


def _pair(name: str, change: Callable[[str], str], *, how: str) -> None:
    """A mutant of the second of two contracts; ``change`` also sees the first one's names."""

    @mutant("contracts", name, how=how, by=LOADER)
    def _(folder: Path, planted: bool) -> str | None:
        first = GOOD.replace("depends_on: []", "depends_on: [other]")
        (folder / "planted.yaml").write_text(first.replace("supersedes: []", "supersedes: [F-THIRD-001]"))
        (folder / "third.yaml").write_text(OTHER.replace("other", "third").replace("F-OTHER", "F-THIRD"))
        (folder / "other.yaml").write_text(change(OTHER) if planted else OTHER)
        return refused(lambda: load_contracts(folder))


_pair("duplicate falsifier id", lambda text: text.replace("F-OTHER", "F-PLANTED"), how="one id in two files")
_pair(
    "circle of dependencies",
    lambda text: text.replace("depends_on: []", "depends_on: [planted]"),
    how="two contracts that depend on each other",
)
_pair(
    "superseded twice",
    lambda text: text.replace("supersedes: []", "supersedes: [F-THIRD-001]"),
    how="two contracts that each replace the same claim",
)


@mutant("contracts", "circle of supersession", how="two contracts that retire each other: nothing is left", by=LOADER)
def _(folder: Path, planted: bool) -> str | None:
    (folder / "planted.yaml").write_text(GOOD.replace("supersedes: []", "supersedes: [F-OTHER-001]"))
    (folder / "other.yaml").write_text(
        OTHER.replace("supersedes: []", "supersedes: [F-PLANTED-001]") if planted else OTHER
    )
    return refused(lambda: load_contracts(folder))
