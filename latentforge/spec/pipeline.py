"""From a pipeline file to its runs: which there are, what each means, and what each takes from the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from latentforge.errors import RefusedError
from latentforge.spec.abilities import check_abilities
from latentforge.spec.canary import Trained, canary_key, canary_of
from latentforge.spec.canonical import canonical_sha256
from latentforge.spec.choice import auto_of
from latentforge.spec.endurance import TRAINING, meaning_of
from latentforge.spec.fields import HTTP_BACKENDS
from latentforge.spec.identity import Kind, RunIdentity
from latentforge.spec.run import InputRef
from latentforge.spec.sections import DistillSpec, PipelineSpec, TeacherSpec
from latentforge.spec.teacher import DENSE_BACKENDS, answers_of, training_of

BUILTIN_CORPUS = "stdlib"

Role = Literal[Kind, "canary", "latent-canary"]
CANARIES: dict[Role, Trained] = {"canary": "distill", "latent-canary": "latent"}
"""The roles of the short runs that go before a full pipeline's long ones, with the kind of both."""


@dataclass(frozen=True)
class ExternalPath:
    """A file or folder of the user's that a pipeline names: its content is an input, its path is not."""

    field: str  # the spec field that names it, "data.corpus"
    path: str
    purpose: str  # "corpus", "model", "tokenizer" (a model's folder of which no weights are needed) or "targets"


@dataclass(frozen=True)
class PlannedRun:
    """One run of a pipeline: its identity, where its inputs lie, and its kin.

    ``kin`` is the sha256 of the meaning without the code: runs of one kin differ in code alone. ``role`` is what the
    run is in its pipeline: its kind, or one of ``CANARIES``.
    """

    identity: RunIdentity
    resolved: dict[str, InputRef]
    kin: str
    role: Role

    @property
    def kind(self) -> Kind:
        """The run's kind."""
        return self.identity.kind

    @property
    def run_id(self) -> str:
        """The run's id."""
        return self.identity.run_id

    @property
    def is_canary(self) -> bool:
        """Whether it is the short run before a full one."""
        return self.identity.is_canary


def external_paths(spec: PipelineSpec) -> Iterator[ExternalPath]:
    """What of the user's own files a pipeline reads; each must be hashed on the host before its runs have ids."""
    if spec.data.corpus != BUILTIN_CORPUS:
        yield ExternalPath("data.corpus", spec.data.corpus, "corpus")
    if spec.teacher.model is not None:
        loaded = spec.has_teacher and spec.teacher.backend not in (*HTTP_BACKENDS, "store", "fixture")
        yield ExternalPath("teacher.model", spec.teacher.model, "model" if loaded else "tokenizer")
    if spec.has_teacher and spec.teacher.backend == "store" and spec.teacher.store is not None:
        yield ExternalPath("teacher.store", spec.teacher.store, "targets")
    if spec.distils and spec.distill.student.init is not None:
        yield ExternalPath("distill.student.init", spec.distill.student.init, "model")


def effective_pipeline(spec: PipelineSpec) -> tuple[PipelineSpec, list[str]]:
    """The pipeline as it will run, and a sentence for each choice that the file did not spell out.

    A temperature for which no tails are stored needs dense targets of a live teacher. A server's key is a secret of
    the pipeline's, by its name. A codec asks no teacher, nor does a latent student of plain text.
    """
    if not spec.has_teacher:
        return spec, []
    teacher, secrets = spec.teacher, spec.secrets
    notes: list[str] = []
    if teacher.backend == "auto":
        backend, why = auto_of(teacher)
        teacher = TeacherSpec.model_validate(teacher.model_dump() | {"backend": backend})
        if backend != "hf":
            notes.append(f"teacher.backend = auto: {backend}, since {why}")
    if teacher.backend in HTTP_BACKENDS:
        notes.append(f"teacher: {teacher.served_model or 'the only model'} of {teacher.url} ({teacher.backend})")
        key = teacher.api_key_env
        secrets = tuple(sorted({*secrets, key})) if key is not None else secrets
    decided = spec.model_copy(update={"teacher": teacher, "secrets": secrets})
    if spec.through == "latent":
        _check_stored_rows(decided)
    if spec.distils:
        decided = decided.model_copy(update={"distill": _effective_distill(decided, notes)})
    check_abilities(decided)
    return decided, notes


def _check_stored_rows(spec: PipelineSpec) -> None:
    """Refuse a latent student that takes rows which no score run stores: it is never fed live."""
    latent, teacher = spec.latent, spec.teacher
    if not latent.takes_rows:
        return
    if spec.score.mode == "sample" and teacher.backend not in DENSE_BACKENDS:
        raise RefusedError(
            f"score.mode = 'sample' draws from dense logits, and teacher.backend = {teacher.backend!r} gives none",
            next="set score.mode = 'topk', or teacher.backend = 'hf'",
        )
    if latent.token_temperature not in spec.score.temperatures:
        stored = ", ".join(f"{t:g}" for t in spec.score.temperatures)
        raise RefusedError(
            f"latent.token_temperature = {latent.token_temperature:g} is not in score.temperatures [{stored}]: no "
            "tails are stored for it",
            next=f"set latent.token_temperature = {spec.score.temperatures[0]:g}, or add it to score.temperatures",
        )


def _effective_distill(spec: PipelineSpec, notes: list[str]) -> DistillSpec:
    """The distill section as it will run; a sentence is added to ``notes`` for a choice that it did not spell out."""
    distill, teacher = spec.distill, spec.teacher
    dense = teacher.backend in DENSE_BACKENDS
    if spec.score.mode == "sample" and distill.targets == "store" and not dense:
        raise RefusedError(
            f"score.mode = 'sample' draws from dense logits, and teacher.backend = {teacher.backend!r} gives none",
            next="set score.mode = 'topk', or teacher.backend = 'hf'",
        )
    if distill.targets == "store" and distill.temperature not in spec.score.temperatures:
        stored = ", ".join(f"{t:g}" for t in spec.score.temperatures)
        if not dense:
            raise RefusedError(
                f"distill.temperature = {distill.temperature:g} is not in score.temperatures [{stored}], and "
                f"teacher.backend = {teacher.backend!r} has no dense logits from which it could be had",
                next=f"set distill.temperature = {spec.score.temperatures[0]:g}, or teacher.backend = 'hf'",
            )
        if distill.distributed != "none":
            raise RefusedError(
                f"distill.temperature = {distill.temperature:g} is not in score.temperatures [{stored}], and "
                f"distill.distributed = {distill.distributed!r} takes stored targets alone",
                next=f"add {distill.temperature:g} to score.temperatures, or set distill.distributed = 'none'",
            )
        notes.append(
            f"T = {distill.temperature:g} is not in score.temperatures [{stored}]: planned with live dense targets"
        )
        distill = distill.model_copy(update={"targets": "live"})
    if teacher.backend == "store" and (distill.targets == "live" or distill.on_policy > 0.0):
        asks = "distill.targets = 'live'" if distill.targets == "live" else f"on_policy = {distill.on_policy:g}"
        raise RefusedError(
            f"{asks} asks a teacher, and teacher.backend = 'store' has none",
            next="distill.targets = 'store' and on_policy = 0, or another teacher.backend",
        )
    if distill.targets == "live" and teacher.backend in HTTP_BACKENDS and distill.temperature != 1.0:
        raise RefusedError(
            f"distill.temperature = {distill.temperature:g}: rows over HTTP have T = 1 only",
            next="set distill.temperature = 1, or teacher.backend = 'hf'",
        )
    return distill


def check_profile(spec: PipelineSpec) -> None:
    """Refuse in a ``full`` pipeline what is only fit for ``smoke``."""
    if spec.profile != "full":
        return
    if spec.data.corpus == BUILTIN_CORPUS:
        raise RefusedError(
            "data.corpus = 'stdlib' is only fit for profile smoke", next="name a folder, a .txt or a .jsonl file"
        )
    trained = {"distill": spec.distils and spec.distill, "latent": spec.through == "latent" and spec.latent}
    for name, section in trained.items():
        if section and section.student.frozen:
            raise RefusedError(
                f"{name}.student.frozen = true is a planted control, only fit for profile smoke",
                next=f"set {name}.student.frozen = false",
            )


def pipeline_runs(
    spec: PipelineSpec, *, digests: Mapping[str, str], code: str, lock: str, through: Kind | None = None
) -> list[PlannedRun]:
    """The runs of an effective pipeline in the order in which they depend on each other, each at attempt 1.

    ``digests`` maps each external path to the sha256 (hex) of its content; ``through`` is the last run where the
    pipeline's own is not. A ``full`` pipeline has a canary before its distill run and before its latent run, which take
    it as an input: without a canary that passed they do not start.
    """
    check_profile(spec)
    runs: dict[Role, PlannedRun] = {}
    for role, section, inputs in _wanted(spec):
        stands_for = CANARIES.get(role)
        kind = cast(Kind, stands_for or role)
        named: dict[str, str] = {}
        kin_named: dict[str, str] = {}
        resolved: dict[str, InputRef] = {}
        for name, source in inputs.items():
            if isinstance(source, ExternalPath):
                sha256 = digests[source.path]
                named[name] = kin_named[name] = f"sha256:{sha256}"
                resolved[name] = {"path": source.path, "sha256": sha256}
            elif source == BUILTIN_CORPUS:
                named[name] = kin_named[name] = BUILTIN_CORPUS
                resolved[name] = {"builtin": BUILTIN_CORPUS}
            else:
                other = runs[source]
                named[name], kin_named[name] = f"run:{other.run_id}", f"kin:{other.kin}"
                resolved[name] = {"run": other.run_id}
        if kind in TRAINING:
            section = {**section, "endurance": meaning_of(spec.endurance)}
        content = _section_by_content(section, digests)
        if stands_for is not None:
            asked = _section_by_content({stands_for: _json(getattr(spec, stands_for))}, digests)[stands_for]
            named["stands_for"] = kin_named["stands_for"] = f"sha256:{canary_key(stands_for, spec.seed, asked)}"
        secrets = tuple(sorted(spec.secrets))
        identity = RunIdentity(kind=kind, spec=content, inputs=named, code=code, lock=lock, secrets=secrets)
        meaning = {"kind": kind, "spec": content, "inputs": kin_named, "lock": lock}
        kin = canonical_sha256(meaning | ({"secrets": list(secrets)} if secrets else {}))
        runs[role] = PlannedRun(identity, resolved, kin, role)
        if role == through:
            break
    return list(runs.values())


_Sources = dict[str, "ExternalPath | Role | str"]
_Externals = Mapping[str, ExternalPath]
_Wanted = tuple[Role, dict[str, Any], dict[str, Any]]


def _wanted(spec: PipelineSpec) -> Iterator[_Wanted]:
    """(role, its part of the spec, its inputs) of each run that the pipeline needs."""
    external = {path.field: path for path in external_paths(spec)}
    yield _data_of(spec, external)
    if spec.has_teacher:
        yield from _teacher_of(spec, external)
    if spec.through in ("autoencoder", "latent"):
        asked = {"profile": spec.profile, "seed": spec.seed, "autoencoder": _json(spec.autoencoder)}
        yield "autoencoder", asked, {"data": "data"}
    if spec.through == "latent" and spec.profile == "full":
        # Before the token-level student, whose hours would be spent first otherwise.
        yield _latent_canary_of(spec, external)
    if spec.distils:
        yield from _distilled(spec, external)
    if spec.through == "latent":
        yield _latent_of(spec, external)
    if spec.benches:
        yield _bench_of(spec)


def _crosses(spec: PipelineSpec) -> bool:
    return spec.distils and spec.distill.cross_tokenizer


def _chats(spec: PipelineSpec) -> bool:
    return spec.data.documents == "chat"


def _teacher_input(external: _Externals) -> ExternalPath | Role:
    return external.get("teacher.model") or "teacher"


def _rows_input(spec: PipelineSpec, external: _Externals) -> ExternalPath | Role:
    """Where a teacher's rows lie: a store that is named, the answers of a chat, or a score run's."""
    return "data" if _chats(spec) else external.get("teacher.store") or "score"


def _data_of(spec: PipelineSpec, external: _Externals) -> _Wanted:
    data_inputs: _Sources = {"corpus": external.get("data.corpus", BUILTIN_CORPUS)}
    # Across tokenizers the data is the student's: its folder's tokens, or a vocabulary of its own.
    tokenizer = external.get("distill.student.init") if _crosses(spec) else external.get("teacher.model")
    if tokenizer is not None:
        data_inputs["tokenizer"] = tokenizer
    asked = {"seed": spec.seed, "data": _json(spec.data)}
    # The answers are the documents and their rows the targets: nothing is left to be scored.
    asked |= {"teacher": answers_of(spec.teacher), "score": {"k": spec.score.k}} if _chats(spec) else {}
    return "data", asked, data_inputs


def _teacher_of(spec: PipelineSpec, external: _Externals) -> Iterator[_Wanted]:
    """The runs that train a teacher and ask it ahead of the students."""
    if "teacher.model" not in external:
        yield "teacher", {"seed": spec.seed, "teacher": training_of(spec.teacher)}, {"data": "data"}
    inputs: _Sources = {"data": "data", "teacher": _teacher_input(external)}
    if spec.scores and "teacher.store" not in external:
        asked = {"seed": spec.seed, "score": _json(spec.score), "teacher": answers_of(spec.teacher)}
        asked |= {"cross_tokenizer": True} if _crosses(spec) else {}
        yield "score", asked, dict(inputs)
    if spec.continues:
        asked = {"seed": spec.seed, "continuations": _json(spec.continuations), "teacher": answers_of(spec.teacher)}
        yield "continuations", asked, dict(inputs)


def _distilled(spec: PipelineSpec, external: _Externals) -> Iterator[_Wanted]:
    """The token-level student, in a full pipeline after its canary."""
    inputs: _Sources = {"data": "data", "teacher": _teacher_input(external)}
    if spec.distill.targets == "store":
        inputs["targets"] = _rows_input(spec, external)
    if (init := external.get("distill.student.init")) is not None:
        inputs["student_init"] = init
    # A student that is fed from the store alone asks no teacher.
    asks = spec.distill.targets == "live" or spec.distill.on_policy > 0.0
    teacher_asked = {"teacher": answers_of(spec.teacher)} if asks else {}
    if asks and (spec.teacher.backend not in DENSE_BACKENDS or spec.distill.cross_tokenizer):
        teacher_asked["score"] = {"k": spec.score.k}
    if spec.profile == "full":
        short = {"profile": spec.profile, "seed": spec.seed, "distill": _json(canary_of("distill", spec.distill))}
        yield "canary", {**short, **teacher_asked}, dict(inputs)
        inputs["canary"] = "canary"
    asked = {"profile": spec.profile, "seed": spec.seed, "distill": _json(spec.distill), **teacher_asked}
    yield "distill", asked, inputs


def _latent_inputs(spec: PipelineSpec, external: _Externals) -> _Sources:
    """What a latent student learns from."""
    inputs: _Sources = {"data": "data", "codec": "autoencoder"}
    if spec.latent.takes_rows:
        inputs |= {"teacher": _teacher_input(external), "targets": _rows_input(spec, external)}
    if spec.continues:
        inputs["continuations"] = "continuations"
    return inputs


def _latent_canary_of(spec: PipelineSpec, external: _Externals) -> _Wanted:
    short = {"profile": spec.profile, "seed": spec.seed, "latent": _json(canary_of("latent", spec.latent))}
    return "latent-canary", short, _latent_inputs(spec, external)


def _latent_of(spec: PipelineSpec, external: _Externals) -> _Wanted:
    inputs = _latent_inputs(spec, external)
    if spec.latent.beside:
        inputs["beside"] = "distill"
    if spec.profile == "full":
        inputs["canary"] = "latent-canary"
    return "latent", {"profile": spec.profile, "seed": spec.seed, "latent": _json(spec.latent)}, inputs


def _bench_of(spec: PipelineSpec) -> _Wanted:
    student: Role = "latent" if spec.through == "latent" else "distill"
    inputs: _Sources = {"data": "data", "student": student}
    if spec.distils and student != "distill":
        inputs["beside"] = "distill"
    return "bench", {"profile": spec.profile, "seed": spec.seed, "bench": _json(spec.bench)}, inputs


def _json(section: Any) -> dict[str, Any]:
    content: dict[str, Any] = section.model_dump(mode="json")
    return content


def _section_by_content(section: dict[str, Any], digests: Mapping[str, str]) -> dict[str, Any]:
    """The section with each external path replaced by its content's digest, so that moving a file changes nothing."""
    content = {name: dict(value) if isinstance(value, dict) else value for name, value in section.items()}
    if "data" in content and content["data"]["corpus"] != BUILTIN_CORPUS:
        content["data"]["corpus"] = f"sha256:{digests[content['data']['corpus']]}"
    if "distill" in content and content["distill"]["student"]["init"] is not None:
        init = content["distill"]["student"]["init"]
        content["distill"]["student"] = {**content["distill"]["student"], "init": f"sha256:{digests[init]}"}
    return content
