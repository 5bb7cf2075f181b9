"""From a host to a plan: ask what there is, no more often than needed, and hand it to the planner."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dispatch.building.build import BuildChoice, BuildNames, choose_build
from dispatch.building.warmup import choose_warmup, warmup_kin
from dispatch.hosts.facts import HostFacts, PathFact
from dispatch.places import Places
from dispatch.planning.ask import Ask
from dispatch.planning.choice import attempt_ids, choose
from dispatch.planning.memory import judge_memory
from dispatch.planning.plan import Plan, make_plan
from dispatch.preflight.asking import facts_of
from dispatch.preflight.asking import question as preflight_question
from dispatch.transport.call import Transport
from dispatch.transport.retry import call
from latentforge.errors import RefusedError
from latentforge.spec.pipeline import PlannedRun, external_paths, pipeline_runs
from latentforge.spec.sections import PipelineSpec

if TYPE_CHECKING:
    from dispatch.pulling.pipeline import PipelineModels

PROBE_SECONDS = 60.0


def survey(transport: Transport, ask: Ask, places: Places) -> tuple[Plan, HostFacts]:
    """Probe a host and plan on it. Only reading verbs are used.

    Two questions where the pipeline names files of the user's (their digests go into the runs' ids), else one; one more
    where a run has later attempts.
    """
    models = _models(ask)
    digests, paths = _digests(transport, ask, models)
    planned = pipeline_runs(ask.spec, digests=digests, code=ask.code, lock=ask.lock)
    names = BuildNames.of(ask) if ask.bundle is not None else None
    facts = _probe(transport, ask, planned, names).model_copy(update={"paths": paths})
    if models is not None:
        facts = models.with_shapes(facts)
    build = warmup = None
    runs = choose(planned, facts, attempt_next=False)
    if names is not None:
        wanted = any(run.will == "run" for run in runs)
        build = choose_build(ask, facts, wanted=wanted)
        warmup = choose_warmup(ask, facts, build, wanted=wanted)
    if ask.attempt_next and not (build and build.again) and not (warmup and warmup.again):
        runs = choose(planned, facts, attempt_next=True)
        if build is not None:
            build = choose_build(ask, facts, wanted=True)
            warmup = choose_warmup(ask, facts, build, wanted=True)
    memory = judge_memory(ask, facts)
    wanted = any(run.will == "run" for run in runs)
    pulls = models.choices(transport, needed=wanted) if models is not None else ()
    copied = _copied(places)
    plan = make_plan(ask, facts, runs, build=build, warmup=warmup, pulls=pulls, memory=memory, copied=copied)
    return plan, facts


def survey_beside(transport: Transport, ask: Ask, kins: Sequence[str]) -> HostFacts:
    """What there is on a host of what a request builds there, and of runs of these ``kins``: none of the pipeline's."""
    return _probe(transport, ask, [], BuildNames.of(ask), kins)


def survey_build(transport: Transport, ask: Ask) -> tuple[BuildChoice, HostFacts]:
    """Ask a host about the build of a request's code alone."""
    facts = _probe(transport, ask, [], BuildNames.of(ask))
    return choose_build(ask, facts, wanted=True), facts


def _models(ask: Ask) -> PipelineModels | None:
    """The models that the pipeline names by ``repo@commit``; None where it names none."""
    wanted = list(external_paths(ask.spec))
    if not any("@" in one.path for one in wanted):
        return None
    from dispatch.pulling.pipeline import PipelineModels  # what speaks to hubs is slow to import, and seldom needed

    return PipelineModels.of(wanted)


def _digests(
    transport: Transport, ask: Ask, models: PipelineModels | None
) -> tuple[dict[str, str], dict[str, PathFact]]:
    """The digest of each file of the user's, and what was seen of it."""
    wanted = list(external_paths(ask.spec))
    if not wanted:
        return {}, {}
    teacher, init = ask.spec.teacher.model, ask.spec.distill.student.init if ask.spec.distils else None
    # One swapped token would teach the student to write one for the other.
    like = teacher if teacher is not None and init is not None and init != teacher else None
    paths = [{"path": one.path, "purpose": one.purpose} for one in wanted]
    if like is not None:
        paths[-1]["like"] = like
    question: dict[str, object] = {"paths": paths}
    if models is not None:
        question = {"models": models.folders, "paths": [models.question(row) for row in paths]}
    facts = HostFacts.model_validate(call(transport, "probe", question, timeout=600.0).result)
    if models is not None:
        facts = facts.model_copy(update={"paths": models.take(facts)})
    digests: dict[str, str] = {}
    for one in wanted:
        found = facts.paths.get(one.path)
        if found is None or not found.ok or found.sha256 is None:
            why = (found.reason if found else None) or "it could not be read"
            raise RefusedError(
                f"{one.field} = {one.path!r}: {why} (on {ask.host.name})", next=(found.next if found else None)
            )
        digests[one.path] = found.sha256
    if ask.spec.data.corpus in facts.paths:
        _check_corpus(ask.spec, facts.paths[ask.spec.data.corpus])
    if teacher is not None:
        _check_teacher(ask.spec, facts.paths[teacher], digests)
    return digests, dict(facts.paths)


def _check_corpus(spec: PipelineSpec, found: PathFact) -> None:
    """Refuse before any run a corpus that cannot be enough, whatever its tokens turn out to be. The text of a chat is
    its answers, and the corpus no more than what is asked."""
    data = spec.data
    if data.documents == "chat":
        return
    rows = (data.train_sequences or 1) + data.heldout_sequences
    # Of one byte come at most two tokens: itself, and the end of a document of one byte.
    if found.documents_bytes is not None and 2 * found.documents_bytes < rows * data.sequence_length:
        raise RefusedError(
            f"data.corpus = {data.corpus!r} is too small: {found.documents_bytes} bytes of text for {rows} rows of "
            f"{data.sequence_length} tokens",
            next="give a larger corpus, or lower data.train_sequences, data.heldout_sequences or data.sequence_length",
        )


def _check_teacher(spec: PipelineSpec, found: PathFact, digests: dict[str, str]) -> None:
    """Refuse before any run what a teacher folder cannot give; the runs check the same again, tensor by tensor."""
    teacher, init = spec.teacher.model, spec.distill.student.init if spec.distils else None
    assert teacher is not None
    if found.tokenizer is False:
        raise RefusedError(
            f"teacher.model = {teacher!r} has no tokenizer.json",
            next="save its tokenizer into it:  AutoTokenizer.from_pretrained(…).save_pretrained(…)",
        )
    if found.vocab_size is not None and spec.score.k > found.vocab_size:
        raise RefusedError(
            f"score.k = {spec.score.k} is larger than the vocabulary of teacher.model = {teacher!r} "
            f"({found.vocab_size} tokens)",
            next=f"--set score.k={min(32, found.vocab_size)}",
        )
    if spec.profile == "full" and init is not None and digests[teacher] == digests[init]:
        raise RefusedError(
            f"teacher.model and distill.student.init are the same model (sha256 {digests[init][:12]}…): "
            f"{teacher!r} and {init!r}",
            next="name another distill.student.init, or leave it out to start a new, smaller student",
        )


def _probe(
    transport: Transport, ask: Ask, planned: list[PlannedRun], names: BuildNames | None, more_kins: Sequence[str] = ()
) -> HostFacts:
    kins = [*(run.kin for run in planned), *more_kins]
    wanted = [{"id": run.run_id, "kin": run.kin} for run in planned]
    question: dict[str, object] = {"kins": kins, "runs": wanted, "runner": True}
    if names is not None:
        assert ask.bundle is not None
        wanted.append({"id": names.identity.run_id, "kin": names.kin})
        kins += [names.kin, warmup_kin(ask)]
        question |= {"builds": [names.build], "venvs": [names.venv], "cas": [ask.bundle.sha256]}
    question["preflight"] = preflight_question(ask.host, ask)
    if ask.hosts:
        question["link"] = ask.host.link
    facts = facts_of(transport, "probe", question, timeout=PROBE_SECONDS)
    later = [run for one in planned for run in attempt_ids(one, facts.kin_runs.get(one.kin, ()))]
    if names is not None:
        present = {kin.id for kin in facts.kin_runs.get(names.kin, ())}
        later += [run for run in names.attempt_ids()[1:] if run in present]
    if later:
        states = call(transport, "status", {"runs": later}).result
        merged = {**{run: state.model_dump() for run, state in facts.runs.items()}, **states}
        facts = HostFacts.model_validate({**facts.model_dump(), "runs": merged})
    return facts


def _copied(places: Places) -> frozenset[str]:
    return frozenset(path.parent.name for path in places.evidence.glob("*/manifest.json"))
