"""Executable checks of the promotion contract, on a small student that is broken for them, with its evidence sound."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from latentforge.contracts.finding import Finding
from latentforge.promotion.gate import PRODUCT, look

WEIGHTS = f"{PRODUCT}/model.safetensors"


def with_evidence(run: Path) -> Path:
    """The run with the evidence that it would have had, had it left what lies there now and ended well."""
    (run / "exit.json").write_text(json.dumps({"code": 0, "signal": None, "outcome": "pass"}))
    return seal(run)


def seal(run: Path) -> Path:
    """Write the evidence of what lies there, over what was written before."""
    from latentforge.evidence.ledger import LEDGER
    from latentforge.evidence.manifest import record
    from latentforge.evidence.statement import MANIFEST, build_statement
    from latentforge.spec.run import RunDir
    from latentforge.train.inprocess import record_artifacts

    for path in (run / MANIFEST, run.parent / LEDGER, run / "artifacts.json"):
        path.unlink(missing_ok=True)
    record_artifacts(RunDir(run))
    record(run, build_statement(run, plan="0" * 64, host={"hostname": "here"}, dispatched={}, environ={}))
    return run


def zeros(run: Path) -> None:
    """Weights of zeros: a model that knows nothing, in a file of the right size."""
    tensors = {name: torch.zeros_like(value) for name, value in load_file(run / WEIGHTS).items()}
    save_file(tensors, run / WEIGHTS, metadata={"format": "pt"})


def drawn_anew(run: Path) -> None:
    """Weights as they are before the first step: matrices drawn at random, norms of ones."""
    generator = torch.Generator().manual_seed(1)
    with safe_open(run / WEIGHTS, framework="pt") as stored:
        metadata = stored.metadata()
    drawn = {
        name: torch.randn(value.shape, generator=generator) * 0.02 if value.ndim > 1 else torch.ones_like(value)
        for name, value in load_file(run / WEIGHTS).items()
    }
    save_file(drawn, run / WEIGHTS, metadata=metadata)


def cut_short(run: Path) -> None:
    """A file of 200 bytes."""
    (run / WEIGHTS).write_bytes((run / WEIGHTS).read_bytes()[:200])


def broken_students_are_refused(*, mutant: str | None = None) -> Finding:
    """A student that is as it was trained may be promoted; each broken one, with sound evidence of its own, may not.

    Mutant ``evidence_alone``: a gate that asks for nothing but evidence that verifies.
    """
    from latentforge.train.rehearsal import tiny_run

    if mutant not in (None, "evidence_alone"):
        raise ValueError(f"unknown mutant {mutant!r}")
    trained = tiny_run().path
    faults: dict[str, tuple[Path, Callable[[Path], None]]] = {
        **{fault.__name__: (trained, fault) for fault in (zeros, drawn_anew, cut_short)},
        "frozen": (tiny_run(frozen=True).path, lambda run: None),
    }
    with tempfile.TemporaryDirectory() as folder:
        held_back = [one.name for one in look(with_evidence(copy_of(trained, Path(folder))), smoke=True).unmet]
        if held_back:
            return Finding(False, f"a sound student is held back by {', '.join(held_back)}", {"sound": held_back})
        promoted = []
        for name, (source, fault) in faults.items():
            run = copy_of(source, Path(folder) / name)
            fault(run)
            unmet = look(with_evidence(run), smoke=True).unmet
            if not [one for one in unmet if mutant is None or one.name == "evidence"]:
                promoted.append(name)
    told = f"; promoted: {', '.join(promoted)}" if promoted else ""
    refused = len(faults) - len(promoted)
    measured = {"refused": refused, "broken": len(faults), "promoted": promoted}
    return Finding(not promoted, f"{refused} of {len(faults)} broken students refused, a sound one not{told}", measured)


def copy_of(run: Path, folder: Path) -> Path:
    """A copy of a run, without its checkpoints, in ``folder``/runs: beside a ledger of its own."""
    ignored = shutil.ignore_patterns("checkpoints")
    return Path(shutil.copytree(run, folder / "runs" / run.name, ignore=ignored))
