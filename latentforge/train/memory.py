"""A run and its memory: planned before it loads anything, refused where the host cannot hold it, compared after it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from latentforge.errors import FailedError, RefusedError
from latentforge.events import EventLog
from latentforge.memory import HostMemory, KnownModel, MeasuredMemory, MemoryPlan, admission
from latentforge.memory.bench import bench_memory, quality_logits
from latentforge.memory.codec import autoencoder_memory
from latentforge.memory.continuing import continuations_memory
from latentforge.memory.estimate import (
    Answering,
    RowsTold,
    distill_memory,
    score_memory,
    student_shape,
    teacher_memory,
    teacher_shape,
)
from latentforge.memory.latent import latent_memory
from latentforge.memory.plan import gib
from latentforge.spec.bench import BenchSpec
from latentforge.spec.hosts import hosts_of
from latentforge.spec.identity import RunIdentity
from latentforge.spec.latent import AutoencoderSpec, ContinuationsSpec, LatentSpec
from latentforge.spec.run import RunDir
from latentforge.spec.sections import DistillSpec, ScoreSpec, TeacherSpec
from latentforge.spec.teacher import teacher_of
from latentforge.targets.store import TargetStore
from latentforge.teachers.protocol import behind
from latentforge.train import effective
from latentforge.train.held import Peak
from latentforge.verdicts import Outcome


def plan_of(run: RunDir, identity: RunIdentity, *, leads: bool = True) -> MemoryPlan | None:
    """The plan of one run from what its folder says: the same arithmetic as ``latentforge memory`` and a plan's line;
    on the host that ``leads`` it, or on another.

    None for a run that holds no model.
    """
    if identity.kind == "data":
        return None
    data = json.loads((run.input_path("data") / "data.json").read_bytes())
    length, vocab_size = int(data["sequence_length"]), int(data["vocab_size"])
    there = "cuda" if torch.cuda.is_available() else "cpu"
    hosts = hosts_of(run.load_launch())
    among: dict[str, Any] = {"hosts": 1 if hosts is None else len(hosts.hosts), "leads": leads}
    if identity.kind == "teacher":
        spec = _section(TeacherSpec, identity.spec["teacher"])
        return teacher_memory(spec, teacher_shape(spec, vocab_size), length=length, device=there)
    if identity.kind == "autoencoder":
        codec = _section(AutoencoderSpec, identity.spec["autoencoder"])
        device = "cpu" if codec.device == "cpu" else there
        sizes = {"chunk": int(data.get("chunk", 1)), "length": length, "vocab_size": vocab_size}
        return autoencoder_memory(codec, **sizes, device=device, **among)
    if identity.kind == "latent":
        sizes = {"chunk": int(data["chunk"]), "length": length, "vocab_size": vocab_size}
        return _latent_plan(run, identity, there=there, **sizes, **among)
    if identity.kind == "bench":
        return _bench_plan(run, identity, length=length, vocab_size=vocab_size, there=there)
    answering = Answering.of(teacher_of(run), _teacher(run), device=there)
    if identity.kind == "score":
        return score_memory(answering, rows=_section(ScoreSpec, identity.spec["score"]).batch_size, length=length)
    if identity.kind == "continuations":
        asked = _section(ContinuationsSpec, identity.spec["continuations"])
        return continuations_memory(answering, asked, chunk=int(data.get("chunk", 1)), length=length)
    distill = _section(DistillSpec, identity.spec["distill"])
    if run.has_input("student_init"):
        student = KnownModel.of_folder(run.input_path("student_init"))
    else:
        student = KnownModel.of_shape(student_shape(distill.student, vocab_size))
    live = distill.targets != "store" or distill.on_policy > 0
    beside = live or (identity.spec["profile"] == "smoke" and answering.place == "process")
    device = "cpu" if distill.device == "cpu" else there
    asked, told = answering if beside else None, None
    if distill.targets == "store":
        path = run.input_path("targets")
        with TargetStore.open(path if path.is_file() else path / "targets.sqlite") as store:
            told = RowsTold(store.k)
    elif answering.place != "process":
        told = RowsTold(int(identity.spec["score"]["k"]), int(data["heldout_sequences"]))
    sizes = {"length": length, "device": device, "live": live, "rows_told": told}
    return distill_memory(distill, asked, student, **sizes, **among)


def _latent_plan(run: RunDir, identity: RunIdentity, *, there: str, **sizes: Any) -> MemoryPlan:
    """The plan of a latent student, whose codec is what the run that trained it was asked for."""
    spec = _section(LatentSpec, identity.spec["latent"])
    trained, asked = run.input_run("codec"), run.input_run("continuations") if spec.continues else None
    assert trained is not None  # a codec comes of a run alone
    codec = _section(AutoencoderSpec, trained.load_identity().spec["autoencoder"])
    drawn = None if asked is None else _section(ContinuationsSpec, asked.load_identity().spec["continuations"])
    device = "cpu" if spec.device == "cpu" else there
    return latent_memory(spec, codec, continuations=drawn, device=device, **sizes)


def _bench_plan(run: RunDir, identity: RunIdentity, *, length: int, vocab_size: int, there: str) -> MemoryPlan:
    """The plan of a bench of the students that the run's inputs hold."""
    spec, student = _section(BenchSpec, identity.spec["bench"]), run.input_path("student") / "student"
    latent, token = None, student
    if (student / "student.json").is_file():
        latent = sum(file.stat().st_size for file in student.rglob("*.safetensors"))
        token = run.input_path("beside") / "student" if run.has_input("beside") else None
    known = KnownModel.of_folder(token) if token is not None else None
    device = "cpu" if spec.device == "cpu" else there
    logits = quality_logits(spec, length=length, vocab_size=vocab_size)
    return bench_memory(latent=latent, token=known, transformers=spec.transformers, logits=logits, device=device)


def require_room(run: RunDir, log: EventLog, plan: MemoryPlan, host: HostMemory | None = None) -> None:
    """Say what the run is planned to hold, and refuse it (FailedError: the host is not fit) where that is not there."""
    host = HostMemory.read() if host is None else host
    judged = admission(plan, host, measured_peak=_rehearsed(run))
    terms = {f"planned_{term.name.replace(' ', '_')}": term.bytes for term in plan.terms if term.bytes}
    told = {"total_bytes": host.total, "available_bytes": host.available}
    log.memory(
        planned_bytes=plan.bytes,
        planned_own_bytes=plan.own_bytes,
        planned_load=plan.load,
        **terms,
        **{name: value for name, value in told.items() if value is not None},
    )
    log.say(f"memory planned: {plan.line(host.total)}")
    effective.record(run, memory={"planned_bytes": plan.bytes, "planned_own_bytes": plan.own_bytes, "terms": terms})
    if judged.outcome is Outcome.UNKNOWN:
        missing = ", ".join(plan.unknown)
        log.warning(f"memory: the size of {missing} is not known" if missing else "memory: the host tells no size")
    for condition in judged.refused:
        raise FailedError(
            f"this host cannot hold the run: {plan.line(host.total)}; {condition.name} needs "
            f"{gib(condition.need or 0)} GiB, {gib(condition.have or 0)} of {gib(host.total or 0)} GiB are free",
            next="latentforge memory SPEC shows each term; lower the batch, the sequence length or the model",
        )


def _rehearsed(run: RunDir) -> int | None:
    """The peak that this run's canary was measured to hold: the same training, a few steps of it."""
    source = run.input_run("canary") if run.has_input("canary") else None
    found = effective.read(source).get("memory", {}).get("resident_bytes") if source is not None else None
    return found if isinstance(found, int) else None


def compare(run: RunDir, log: EventLog, plan: MemoryPlan, peak: Peak, *, before: int = 0) -> MeasuredMemory:
    """Set the peak of a run's processes beside its plan, as an event and in ``effective.json``; a warning where it is
    far above. ``before`` is what the run's only process held before it."""
    found = MeasuredMemory.of(plan, peak=peak.resident, in_use=peak.in_use, before=before)
    values = {"measured_bytes": found.measured, "resident_bytes": found.resident, "peak_bytes": peak.resident}
    log.memory(planned_bytes=found.planned, **values)
    log.say(f"memory measured: {found.line}")
    effective.record(run, memory=values | {"over": found.warning})
    if found.warning is not None:
        log.warning(found.warning)
    return found


def require_return(log: EventLog, teacher: Any) -> None:
    """Set what a stopped vLLM of ours gave back on record; FailedError where its memory was waited for and is not back.

    Nothing is required of a teacher that had no memory of its own on this host.
    """
    stopped = next((one.stopped for one in behind(teacher) if hasattr(one, "stopped")), None)
    if stopped is None:
        return
    memory = stopped.memory
    log.memory(teacher_available_before_bytes=memory.before, teacher_available_after_bytes=memory.after)
    if not memory.returned:
        raise FailedError(
            f"the teacher was stopped and no process of it is left, but {memory}",
            next="free -m, then  latentforge dispatch go --attempt next  takes the scored rows over",
        )


def _teacher(run: RunDir) -> KnownModel:
    """The folder of the run's teacher, as far as it is here: a server has no weights on this host."""
    if not run.has_input("teacher"):
        return KnownModel()
    path = run.input_path("teacher")
    folder = path / "model" if run.input_run("teacher") is not None else path
    try:
        return KnownModel.of_folder(Path(folder))
    except RefusedError as error:
        return KnownModel(troubles=(str(error),))


def _section(kind: Any, values: Mapping[str, Any]) -> Any:
    return kind.model_validate_json(json.dumps(values))
