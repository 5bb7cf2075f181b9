"""Run kind ``bench``: how the pipeline's student writes, beside the token-level one, and the gates of ``[bench]``."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import replace

from latentforge.data.shards import ShardSet
from latentforge.errors import RefusedError
from latentforge.events import EventLog
from latentforge.spec.bench import BenchSpec
from latentforge.spec.run import RunDir, write_record
from latentforge.students.latent.requests import Sampling
from latentforge.train import effective
from latentforge.train.setting import choose_device, fit_threads
from latentforge.writers.bench.hits import hits_of
from latentforge.writers.bench.plot import draw
from latentforge.writers.bench.quality import Quality, qualities_in
from latentforge.writers.bench.report import Entrant, table
from latentforge.writers.bench.run import Work
from latentforge.writers.bench.run import run as measure
from latentforge.writers.bench.turns import quantile
from latentforge.writers.opening import Writer, open_writer
from latentforge.writers.quality import Protocol
from latentforge.writers.quality import measure as measure_quality
from latentforge.writers.quality_report import as_json, lines

KIND = "bench"


def run(run: RunDir, log: EventLog) -> None:
    """Let the student go on with held-out text, in turns with whoever is beside it; keep the report and the student
    that it is of; judge by the gates that are set."""
    identity = run.load_identity()
    spec = BenchSpec.model_validate_json(json.dumps(identity.spec[KIND]))
    seed = int(identity.spec["seed"])
    with log.phase("load"):
        data = ShardSet.open(run.input_path("data"))
        data.verify()
        device = choose_device(spec.device, section=KIND)
        taught, student = _source(run, "student"), run.input_path("student") / "student"
        weights = sum(file.stat().st_size for file in student.rglob("*.safetensors"))
        fit_threads(spec.batch * weights / 2.0)  # two operations a weight of four bytes
        students = [(taught.run, open_writer(student, device=spec.device))]
        if run.has_input("beside"):
            beside = run.input_path("beside") / "student"
            students.append((_source(run, "beside").run, open_writer(beside, device=spec.device)))
        prompts = held_out_prompts(data, spec.prompts, spec.prompt_tokens)
    in_force = {
        "profile": identity.spec["profile"],
        "seed": seed,
        KIND: {**spec.model_dump(mode="json"), "prompts": len(prompts), "device": device.type},
    }
    effective.record(run, effective=in_force, device=effective.device_record(device))
    effective.require_same(KIND, identity.spec, in_force)
    log.ready(requested=identity.spec, effective=in_force)
    run.out.mkdir(exist_ok=True)

    qualities = _qualities(run, log, spec, data, students, seed) if spec.quality_rows else {}
    with log.phase("measure"):
        work = Work(students[0], tuple(students[1:]), prompts, seed, hits_of(taught.path), qualities, own_peaks=False)
        report = measure(work, spec, tell=lambda line, done, total: log.progress("measure", done, total))
    for one in report.entrants:
        _say(log, one)
    if report.hits is not None:  # said here too: a copy of this run has no other run beside it
        of = {"value": report.hits.rate, "teacher_hit_rate": report.hits.rate, "of": report.hits.run}
        log.emit("metric", name="hit_rate", step=0, split=KIND, **of)
    for line in table(report):
        log.say(line)

    with log.phase("save"):
        write_record(run.out / "bench.json", report.as_json())
        draw(report, run.out / "bench.png")
        # The pipeline's product is what was measured: it comes home with the run that judged it.
        shutil.copytree(student, run.out / "student")
    for verdict in report.verdicts:
        log.verdict(replace(verdict, run=run.run))


def _qualities(
    run: RunDir, log: EventLog, spec: BenchSpec, data: ShardSet, students: Sequence[tuple[str, Writer]], seed: int
) -> dict[str, Quality]:
    """How good the students are on held-out rows, by the sha256 of their weights: said, and kept in quality.json."""
    asked = Protocol(
        rows=spec.quality_rows,
        texts=spec.prompts,
        chunks=-(-spec.max_tokens // data.chunk),
        prompt=max(1, spec.prompt_tokens // data.chunk),
        seed=seed,
        sampling=Sampling(spec.method, spec.temperature, spec.draws, spec.top_k, spec.top_p),
    )
    with log.phase("quality"):
        found = measure_quality(students, None, data, asked, tell=log.say)
        content = as_json(found)
        content["protocol"]["data"] = _source(run, "data").run  # where it lies is nobody else's matter
        write_record(run.out / "quality.json", content)
    for one in found.models:
        of = {"step": 0, "split": "heldout", "model": one.name}
        for name, value in (("brier_lm", one.brier_lm), ("bits_per_byte", one.bits_per_byte)):
            if value is not None:
                log.emit("metric", name=name, value=value.value, low=value.low, high=value.high, **of)
    for line in lines(found):
        log.say(line)
    return qualities_in(content)


def held_out_prompts(data: ShardSet, count: int, tokens: int) -> tuple[tuple[int, ...], ...]:
    """The beginnings of the first ``count`` held-out rows that begin with a chunk of text: whole chunks, at most
    ``tokens`` tokens, up to the end of a document. RefusedError where there are fewer."""
    found: list[tuple[int, ...]] = []
    for number in range(len(data.heldout)):
        row = data.heldout.rows([number])[0, :tokens].tolist()
        text = row[: row.index(data.eos_id)] if data.eos_id in row else row
        text = text[: len(text) // data.chunk * data.chunk]
        if text:
            found.append(tuple(text))
        if len(found) == count:
            return tuple(found)
    raise RefusedError(
        f"bench.prompts = {count}: {len(found)} of {len(data.heldout)} held-out rows begin with a chunk of text",
        next=f"set bench.prompts = {max(1, len(found))}, or more data.heldout_sequences",
    )


def _source(run: RunDir, name: str) -> RunDir:
    source = run.input_run(name)
    assert source is not None  # students come of runs alone
    return source


def _say(log: EventLog, one: Entrant) -> None:
    """The figures of one contestant as events."""
    measured = one.measured
    of = {"step": 0, "split": KIND, "model": measured.name, "student": one.folder}
    log.emit("metric", name="tokens_per_second", value=statistics.median(measured.tokens_per_second), **of)
    for name, readings in (("first_chunk_s", measured.to_first), ("chunk_s", measured.between)):
        if (p95 := quantile(readings, 0.95)) is not None:
            log.emit("metric", name=f"{name}_p95", value=p95, p50=quantile(readings, 0.5), **of)
    log.emit("metric", name="peak_memory_bytes", value=measured.peak.total, **of)
