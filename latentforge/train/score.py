"""Recipe of the run kind ``score``: a teacher's targets for every packed row, top-k with exact tails or drawn."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from latentforge.data.shards import ShardSet
from latentforge.errors import FailedError
from latentforge.events import EventLog
from latentforge.spec.run import RunDir, write_record
from latentforge.spec.sections import ScoreSpec, TeacherSpec
from latentforge.spec.teacher import answers_of, teacher_of
from latentforge.targets.sampling import Sampling
from latentforge.targets.store import Coverage, TargetStore
from latentforge.teachers.alignment import compare_vocabularies
from latentforge.teachers.cached import CachedTeacher
from latentforge.teachers.capability import TRAIN_ON_ANSWERS, require
from latentforge.teachers.crossed import CrossedShards
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.protocol import Scorer
from latentforge.teachers.sampled import SampledTeacher
from latentforge.teachers.scoring import Agreement, check_agreement, check_scorable, coverage, score_all
from latentforge.train.across import align, crosses
from latentforge.train.asked import AskedLog
from latentforge.train.data import checked_path
from latentforge.train.memory import require_return
from latentforge.train.taking_over import take_over
from latentforge.train.teaching import idleness, in_force, open_asked


def run(run: RunDir, log: EventLog) -> None:
    """Load the teacher, score what the store lacks, ask again for a sample, require coverage of 100 %."""
    identity = run.load_identity()
    spec = ScoreSpec.model_validate_json(json.dumps(identity.spec["score"]))
    asked = teacher_of(run)
    with ExitStack() as held:
        with log.phase("load"):
            data = ShardSet.open(run.input_path("data"))
            data.verify()
            folder = teacher_folder(run)
            across = align(folder, data, log) if crosses(run) else None
            said = across[0].notes if across else compare_vocabularies(folder, data.tokenizer_dir).notes
            # Rows that are drawn are not cached: a cache holds top-k rows, and gives no logits to draw from.
            rows: dict[str, Any] | None = None
            if spec.mode == "topk":
                rows = {"k": spec.k, "temperatures": spec.temperatures, "rounding": spec.rounding}
            teacher = open_asked(run, log, asked, folder, held, rows=rows)
            if spec.mode == "sample":
                teacher = SampledTeacher(teacher, Sampling(spec.draws, int(identity.spec["seed"])))
            require(teacher, "score", "scoring a corpus", instead=TRAIN_ON_ANSWERS)
            asked_of = CrossedShards.of(data, *across) if across else data
            check_scorable(teacher, asked_of, k=entries_of(teacher, spec), temperatures=spec.temperatures)
        for note in dict.fromkeys((*said, *teacher.notes)):
            log.say(note)
        run.out.mkdir(parents=True, exist_ok=True)
        open_store = partial(open_for_scoring, teacher=teacher, spec=spec)
        take_over(run, log, "targets.sqlite", open_store)
        with open_store(run.out / "targets.sqlite") as store:
            if store.reader == "numpy" and store.rounding == "fine":
                log.warning("rows are read in numpy, several times slower: the extension is missing or stale")
            new, agreement, reached = fill(store, teacher, asked_of, spec, log, asked)
    require_return(log, teacher)  # before anything else of the pipeline is loaded
    with TargetStore.open(run.out / "targets.sqlite") as store:
        stats = store.stats()
        record = {
            "identity": store.identity,
            "rows": stats["rows"],
            "new_rows": new,
            "sequences": len(data.train) + len(data.heldout),
            "k": store.k,
            "batch_size": spec.batch_size,
            "temperatures": list(store.temperatures),
            "mode": spec.mode,
            "draws": spec.draws,
            "seed": store.seed,
            "rounding": store.rounding,
            "ttl_days": None if store.policy.ttl_seconds is None else store.policy.ttl_seconds / 86400.0,
            "max_bytes": store.policy.max_bytes,
            "teacher": answers_of(asked) | in_force(teacher),
            "cross_tokenizer": across is not None,
            "tail_mass": stats["tail_mass"],
            "bytes": stats["bytes"],
            "agreement": {f"worst_{agreement.unit}": agreement.worst, "positions": agreement.positions},
        }
    write_record(run.out / "score.json", record)
    mass = ", ".join(f"{value:.1%} at T = {t}" for t, value in stats["tail_mass"].items())
    kept = f"{spec.draws} draws a position" if spec.mode == "sample" else f"k = {spec.k}, mass outside {mass}"
    differs = f"{agreement.worst:.1%} of a row's draws" if agreement.unit == "draws" else f"{agreement.worst:.1e} nats"
    log.say(
        f"coverage {reached}; {kept}; {stats['bytes'] / 1e6:.1f} MB; "
        f"asked again at {agreement.positions} positions: differs by at most {differs}"
    )


def fill(
    store: TargetStore,
    teacher: Scorer,
    data: ShardSet | CrossedShards,
    spec: ScoreSpec,
    log: EventLog,
    asked: TeacherSpec,
) -> tuple[int, Agreement, Coverage]:
    """Score what ``store`` lacks and ask again for a sample: how many rows are new, how far they agree, the coverage.

    A TeacherFailure ends it; the log then says what is kept. FailedError where the store is not whole afterwards.
    """
    told = AskedLog(log, teacher)
    before = coverage(store, data)
    if before.present:
        log.say(f"resumes: {before} are in the store")
    try:
        with log.phase("score", present=before.present, total=before.total), idleness(log, teacher, asked):
            new = score_all(teacher, data, store, batch_size=spec.batch_size, progress=told.progress)
        reached = coverage(store, data)
        require_whole(store, reached, spec)
        with log.phase("verify"):
            agreement = verify(teacher, store, data, log)
    except TeacherFailure:
        told.lost(coverage(store, data), store)
        raise
    told.metrics(reached.present)
    return new, agreement, reached


def require_whole(store: TargetStore, reached: Coverage, spec: ScoreSpec) -> None:
    """Fail where a sequence has no row any more, or never had: nothing can be trained on such a store."""
    if reached.present == reached.total:
        return
    if old := store.stats()["too_old"]:
        raise FailedError(
            f"coverage {reached}: {old} rows grew older than score.ttl_days = {spec.ttl_days:g} in this run already",
            next="give score.ttl_days more than scoring and training take, or leave it out",
        )
    raise FailedError(f"coverage {reached}: targets are missing", next="run the score run again; it resumes")


def verify(teacher: Scorer, store: TargetStore, data: ShardSet | CrossedShards, log: EventLog) -> Agreement:
    """Ask the teacher itself again, not what was cached of it; it may be gone where the cache held everything."""
    if not isinstance(teacher, CachedTeacher):
        return check_agreement(teacher, store, data)
    if not teacher.asked:
        log.warning("every sequence came from the cache: the teacher was not asked, and not asked again")
        return Agreement(0.0, 0)
    return check_agreement(teacher.teacher, store, data)


def teacher_folder(run: RunDir) -> Path:
    """The model folder of the input ``teacher``: ``out/model`` of a teacher run, or the folder that was named."""
    if run.input_run("teacher") is not None:
        return run.input_path("teacher") / "model"
    return checked_path(run, "teacher") or run.input_path("teacher")


def open_for_scoring(path: Path, teacher: Scorer, spec: ScoreSpec) -> TargetStore:
    """The store of this run, new or as an earlier start left it; refused where it is another teacher's."""
    identity, k = teacher.identity.as_json(), entries_of(teacher, spec)
    drawn: dict[str, Any] = {}
    if isinstance(teacher, SampledTeacher):
        drawn = {"mode": "sample", "draws": teacher.sampling.draws, "seed": teacher.sampling.seed}
    if not path.exists():
        return TargetStore.create(
            path,
            identity,
            k,
            spec.temperatures,
            vocab_size=teacher.vocab_size,
            ttl_seconds=None if spec.ttl_days is None else spec.ttl_days * 86_400,
            max_bytes=spec.max_bytes,
            rounding=spec.rounding,
            **drawn,
        )
    return TargetStore.open(
        path,
        readonly=False,
        identity=identity,
        k=k,
        temperatures=spec.temperatures,
        vocab_size=teacher.vocab_size,
        rounding=spec.rounding,
        **drawn,
    )


def entries_of(teacher: Scorer, spec: ScoreSpec) -> int:
    """Entries a row: the spec's k, or room for every token that its draws can come to."""
    return teacher.width if isinstance(teacher, SampledTeacher) else spec.k
