"""Recipe of the run kind ``teacher``: a small Qwen3 model trained on the corpus, saved as any teacher is."""

from __future__ import annotations

import json
from functools import partial
from typing import Any

import torch

from latentforge.data.order import BatchOrder
from latentforge.data.shards import ShardSet
from latentforge.events import EventLog, read_events
from latentforge.spec.endurance import endurance_of, meaning_of
from latentforge.spec.run import RunDir, write_record
from latentforge.spec.sections import TeacherSpec
from latentforge.students.causal import ModelShape, Student, new_model
from latentforge.teachers.folder import check_model_folder
from latentforge.train import effective
from latentforge.train.best import Best
from latentforge.train.course import Course
from latentforge.train.engines.single import Single
from latentforge.train.falsifiers import judge
from latentforge.train.flops import training_flops
from latentforge.train.keeping import Keeper, position_of
from latentforge.train.loop import Evaluation, Objective, Trainer, evaluate, log_compiles, log_step, rehearse
from latentforge.train.optimiser import MasterOptimiser, Updates
from latentforge.train.products import save_model, start_digests
from latentforge.train.resume import known_evaluation, open_predecessor
from latentforge.train.setting import (
    choose_device,
    choose_kernel,
    evaluation_batches,
    fit_threads,
    padding_of,
    training_batch,
)
from latentforge.train.stopping import deferred_stop, stop_requested

MODEL = "teacher"
CHECKPOINTS = {MODEL: ""}
WEIGHT_DECAY = 0.01
CLIP_NORM = 1.0


def run(run: RunDir, log: EventLog) -> None:
    """Train by cross-entropy with warm-up and cosine decay; evaluate on held-out rows at both ends; save; judge."""
    identity = run.load_identity()
    spec = TeacherSpec.model_validate_json(json.dumps(identity.spec["teacher"]))
    seed = int(identity.spec["seed"])

    with log.phase("load"):
        data = ShardSet.open(run.input_path("data"))
        data.verify()
        device = choose_device("auto")
        kernel, slow = choose_kernel(device, torch.float32)
        shape = ModelShape(spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.intermediate)
        model = new_model(
            shape, vocab_size=data.vocab_size, positions=data.sequence_length, eos_id=data.eos_id, seed=seed
        )
        predictions = data.sequence_length - 1
        flops = spec.steps * training_flops(model, predictions, spec.batch_size * predictions)
        fit_threads(flops / spec.steps)
        teacher = Student(model, data.vocab_size, padding_of(data)).to(device)
        updates = Updates(spec.learning_rate, WEIGHT_DECAY, spec.warmup_steps, spec.steps, CLIP_NORM)
        optimiser = MasterOptimiser(model, updates)
        trainer = Trainer(teacher, Single(teacher, optimiser), Objective(1.0, 1.0, 0.0, kernel))
        order = BatchOrder(len(data.train), spec.batch_size, seed)
        start = start_digests(optimiser)
        earlier = open_predecessor(run, log, CHECKPOINTS).get(MODEL)
    if slow:
        log.warning(slow)

    in_force = {
        "seed": order.seed,
        "endurance": meaning_of(endurance_of(run)),
        "teacher": {
            "model": None,
            "layers": model.config.num_hidden_layers,
            "hidden": model.config.hidden_size,
            "heads": model.config.num_attention_heads,
            "kv_heads": model.config.num_key_value_heads,
            "intermediate": model.config.intermediate_size,
            "steps": spec.steps,
            "batch_size": len(training_batch(data.train, order, 0, device)),
            "learning_rate": optimiser.peak_learning_rate,
            "warmup_steps": spec.warmup_steps,
            "checkpoint_every": spec.checkpoint_every,
            "validate_every": spec.validate_every,
            "keep": spec.keep,
            "weight_decay": optimiser.weight_decay,
            "clip_norm": optimiser.clip_norm,
        },
        "predictions_per_sequence": predictions,
    }
    effective.settle(
        run,
        identity,
        in_force,
        device=device,
        kernel=kernel,
        tokenizer_sha256=data.tokenizer_sha256,
        flops={"teacher": flops},
    )
    if device.type != "cpu":
        with log.phase("rehearse"):
            rehearse(trainer, training_batch(data.train, order, 0, device), None)
            rows = evaluation_batches(data.heldout, device, at_most=spec.batch_size)
            evaluate(teacher, rows, None, temperature=1.0, backend=kernel)
    trainer.watch.drain()
    log.ready(requested=identity.spec, effective=in_force)

    keeper = Keeper(
        run, log, model, optimiser, MODEL, start, spec.steps, spec.checkpoint_every, position_of(data, order)
    )
    best = Best(keeper, wanted=spec.keep == "best", every=spec.validate_every)
    best.carry(earlier)
    before, first = known_evaluation(earlier, MODEL), keeper.resume(earlier)
    if before is None:
        before = evaluated(log, teacher, data, kernel, spec.batch_size)
        say_held_out(log, before, step=0)

    with log.phase("train"), deferred_stop(), keeper:
        course = Course(keeper, best, first=first or 0, earlier=earlier)
        for step in course.steps():
            batch = training_batch(data.train, order, step, device)
            result = course.attempt(step, partial(trainer.step, step, batch, None))
            if result is None:
                continue
            log_step(log, result, step=step + 1, steps=spec.steps, model=MODEL)
            if course.went_back(step, result.loss):
                continue
            if best.due(step + 1):
                found = evaluated(log, teacher, data, kernel, spec.batch_size)
                say_held_out(log, found, step=step + 1)
                best.offer(step + 1, found.loss)
            keeper.after(step + 1, stop_requested())

    after = evaluated(log, teacher, data, kernel, spec.batch_size)
    say_held_out(log, after, step=spec.steps)
    kept = best.put_back(spec.steps, after.loss)
    if kept != spec.steps:
        after = evaluated(log, teacher, data, kernel, spec.batch_size)
        say_held_out(log, after, step=kept, kept=True)
    log_compiles(log, trainer.watch.drain(), step=spec.steps, model=MODEL)

    with log.phase("save"):
        run.out.mkdir(exist_ok=True)
        save_model(
            teacher,
            optimiser.weights(),
            run.out / "model",
            tokenizer=data.tokenizer_dir,
            start=start,
            log=log,
            step=spec.steps,
            model=MODEL,
        )
        folder = check_model_folder(run.out / "model")
        made = {"sha256": folder.sha256, "parameters": folder.parameters}
        record = {**made, "heldout_loss": after.loss, "kept_step": kept}
        write_record(run.out / "teacher.json", record)
    log.say(f"teacher of {folder.parameters} parameters: held-out loss {before.loss:.4f} to {after.loss:.4f}")
    log.say(f"flops {flops / 1e12:.2f} TFLOP")
    for verdict in judge(read_events(run.events_file)):
        log.verdict(verdict)


def evaluated(log: EventLog, teacher: Student, data: ShardSet, kernel: str, at_most: int) -> Evaluation:
    """Cross-entropy over all held-out rows, no more of them at a time than a training pass takes."""
    rows = evaluation_batches(data.heldout, next(teacher.parameters()).device, at_most=at_most)
    with log.phase("evaluate"):
        return evaluate(teacher, rows, None, temperature=1.0, backend=kernel)


def say_held_out(log: EventLog, value: Evaluation, *, step: int, kept: bool = False) -> None:
    """Say held-out cross-entropy as an event; ``kept``: of the weights that were put back, those of ``step``."""
    of: dict[str, Any] = {"step": step, "split": "heldout", "model": MODEL, "rows_sha256": value.rows_sha256}
    log.metric("val_loss", value.loss, kept=kept, **of)
