"""Faults of a student that is to be published: its evidence is sound, for it was written of what is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from latentforge.promotion import checks
from latentforge.promotion.gate import PRODUCT, look
from latentforge.promotion.publish import publish, read_published
from latentforge.train.rehearsal import tiny_run

from .frame import mutant, refused


def _student(folder: Path, fault: Callable[[Path], object] | None, *, frozen: bool = False) -> Path:
    copy = checks.copy_of(tiny_run(frozen=frozen).path, folder)
    if fault is not None:
        fault(copy)
    return checks.with_evidence(copy)


def _broken(name: str, fault: Callable[[Path], object], by: str, *, how: str) -> None:
    """A mutant that the condition ``by`` must hold back."""

    @mutant("promotion", name, how=how, by=f"`promote`, condition {by}")
    def _(folder: Path, planted: bool) -> str | None:
        unmet = look(_student(folder, fault if planted else None), smoke=True).unmet
        found = [one.text for one in unmet if one.name == by]
        assert bool(found) == bool(unmet), unmet
        return " ".join(found[0].split()) if found else None


def _events(kind: str, **changed: object) -> Callable[[Path], None]:
    def plant(run: Path) -> None:
        lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
        lines = [{**line, **changed} if line["kind"] == kind else line for line in lines]
        (run / "events.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    return plant


def _pickle(run: Path) -> None:
    (run / PRODUCT / "pytorch_model.bin").write_bytes(b"\x80\x04.")


_broken("weights of zeros", checks.zeros, "weights", how="every number of the saved student is 0")
_broken("weights that nobody trained", checks.drawn_anew, "writes", how="the saved student is as before its first step")
_broken("a file of 200 bytes", checks.cut_short, "weights", how="the weights end after 200 bytes")
_broken("a pickle beside the weights", _pickle, "weights", how="pytorch_model.bin is put into the folder")
_broken(
    "a checkpoint of which nothing moved",
    _events("checkpoint", moved=0),
    "F-ARTEFACT-MOVED-001",
    how="the trainer said that no tensor moved; the verdict says pass",
)
_broken(
    "a learning rate that nobody asked for",
    _events("step", learning_rate=1e-9),
    "F-EFFECTIVE-LR-001",
    how="the steps in the events had another one; the verdict says pass",
)
_broken("one row a step", _events("step", rows=1), "F-BATCH-ROWS-001", how="each step trained a single row")


@mutant(
    "promotion",
    "unchanged tensors",
    how="a student that was frozen while it was trained",
    by="`promote`, condition F-ARTEFACT-MOVED-001",
)
def _(folder: Path, planted: bool) -> str | None:
    unmet = look(_student(folder, None, frozen=planted), smoke=True).unmet
    found = [one.text for one in unmet if one.name == "F-ARTEFACT-MOVED-001"]
    assert bool(found) == bool(unmet), unmet
    return found[0] if found else None


@mutant("promotion", "another file in place of a published one", how="config.json rewritten", by="`promote`, again")
def _(folder: Path, planted: bool) -> str | None:
    there = publish(look(_student(folder, None), smoke=True), folder / "published")
    if planted:
        (there / "config.json").write_text("{}")
    return refused(lambda: read_published(there))


@mutant("promotion", "another run under the same name", how="a place that holds another file", by="`promote`")
def _(folder: Path, planted: bool) -> str | None:
    gate, there = look(_student(folder, None), smoke=True), folder / "published"
    if planted:
        there.mkdir()
        (there / "notes.txt").write_text("mine")
    return refused(lambda: publish(gate, there))
