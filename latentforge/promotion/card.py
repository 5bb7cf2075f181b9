"""The model card of a published student: every line is read from the run's evidence."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import yaml

from latentforge.evidence.reading import RunRecord, Series
from latentforge.promotion.gate import Gate

_USE = {
    "distill": """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER")
```""",
    "latent": """```python
from latentforge.writers.opening import open_writer

writer = open_writer("FOLDER")
```

transformers has no class for it: it writes K tokens a step, with the codec in `codec/`.""",
}


def model_card(gate: Gate) -> str:
    """Markdown with the front matter of Hugging Face's model cards."""
    record = gate.record
    return "\n".join(
        [
            "---",
            yaml.safe_dump(_front(record), sort_keys=True, allow_unicode=True).rstrip(),
            "---",
            "",
            f"# {record.id}",
            "",
            _sentence(record),
            "",
            "## Use",
            "",
            _USE[record.kind],
            "",
            "Here, or over HTTP as OpenAI's completions: `latentforge generate FOLDER`, `latentforge serve FOLDER`.",
            "",
            "## What was checked",
            "",
            "| condition | what was found |",
            "|---|---|",
            *(f"| {_cell(one.name)} | {_cell(one.text)} |" for one in gate.conditions),
            "",
            "## Results",
            "",
            "| held-out metric | at step | first | at step | of the weights here |",
            "|---|---|---|---|---|",
            *held_out_of(record),
            "",
            "## How it was made",
            "",
            "| | |",
            "|---|---|",
            *(f"| {name} | {_cell(value)} |" for name, value in _made(gate)),
            "",
            "| setting in force | value |",
            "|---|---|",
            *(f"| {_cell(name)} | {_cell(_plain(value))} |" for name, value in (record.effective or {}).items()),
            "",
            "## What this does not show",
            "",
            "Nothing was measured but what stands above. No licence is stated: those of the teacher and of the text",
            "that it was trained on apply. The manifest of the run is in `evidence/`; `promotion.json` lists the",
            "sha256 of every file of this folder.",
            "",
        ]
    )


def _front(record: RunRecord) -> dict[str, Any]:
    front: dict[str, Any] = {
        "library_name": "transformers" if record.kind == "distill" else "latentforge",
        "pipeline_tag": "text-generation",
        "tags": ["distillation", "latentforge", *(["latent"] if record.kind == "latent" else [])],
    }
    return front


def _sentence(record: RunRecord) -> str:
    made = "A token-level student" if record.kind == "distill" else "A latent student, of K tokens a step,"
    profile = record.identity.spec.get("profile") if record.identity else None
    smoke = " It is a smoke run's: it shows that the line works, not what a student can become." * (profile == "smoke")
    return f"{made} distilled by LatentForge in the run `{record.id}`.{smoke}"


def held_out_of(record: RunRecord) -> Iterator[str]:
    """The rows of the table of results: each held-out metric before the first step, and of the published weights."""
    for one in record.metrics:
        if one.split == "heldout" and one.values:
            step, value = ("–", "not measured") if one.kept is None else (one.kept[0], f"{one.kept[1]:.4f}")
            yield f"| {_cell(_named(one))} | {one.steps[0]} | {one.values[0]:.4f} | {step} | {value} |"


def _named(series: Series) -> str:
    return series.name if series.model is None else f"{series.name} of {series.model}"


def _made(gate: Gate) -> Iterator[tuple[str, str]]:
    record, entry = gate.record, gate.verification.entry
    identity = record.identity
    yield "evidence", gate.verification.standing
    if entry is not None:
        yield "ledger", f"entry {entry.entry}, manifest sha256 {entry.manifest}"
    if identity is not None:
        yield "code", f"sha256 {identity.code}"
        yield "lock file", f"sha256 {identity.lock}"
        for name, value in identity.inputs.items():
            yield name, value
    for name, stated in (("versions", record.versions), ("device", record.device), ("seeds", record.seeds)):
        if stated:
            yield name, _plain(stated)
    if record.peak_memory_bytes is not None:
        yield "peak memory", f"{record.peak_memory_bytes / 2**30:.2f} GiB"
    if record.flops:
        yield "floating point operations", _plain(record.flops)
    if record.timings:
        yield "seconds", ", ".join(f"{name} {seconds:.1f}" for name, seconds in record.timings.items())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _cell(text: str) -> str:
    """Text of a run as a cell: no markup of its own, no new column, no new line."""
    for mark in "\\`*_<>[]|":
        text = text.replace(mark, f"\\{mark}")
    return " ".join(text.split())
