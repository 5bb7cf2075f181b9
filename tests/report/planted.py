"""Run folders as trainers leave them, made of numbers instead of training."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from latentforge.events import EventLog
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.verdicts import ExitCode, Outcome, Verdict

ROWS = "3d" * 32


def distilled(
    runs: Path,
    *,
    steps: int = 60,
    attempt: int = 1,
    rate: float = 1e-3,
    loss_at: Callable[[int], float] | None = None,
    verdicts: list[tuple[str, Outcome, str]] | None = None,
    samples: Any = None,
    warnings: tuple[str, ...] = (),
    stops_at: int | None = None,
    code: ExitCode = ExitCode.PASS,
    reason: str = "",
) -> Path:
    """The folder of a distillation with a twin. ``stops_at`` is the step after which its log has nothing more."""
    spec: dict[str, Any] = {"profile": "smoke", "seed": 7, "distill": {"steps": steps, "learning_rate": rate}}
    inputs = {"data": "run:data-" + "1" * 20}
    identity = RunIdentity("distill", spec, inputs, "a" * 64, "b" * 64, attempt=attempt)
    run = RunDir.create(runs, identity, LaunchRecord(identity.run_id, "c" * 64, {"data": {"run": "data-" + "1" * 20}}))
    effective = {**spec, "parameters": 229760}
    loss_of = loss_at or (lambda step: 4.0 + 3.6 * math.exp(-step / 20) + 0.2 * math.sin(step * 1.7))
    with open(run.log_file, "w") as text, EventLog(run.events_file, run.run, text=text) as log:
        with log.phase("load"):
            pass
        log.ready(requested=spec, effective=effective)
        for word in warnings:
            log.warning(word)
        for model in ("student", "twin"):
            for name, value in (("val_loss", 7.6), ("val_kl", 1.5)):
                log.metric(name, value, step=0, split="heldout", model=model, rows_sha256=ROWS)
            log.emit("phase", name="train" if model == "student" else "twin", state="begin")
            for step in range(1, steps + 1):
                ce, kd = loss_of(step), 1.5 * math.exp(-step / 15) if model == "student" else None
                log.step(
                    step,
                    steps,
                    model=model,
                    loss=0.3 * ce + 0.7 * (kd or 0.0),
                    kd=kd,
                    ce=ce,
                    learning_rate=rate * min(1.0, step / 10),
                    rows=1016,
                    tokens_per_second=20000 + 40 * step,
                    grad_norm=0.5,
                    memory_bytes=500 << 20,
                    compiles=0,
                    target_seconds=0.003,
                    target_wait_seconds=0.0001,
                )
                if stops_at == step:
                    return run.path
            log.emit("phase", name="train" if model == "student" else "twin", state="end", seconds=0.5)
            for name, value in (("val_loss", 5.6), ("val_kl", 0.07 if model == "student" else 0.18)):
                log.metric(name, value, step=steps, split="heldout", model=model, rows_sha256=ROWS)
        counted = {"rows": 1016 * steps, "target_rows": 1016 * steps, "step": steps, "split": "train"}
        log.emit("metric", name="kd_coverage", value=1.0, model="student", **counted)
        log.checkpoint(steps, path="out/student", bytes=921512, expected_bytes=919040, moved=24, tensors=24)
        log.memory(planned_bytes=700 << 20, peak_bytes=600 << 20)
        for falsifier, outcome, said in verdicts if verdicts is not None else VERDICTS:
            log.verdict(Verdict(falsifier, outcome, said, run=run.run))
        log.end(code, reason=reason)
        timings = {**log.timings, "train": 0.5}
    content = {
        "requested": spec,
        "effective": effective,
        "code": "a" * 64,
        "versions": {"python": "3.11.7"},
        "device": {"type": "cpu", "name": "a processor", "threads": 1},
        "kernel_backend": "cpu",
        "seeds": {"run": 7},
        "timings": timings,
        "peak_memory_bytes": 600 << 20,
        "flops": {"student": 798234624000.0, "twin": 798234624000.0},
    }
    run.effective_file.write_text(json.dumps(content, indent=1))
    run.out.mkdir()
    (run.out / "samples.json").write_text(json.dumps(SAMPLES if samples is None else samples))
    (run.path / "exit.json").write_text(json.dumps({"code": int(code), "signal": None, "outcome": code.name.lower()}))
    return run.path


VERDICTS = [
    ("F-BATCH-ROWS-001", Outcome.PASS, "1016 of 1016 rows trained at each of 120 steps"),
    ("F-DISTILL-SMOKE-001", Outcome.PASS, "val_loss 5.6000 < 7.6000 at step 60"),
]
SAMPLES = [{"prompt": "import os\n", "text": "import sys", "teacher": "import re", "student": "self", "twin": "x"}]
