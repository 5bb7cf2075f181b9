"""Recipe of the run kind ``continuations``: what a teacher goes on with after each chunk of the packed rows."""

from __future__ import annotations

import json
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from latentforge.data.shards import ShardSet
from latentforge.errors import FailedError
from latentforge.events import EventLog
from latentforge.spec.latent import ContinuationsSpec
from latentforge.spec.run import RunDir, write_record
from latentforge.spec.sections import TeacherSpec
from latentforge.spec.teacher import answers_of, teacher_of
from latentforge.targets.continuations import ContinuationStore
from latentforge.targets.store import Coverage
from latentforge.teachers.alignment import compare_vocabularies
from latentforge.teachers.capability import require
from latentforge.teachers.continuing import Continuer, Continuing
from latentforge.teachers.continuing_agreement import DrawsAgreement, check_draws
from latentforge.teachers.continuing_store import check_rows, continue_all, coverage, sampled
from latentforge.teachers.failures import TeacherFailure
from latentforge.train.asked import AskedLog
from latentforge.train.memory import require_return
from latentforge.train.score import teacher_folder
from latentforge.train.taking_over import take_over
from latentforge.train.teaching import idleness, in_force, open_asked

STORE = "continuations.sqlite"
CHOOSE_ANOTHER = (
    "name a backend that goes on with a raw text (hf, vllm-remote, openai), or set latent.sample_weight and "
    "latent.tempered_weight to 0"
)
_CHECKED_ROWS = 4


def run(run: RunDir, log: EventLog) -> None:
    """Load the teacher, continue the rows that the store lacks, compare a sample, require coverage of 100 %."""
    identity = run.load_identity()
    spec = ContinuationsSpec.model_validate_json(json.dumps(identity.spec["continuations"]))
    asked = teacher_of(run)
    with ExitStack() as held:
        with log.phase("load"):
            data = ShardSet.open(run.input_path("data"))
            data.verify()
            check_rows(data, spec.rows)
            folder = teacher_folder(run)
            said = compare_vocabularies(folder, data.tokenizer_dir).notes
            teacher = open_asked(run, log, asked, folder, held, rows=None)
            require(teacher, "sample", "continuing a corpus", instead=CHOOSE_ANOTHER)
        for note in dict.fromkeys((*said, *teacher.notes)):
            log.say(note)
        run.out.mkdir(parents=True, exist_ok=True)
        question = Continuing(data.chunk, spec.count, spec.temperatures, data.eos_id, int(identity.spec["seed"]))
        open_store = partial(open_for_drawing, teacher=teacher, asked=question)
        take_over(run, log, STORE, open_store)
        with open_store(run.out / STORE) as store:
            new, agreement, reached = fill(store, teacher, data, question, spec, log, asked)
    require_return(log, teacher)  # before anything else of the pipeline is loaded
    with ContinuationStore.open(run.out / STORE) as store:
        made, stats = store.made, store.stats()
    record = {
        "identity": made.identity,
        "rows": stats["rows"],
        "new_rows": new,
        "sequences": reached.total,
        "chunk": made.chunk,
        "count": made.count,
        "temperatures": list(made.temperatures),
        "batch_size": spec.batch_size,
        "training_rows": spec.rows or len(data.train),
        "seed": made.seed,
        "teacher": answers_of(asked) | in_force(teacher),
        "bytes": stats["bytes"],
        "agreement": None
        if agreement is None
        else {f"worst_{agreement.unit}": agreement.worst, "tokens": agreement.tokens},
    }
    write_record(run.out / "continuations.json", record)
    compared = "not compared" if agreement is None else f"differs by at most {agreement.worst:.2g} {agreement.unit}"
    temperatures = ", ".join(f"{t:g}" for t in made.temperatures)
    log.say(
        f"coverage {reached}; {made.count} chunks of {made.chunk} tokens after each chunk at T = {temperatures}; "
        f"{stats['bytes'] / 1e6:.1f} MB; asked another way: {compared}"
    )


def fill(
    store: ContinuationStore,
    teacher: Continuer,
    data: ShardSet,
    question: Continuing,
    spec: ContinuationsSpec,
    log: EventLog,
    asked: TeacherSpec,
) -> tuple[int, DrawsAgreement | None, Coverage]:
    """Draw what ``store`` lacks and compare a sample: how many rows are new, how they agree, the coverage.

    A TeacherFailure ends it; the log then says what is kept. FailedError where the store is not whole afterwards. No
    agreement where every row was taken over, and the teacher need not be there.
    """
    told = AskedLog(log, teacher, "continuations")
    before = coverage(store, data, spec.rows)
    if before.present:
        log.say(f"resumes: {before} are in the store")
    agreement = None
    try:
        with (
            log.phase("continue", present=before.present, total=before.total),
            idleness(log, teacher, asked),
        ):
            new = continue_all(
                teacher, data, store, question, rows=spec.rows, batch_size=spec.batch_size, progress=told.progress
            )
        reached = coverage(store, data, spec.rows)
        if reached.present != reached.total:
            raise FailedError(f"coverage {reached}: rows are missing", next="run the same again; it resumes")
        if new:
            with log.phase("verify"):
                agreement = check_draws(teacher, sampled(store, data, spec.rows, sample=_CHECKED_ROWS), question)
            if agreement is None:
                log.warning("the teacher does not score texts: what it drew could not be compared with anything")
        else:
            log.warning("every row was in the store: the teacher was not asked, and nothing was compared")
    except TeacherFailure:
        told.lost(coverage(store, data, spec.rows), store)
        raise
    told.metrics(reached.present, kept=before)
    return new, agreement, reached


def open_for_drawing(path: Path, *, teacher: Continuer, asked: Continuing) -> ContinuationStore:
    """The store of this run, new or as an earlier start left it; refused where it was made for something else."""
    made = {
        "identity": teacher.identity.as_json(),
        "chunk": asked.chunk,
        "count": asked.count,
        "temperatures": asked.temperatures,
        "vocab_size": teacher.vocab_size,
        "eos_id": asked.eos_id,
        "seed": asked.seed,
    }
    if path.exists():
        return ContinuationStore.open(path, readonly=False, **made)
    return ContinuationStore.create(path, made.pop("identity"), **made)
