"""A run whose teacher has another tokenizer than its data: the bridge between them, and how much it carries."""

from __future__ import annotations

from pathlib import Path

from latentforge.data.shards import ShardSet
from latentforge.data.tokenizer import Tokenizer
from latentforge.events import EventLog
from latentforge.spec.run import RunDir
from latentforge.teachers.crossed import CrossCoverage, survey
from latentforge.teachers.crossing import Bridge


def crosses(run: RunDir) -> bool:
    """Whether the run was asked to align two tokenizers."""
    spec = run.load_identity().spec
    return bool(spec.get("cross_tokenizer", spec.get("distill", {}).get("cross_tokenizer", False)))


def align(teacher: Path, data: ShardSet, log: EventLog, *, temperature: float = 1.0) -> tuple[Bridge, CrossCoverage]:
    """The bridge from a teacher's folder to the data, and its coverage: counted over all rows, said as an event."""
    bridge = Bridge(Tokenizer.open(teacher), data.tokenizer())
    with log.phase("align"):
        found = survey(bridge, data, temperature=temperature, progress=lambda *at: log.progress("align", *at))
    log.emit(
        "metric",
        name="cross_tokenizer_coverage",
        value=found.share,
        step=0,
        split="all",
        positions=found.positions,
        single=found.single,
        several=found.several,
        split_positions=found.split,
    )
    return bridge, found
