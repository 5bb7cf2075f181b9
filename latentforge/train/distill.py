"""Recipe of the run kind ``distill``: a student from a teacher's targets, and its twin that sees none of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from latentforge.data.order import BatchOrder
from latentforge.data.shards import ShardSet
from latentforge.errors import FailedError, LatentForgeError
from latentforge.events import EventLog, read_events, standing
from latentforge.spec.run import RunDir, write_record
from latentforge.spec.sections import DistillSpec
from latentforge.students.adapters import adapted, adapters, save_adapter, strayed, trained_part
from latentforge.students.causal import Student
from latentforge.teachers import prefetch
from latentforge.teachers.alignment import compare_vocabularies
from latentforge.teachers.crossed import require_coverage
from latentforge.teachers.failures import TeacherFailure
from latentforge.teachers.hf import HFTeacher
from latentforge.teachers.likeness import check_unlike
from latentforge.train import effective
from latentforge.train.across import align
from latentforge.train.assembly import (
    PRECISIONS,
    Job,
    make_feed,
    make_trainer,
    open_supply,
    start_model,
    values_in_force,
    whole_student,
)
from latentforge.train.best import Best
from latentforge.train.canary import require_canary
from latentforge.train.canary_falsifiers import SAME
from latentforge.train.course import Course
from latentforge.train.engines.world import World
from latentforge.train.falsifiers import judge
from latentforge.train.flops import training_flops
from latentforge.train.keeping import Keeper, position_of
from latentforge.train.loop import Evaluation, Trainer, evaluate, log_compiles, log_step, rehearse
from latentforge.train.onpolicy import OnPolicy
from latentforge.train.products import frozen_digests, save_model, start_digests
from latentforge.train.resume import Earlier, known_evaluation, open_predecessor
from latentforge.train.samples import samples
from latentforge.train.score import teacher_folder
from latentforge.train.setting import choose_device, choose_kernel, evaluation_batches, fit_threads, training_batch
from latentforge.train.stopping import Interrupted, deferred_stop, stop_requested
from latentforge.train.supply import LOSSES
from latentforge.train.tally import Tally, percent
from latentforge.train.teaching import report_precision
from latentforge.verdicts import ExitCode

TWIN = "F-DISTILL-SMOKE-002"
CHECKPOINTS = {"student": "", "twin": "twin"}


@dataclass(frozen=True)
class Trained:
    """One model after its steps: who trained it, the digests before step 1 of its trained tensors and of those that
    stand frozen ``beside`` adapters, held-out values at both ends, the
    step whose weights it has now, and what its steps came to."""

    trainer: Trainer
    start: dict[str, str]
    beside: dict[str, str]
    before: Evaluation
    after: Evaluation
    kept: int
    tally: Tally


def run(run: RunDir, log: EventLog) -> None:
    """Load, compare asked with effective, train the student, train its twin where asked, save, judge."""
    with ExitStack() as held:
        distil(run, log, held)


def distil(run: RunDir, log: EventLog, held: ExitStack) -> None:
    """The run from its first phase to its verdicts; ``held`` closes what it opens."""
    identity = run.load_identity()
    spec = DistillSpec.model_validate_json(json.dumps(identity.spec["distill"]))
    seed, profile = int(identity.spec["seed"]), identity.spec["profile"]

    with log.phase("load"):
        data = ShardSet.open(run.input_path("data"))
        data.verify()
        device = choose_device(spec.device)
        drawing = ("latent_decode",) if spec.on_policy > 0.0 else ()
        kernel, slow = choose_kernel(device, PRECISIONS[spec.precision], also=drawing)
        teacher = teacher_folder(run)
        across = align(teacher, data, log, temperature=spec.temperature) if spec.cross_tokenizer else None
        if across is not None:
            require_coverage(across[1], spec.min_coverage)
        notes = [] if across else list(compare_vocabularies(teacher, data.tokenizer_dir).notes)
        supply, critic = open_supply(run, spec, teacher, device, data, held, log.say, across)
        report_precision(run, log, critic.source)
        notes += [*supply.source.notes, *critic.source.notes]
        start = start_model(run, spec.student, data, data.tokenizer_dir if across else teacher, seed)
        predictions = data.sequence_length - 1
        step_flops = training_flops(start, predictions, spec.batch_size * predictions)
        fit_threads(step_flops)
        if run.has_input("student_init"):
            if has_weights(teacher):
                same = check_unlike(teacher, run.input_path("student_init"), profile=profile)
            else:
                same = "the teacher's folder holds no weights: whether the student starts as its copy is not known"
            if same:
                log.warning(same)
        require_canary(run, identity)
        order = BatchOrder(len(data.train), spec.batch_size, seed)
        draws_by = "reference" if kernel == "reference" else "auto"
        on_policy = OnPolicy(spec.on_policy, spec.on_policy_tokens, spec.on_policy_temperature, seed, draws_by)
        job = Job(run, log, spec, data, order, supply, critic, on_policy, device, kernel)
        trainer = make_trainer(job, start, kd_weight=spec.kd_weight, ce_weight=spec.ce_weight)
        earlier = open_predecessor(run, log, CHECKPOINTS)
    for note in dict.fromkeys(notes):
        log.say(note)
    if across is not None and spec.ce_weight == 0.0 and across[1].share < 1.0:
        log.warning(
            f"distill.ce_weight = 0: {percent(1.0 - across[1].share)} of the positions have no row of the teacher's, "
            "and are trained on nothing"
        )
    if slow:
        log.warning(slow)

    in_force = values_in_force(job, trainer, profile)
    if spec.kd_weight > 0 and in_force["targets_fetched_ahead"] < spec.prefetch:
        log.say(f"dense targets of {spec.prefetch} batches would take more than 1 GiB: none are fetched ahead")
    wants_twin = TWIN in spec.require
    flops = dict.fromkeys(("student", "twin") if wants_twin else ("student",), spec.steps * step_flops)
    world = World.here()
    effective.settle(
        run,
        identity,
        in_force,
        device=device,
        kernel=kernel,
        tokenizer_sha256=data.tokenizer_sha256,
        flops=flops,
    )
    # The same start, data and steps; cross-entropy alone, with all the weight where the student has none of it.
    twin = partial(make_trainer, job, start, kd_weight=0.0, ce_weight=spec.ce_weight or 1.0)
    # What is compiled is compiled before the run is ready, the twin's layers too.
    rival = twin() if wants_twin and spec.compile else None
    if device.type != "cpu" or spec.compile:
        with log.phase("rehearse"):
            batch = training_batch(data.train, order, 0, device)
            for one in (trainer, rival):
                if one is not None:
                    rehearse(one, batch, supply.targets)
            if drawing:
                on_policy.write(trainer.student, batch[:1], 0, 0)
            if device.type != "cpu":
                held_out_once(job, trainer)
    record_compiled(run, trainer)
    trainer.watch.drain()
    if rival is not None:
        rival.watch.drain()
    log.ready(requested=identity.spec, effective=in_force)

    student = train(job, trainer, "student", earlier.get("student"), profile)
    trained = {"student": student}
    if wants_twin:
        trained["twin"] = train(job, rival or twin(), "twin", earlier.get("twin"), profile)
    record_compiled(run, trainer)

    plain = {name: whole_student(job, start, one.trainer) for name, one in trained.items()}
    trained = {name: as_saved(job, name, one, plain[name][0]) for name, one in trained.items()}
    student = trained["student"]
    log.say(f"final_loss={student.after.loss:.4f} (held-out, step {student.kept})")
    if not world.first:
        return
    with log.phase("save"):
        save_model(
            *plain["student"],
            run.out / "student",
            tokenizer=data.tokenizer_dir,
            start=student.start,
            log=log,
            step=spec.steps,
            model="student",
            **keep_adapters(run, student, start=start, product=plain["student"][0].model),
        )
        models = {name: one for name, (one, _) in plain.items()}
        if isinstance(supply.source, HFTeacher):
            models = {"teacher": Student(supply.source.model, data.vocab_size), **models}
        elif profile == "smoke" and has_weights(teacher) and not supply.elsewhere:
            # The teacher of a full run is not loaded beside the student only to show a sample.
            models = {"teacher": Student(HFTeacher.open(teacher, device=str(device)).model, data.vocab_size), **models}
        write_record(run.out / "samples.json", samples(models, data, device))
        write_record(run.out / "metrics.json", metrics(trained, spec, flops))
    spent = {**flops_of_inputs(run), **flops}
    parts = " + ".join(f"{name} {value / 1e12:.2f}" for name, value in spent.items())
    log.say(f"flops {parts} = {sum(spent.values()) / 1e12:.2f} TFLOP")
    for verdict in judge(read_events(run.events_file), spec.require):
        log.verdict(verdict)


def train(job: Job, trainer: Trainer, model: str, earlier: Earlier | None, profile: str) -> Trained:
    """All steps of one model, from its start or its predecessor's last checkpoint, held-out values at both ends."""
    spec, log = job.spec, job.log
    start, beside = start_digests(trainer.optimiser), frozen_digests(trainer.student.model)
    world = trainer.engine.world
    trained, optimiser = trained_part(trainer.student.model), trainer.optimiser
    position, below = position_of(job.data, job.order), CHECKPOINTS[model]
    keeper = Keeper(job.run, log, trained, optimiser, model, start, spec.steps, spec.checkpoint_every, position, below)
    best = Best(keeper, wanted=spec.keep == "best", every=spec.validate_every)
    best.carry(earlier)
    before = known_evaluation(earlier, model)
    if before is None:
        before = held_out(job, trainer.engine.module, teacher_needed=True)
        report(job, model, before, step=0)
    first = keeper.resume(earlier) or 0
    tally = Tally() if earlier is None else Tally.of(standing(earlier.events), model=model, until=first)
    if before.kl is not None and before.kl < SAME and model == "student":
        message = f"val_kl is {before.kl:.2e} at step 0: the student already answers as its teacher does"
        if profile == "full":
            raise FailedError(message, next="name another teacher or student")
        log.warning(message)

    with log.phase("train" if model == "student" else model), deferred_stop(), keeper:
        course = Course(keeper, best, first=first, earlier=earlier)
        for leg in course.legs():
            with make_feed(job, trainer, leg) as feed:
                for step in course.along(leg):
                    try:
                        given = feed.next(step, trainer.student)
                    except (TeacherFailure, prefetch.Interrupted) as stopped:
                        if step > (keeper.kept or 0) and world.size == 1:
                            keeper.keep(step)
                        report_teaching(job, trainer, model, tally, step=step)
                        raise before_step(step, stopped, model) from stopped
                    result = course.attempt(step, partial(trainer.step, step, given.tokens, given.lessons))
                    if result is None:
                        continue
                    result = replace(result, seconds=result.seconds + given.wait_seconds)
                    fields = summed(given.fields, world)
                    log_step(log, result, step=step + 1, steps=spec.steps, model=model, **rounded(fields))
                    say_notes(job, step + 1)
                    if course.went_back(step, result.loss):
                        events = standing(read_events(job.run.events_file))
                        tally = Tally.of(events, model=model, until=spec.steps)
                        continue
                    tally.add({"rows": result.rows, "sequences": result.sequences, **fields})
                    if best.due(step + 1):
                        found = held_out(job, trainer.engine.module)
                        report(job, model, found, step=step + 1)
                        best.offer(step + 1, found.loss)
                    if (signal := world.signal(stop_requested())) is not None:
                        report_teaching(job, trainer, model, tally, step=step + 1)
                    keeper.after(step + 1, signal)

    after = held_out(job, trainer.engine.module)
    report(job, model, after, step=spec.steps)
    kept = best.put_back(spec.steps, after.loss)
    if kept != spec.steps:
        after = held_out(job, trainer.engine.module)
        report(job, model, after, step=kept, kept=True)
    log_compiles(log, trainer.watch.drain(), step=spec.steps, model=model)
    report_teaching(job, trainer, model, tally, step=spec.steps)
    return Trained(trainer, start, beside, before, after, kept, tally)


def as_saved(job: Job, model: str, one: Trained, product: Student) -> Trained:
    """A model with adapters, measured once more as the ``product`` that they are merged into: that is what is saved,
    and of bf16 it is rounded once more. Another model is as it was measured."""
    if adapted(one.trainer.student.model) is None:
        return one
    after = held_out(job, product)
    report(job, model, after, step=one.kept, kept=True)
    return replace(one, after=after)


def held_out(job: Job, student: nn.Module, *, teacher_needed: bool = False) -> Evaluation:
    """A student's cross-entropy and KL to the teacher over the held-out rows, always the same ones in the same order.

    Without the KL where the teacher is lost and the run goes on; never so where its answer cannot be trusted, nor where
    it is ``teacher_needed``: before step 1 nothing has shown yet that there is a teacher at all.
    """
    settings: dict[str, Any] = {"temperature": job.spec.temperature, "backend": job.kernel}
    with job.log.phase("evaluate"):
        try:
            return evaluate(student, held_out_batches(job), job.supply.held_out, **settings)
        except TeacherFailure as failure:
            if teacher_needed or job.supply.on_loss == "stop" or failure.kind not in LOSSES:
                raise
            job.log.warning(f"the teacher is lost, so KL to it is not measured: {failure}")
        return evaluate(student, held_out_batches(job), None, **settings)


def held_out_batches(job: Job) -> Iterator[Tensor]:
    """The held-out rows, no more of them at a time than a training pass takes: what its memory is planned by."""
    rows = World.here().rows(job.spec.batch_size, job.spec.micro_batch_size)
    return evaluation_batches(job.data.heldout, job.device, at_most=rows)


def record_compiled(run: RunDir, trainer: Trainer) -> None:
    """Say in ``effective.json`` what of the student's passes really ran compiled, where that was asked for."""
    if trainer.compiled is not None:
        effective.record(run, compiled=trainer.compiled.record())


def held_out_once(job: Job, trainer: Trainer) -> None:
    """The held-out passes with their shapes, for what they load; the values are thrown away."""
    batches = {len(batch): batch for batch in held_out_batches(job)}
    settings: dict[str, Any] = {"temperature": job.spec.temperature, "backend": job.kernel}
    evaluate(trainer.engine.module, batches.values(), job.supply.held_out, **settings)


def report(job: Job, model: str, value: Evaluation, *, step: int, kept: bool = False) -> None:
    """Say held-out values as events (``kept``: of the weights that were put back, those of ``step``), and the student's
    loss on the line that people look for."""
    of: dict[str, Any] = {"step": step, "split": "heldout", "model": model, "rows_sha256": value.rows_sha256}
    job.log.metric("val_loss", value.loss, kept=kept, **of)
    if value.kl is not None:
        job.log.metric("val_kl", value.kl, kept=kept, **of)
    if model == "student" and not kept:
        job.log.say(f"{'val_loss' if step else 'initial_loss'}={value.loss:.4f} (held-out, step {step})")


def report_teaching(job: Job, trainer: Trainer, model: str, tally: Tally, *, step: int) -> None:
    """Say what share of the rows had targets, what the teacher's time was spent on, and what it counted itself."""
    if trainer.objective.kd_weight == 0:
        return
    fields = {**tally.fields(), **job.judge.metrics()}
    job.log.emit("metric", name="kd_coverage", value=tally.coverage, step=step, split="train", model=model, **fields)
    job.log.say(tally.sentence())
    if tally.on_policy_sequences:
        share = tally.on_policy_sequences / tally.sequences
        job.log.say(f"on-policy share {percent(share)}: {tally.on_policy_tokens} tokens were the student's own")


def say_notes(job: Job, step: int) -> None:
    """Say what became of the teacher since the step before."""
    while job.supply.notes:
        job.log.warning(f"step {step}: {job.supply.notes.popleft()}")


def before_step(step: int, stopped: Exception, model: str) -> BaseException:
    """The end of a run that was given nothing to train on: its teacher is lost, or it was told to stop."""
    if isinstance(stopped, TeacherFailure):
        return lost_teacher(stopped, model, step)
    return Interrupted(f"interrupted by {stop_requested()} before step {step + 1} of the {model}")


def lost_teacher(failure: TeacherFailure, model: str, step: int) -> LatentForgeError:
    """The end of a run whose teacher is lost: something was sent and done, so it is no failure of transport."""
    return LatentForgeError(
        f"the teacher is lost before step {step + 1} of the {model}: {failure}",
        next="mend the teacher, then resume from the last checkpoint:  latentforge dispatch go --attempt next",
        code=ExitCode.UNKNOWN if failure.code is ExitCode.TRANSPORT else failure.code,
    )


def summed(fields: dict[str, Any], world: World) -> dict[str, Any]:
    """The rows that had targets, over all processes; seconds are those of the one that writes them."""
    names = [name for name in ("target_rows", "silent_rows") if name in fields]
    counts = world.sums(*(fields[name] for name in names)) if names else []
    return fields | {name: int(count) for name, count in zip(names, counts, strict=True)}


def rounded(fields: dict[str, Any]) -> dict[str, Any]:
    """Seconds to the microsecond."""
    return {name: round(value, 6) if isinstance(value, float) else value for name, value in fields.items()}


def metrics(trained: dict[str, Trained], spec: DistillSpec, flops: dict[str, float]) -> dict[str, Any]:
    """``metrics.json``: held-out values of each model at both ends, nats a token."""
    values = {
        name: {
            "initial": {"val_loss": one.before.loss, "val_kl": one.before.kl},
            "final": {"val_loss": one.after.loss, "val_kl": one.after.kl},
            "kept_step": one.kept,
            **(one.tally.record() if one.trainer.objective.kd_weight > 0 else {}),
        }
        for name, one in trained.items()
    }
    return {"steps": spec.steps, "kl_temperature": spec.temperature, "flops": flops, "models": values}


def keep_adapters(run: RunDir, student: Trained, *, start: Any, product: Any) -> dict[str, Any]:
    """Save the adapters of a student beside its merged folder, and say which of its frozen tensors are other ones than
    before the first step, or in the ``product`` than in the ``start`` where they have no adapters; nothing of a student
    that has none."""
    model = student.trainer.student.model
    lora = adapted(model)
    if lora is None:
        return {}
    weights, folder = student.trainer.optimiser.weights(), run.out / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    base = f"sha256:{run.input_ref('student_init')['sha256']}"
    save_adapter(lora, {name: weights[name] for name, _ in adapters(model)}, folder, base=base)
    changed = [name for name, digest in frozen_digests(model).items() if digest != student.beside[name]]
    changed += [f"out/student: {name}" for name in strayed(product, start, weights)]
    return {"frozen": len(student.beside), "frozen_changed": changed}


def has_weights(folder: Path) -> bool:
    """Whether a teacher's folder could be loaded: of one that a server runs the tokenizer is enough."""
    return any(folder.glob("*.safetensors"))


def flops_of_inputs(run: RunDir) -> dict[str, float]:
    """What the runs that this one builds on spent, by phase."""
    found: dict[str, float] = {}
    for name in run.load_launch().resolved:
        source = run.input_run(name)
        if source is not None:
            found |= effective.read(source).get("flops", {})
    return found
