"""On the built-in corpus: a distilled latent student beside one of text alone and a token-level one of equal cost.

Three seeds of a quarter of an hour each (one core). The figures are in docs/latent.md, whatever they say:
``make soak SOAK=tests/train/test_real_corpus.py``, with ``LATENTFORGE_SOAK_FOLDER`` to keep the runs and go on.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from latentforge.data.shards import ShardSet
from latentforge.spec.pipeline import Role
from latentforge.spec.resolve import resolve_pipeline
from latentforge.spec.run import RunDir
from latentforge.train.inprocess import execute_pipeline
from latentforge.writers.opening import open_writer
from latentforge.writers.quality import Protocol, Report, measure
from latentforge.writers.quality_report import equal_compute, lines

STEPS = 2000
COMMON = (
    "data.heldout_sequences=128",
    f"latent.steps={STEPS}",
    f"distill.steps={STEPS}",
    "latent.tempered_weight=0",
    "continuations.temperatures=[1.0]",
    "bench.measure=false",
    "bench.temperature=1",
)
DISTILLED = ("continuations.count=8", "continuations.rows=2048")
EQUAL_COST = ("distill.student.hidden=120", "distill.student.intermediate=344")  # what bench quality names
TEXT_ALONE = (
    "latent.sample_weight=0",
    "latent.token_kd_weight=0",
    "latent.token_ce_weight=1",
    "latent.beside=false",
    "bench.transformers=false",
)


def pipeline(root: Path, seed: int, *changes: str) -> dict[Role, RunDir]:
    overrides = [f"seed={seed}", *COMMON, *changes]
    return execute_pipeline(resolve_pipeline("smoke-latent", env={}, overrides=overrides).spec, root)


def compared(root: Path, seed: int) -> Report:
    """The three students of one seed, and their teacher, by one protocol."""
    distilled = pipeline(root, seed, *DISTILLED, *EQUAL_COST)
    text = pipeline(root, seed, *TEXT_ALONE)
    folders = {"distilled": distilled["latent"], "text alone": text["latent"], "token-level": distilled["distill"]}
    students = [(name, open_writer(run.path)) for name, run in folders.items()]
    teacher = open_writer(distilled["teacher"].out / "model")
    data = ShardSet.open(distilled["data"].out)
    return measure(students, teacher, data, Protocol(rows=128, texts=16, seed=seed), tell=lambda told: None)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [7, 8, 9])
def test_quality_on_the_real_corpus_at_equal_inference_cost(seed: int, tmp_path: Path) -> None:
    report = compared(Path(os.environ.get("LATENTFORGE_SOAK_FOLDER", tmp_path)), seed)
    print(f"\nseed {seed}", *lines(report), sep="\n")
    equal = equal_compute(report)
    assert equal is not None
    assert equal.holds
