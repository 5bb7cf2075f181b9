"""Recipe of the run kind ``latent``: a student of K tokens a step, from text and what a teacher says of it."""

from __future__ import annotations

import copy
import json
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentforge.data.order import BatchOrder
from latentforge.data.shards import ShardSet
from latentforge.errors import RefusedError
from latentforge.events import KEPT, EventLog, read_events
from latentforge.spec.endurance import endurance_of, meaning_of
from latentforge.spec.latent import LatentSpec
from latentforge.spec.run import RunDir, write_record
from latentforge.students.latent.backbone import DecoderShape
from latentforge.students.latent.causality import changes
from latentforge.students.latent.chunks import chunked, valid
from latentforge.students.latent.codec import Codec
from latentforge.students.latent.energy import EnergySettings
from latentforge.students.latent.flops import TokenCost, latent_training
from latentforge.students.latent.student import LatentShape, LatentStudent
from latentforge.targets.continuations import ContinuationStore
from latentforge.train import effective
from latentforge.train.assembly import PRECISIONS, open_stored, require_rows
from latentforge.train.best import Best
from latentforge.train.canary import require_canary
from latentforge.train.course import Course
from latentforge.train.engines.choice import Parts, engine_of
from latentforge.train.engines.protocol import at_first
from latentforge.train.falsifiers import judge
from latentforge.train.held import take_peak
from latentforge.train.keeping import Keeper, position_of
from latentforge.train.latent_falsifiers import MODEL
from latentforge.train.latent_lessons import TEXT, Teaching
from latentforge.train.latent_products import save_writer, written
from latentforge.train.latent_trainer import HeldOut, LatentTrainer
from latentforge.train.loop import log_compiles, log_step
from latentforge.train.optimiser import Updates
from latentforge.train.products import start_digests
from latentforge.train.resume import open_predecessor
from latentforge.train.score import teacher_folder
from latentforge.train.setting import choose_device, choose_kernel, fit_threads, training_batch
from latentforge.train.stopping import deferred_stop, stop_requested

CHECKPOINTS = {MODEL: ""}
CAUSAL_ROWS = 4
"""Held-out rows in which chunks are changed."""


def run(run: RunDir, log: EventLog) -> None:
    """Train the student, from its start or its predecessor's last checkpoint; measure, save, judge."""
    with ExitStack() as held:
        _run(run, log, held)


def _run(run: RunDir, log: EventLog, held: ExitStack) -> None:
    identity = run.load_identity()
    spec = LatentSpec.model_validate_json(json.dumps(identity.spec["latent"]))
    seed = int(identity.spec["seed"])

    with log.phase("load"):
        require_canary(run, identity)
        data = ShardSet.open(run.input_path("data"))
        data.verify()
        device = choose_device(spec.device, section="latent")
        kernel, slow = choose_kernel(device, PRECISIONS[spec.precision], op="linear_kd_loss", also=("latent_decode",))
        codec = open_codec(run, data).to(device)
        teaching = open_teaching(run, spec, codec, data, kernel, held)
        student = new_student(spec, codec, seed=seed).to(device)
        plain = None if spec.distributed == "none" else copy.deepcopy(student)
        cost = training_cost(student, teaching, positions=data.sequence_length // data.chunk, rows=len(data.train))
        flops = cost.total * spec.steps * spec.batch_size * (data.sequence_length - data.chunk)
        fit_threads(flops / spec.steps)
        updates = Updates(spec.learning_rate, spec.weight_decay, spec.warmup_steps, spec.steps, spec.clip_norm)
        parts = Parts(student, student, layers=student.layers(), some_unused=True)
        engine = engine_of(spec.distributed, parts, updates, precision=PRECISIONS[spec.precision])
        optimiser, world = engine.optimiser, engine.world
        trainer = LatentTrainer(student, engine, teaching, seed=seed, micro_batch_size=spec.micro_batch_size)
        order = BatchOrder(len(data.train), spec.batch_size, seed)
        start = start_digests(optimiser)
        earlier = open_predecessor(run, log, CHECKPOINTS).get(MODEL)
    if slow:
        log.warning(slow)
    for sentence in teaching.notes:
        log.say(sentence)

    in_force = values_in_force(run, spec, trainer, order, data, device)
    effective.settle(
        run,
        identity,
        in_force,
        device=device,
        kernel=kernel,
        tokenizer_sha256=data.tokenizer_sha256,
        flops={MODEL: flops},
    )
    if device.type != "cpu":
        with log.phase("rehearse"):
            trainer.rehearse(data, training_batch(data.train, order, 0, device), covered_rows(teaching, order, 0))
    trainer.watch.drain()
    log.ready(requested=identity.spec, effective=in_force)

    position = position_of(data, order)
    keeper = Keeper(run, log, student, optimiser, MODEL, start, spec.steps, spec.checkpoint_every, position)
    best = Best(keeper, wanted=spec.keep == "best", every=spec.validate_every)
    best.carry(earlier)
    first, before = keeper.resume(earlier), None
    if first is None:
        with log.phase("evaluate"):
            before = trainer.held_out(data)
        say_held_out(log, before, step=0)

    take_peak()
    with log.phase("train"), deferred_stop(), keeper:
        course = Course(keeper, best, first=first or 0, earlier=earlier)
        for step in course.steps():
            visits, covered = torch.from_numpy(order.visits(step)), covered_rows(teaching, order, step)
            batch = training_batch(data.train, order, step, device)
            done = course.attempt(step, partial(trainer.step, step, batch, visits=visits, covered=covered))
            if done is None:
                continue
            log_step(log, done.result, step=step + 1, steps=spec.steps, model=MODEL, **done.fields())
            signal, last = world.signal(stop_requested()), step + 1 == spec.steps
            if last or signal is not None or int(order.epoch(step + 1)) > int(order.epoch(step)):
                log.memory(epoch=int(order.epoch(step)) + 1, step=step + 1, epoch_peak_bytes=take_peak())
            if course.went_back(step, done.result.loss):
                continue
            if best.due(step + 1):
                found = trainer.held_out(data)
                say_held_out(log, found, step=step + 1)
                best.offer(step + 1, found.loss)
            keeper.after(step + 1, signal)

    with log.phase("evaluate"):
        after = trainer.held_out(data)
        say_held_out(log, after, step=spec.steps)
        kept = best.put_back(spec.steps, after.loss)
        if put_back := kept != spec.steps:
            after = trainer.held_out(data)
            say_held_out(log, after, step=kept, kept=True)
        weights = at_first(world, optimiser.each_weight())
        if not world.first:
            return
        student = student if plain is None else filled(plain, weights, engine.precision)
        rows = torch.from_numpy(data.heldout.rows(np.arange(min(CAUSAL_ROWS, len(data.heldout))))).to(device)
        text = chunked(rows, data.chunk)
        change = changes(student, text, valid(text, data.eos_id))
    log_compiles(log, trainer.watch.drain(), step=spec.steps, model=MODEL)
    log.say(f"final_loss={after.loss:.4f} (held-out, step {kept})")
    of: dict[str, Any] = {"name": "change_before_a_chunk", "step": kept, "split": "heldout", "model": MODEL}
    of |= {KEPT: True} if put_back else {}
    log.emit("metric", value=change.before, after=change.after, places=change.places, **of)
    if teaching.rows is not None or teaching.continued is not None:
        # What a store lacks ends the run: no teacher was asked for anything.
        log.emit("metric", name="teacher", value=0, step=spec.steps, split="train", model=MODEL, teacher_hit_rate=1.0)

    with log.phase("save"):
        run.out.mkdir(exist_ok=True)
        save_writer(run, log, student, codec, weights, data, start=start, step=spec.steps)
        write_record(run.out / "samples.json", written(run.out / "student", data, device))
        reports = {"initial": None if before is None else vars(before), "final": vars(after)}
        causality = {"before": change.before, "after": change.after, "places": change.places}
        record = {
            "steps": spec.steps,
            "kept_step": kept,
            "flops": {MODEL: flops},
            "heldout": reports,
            "causality": causality,
        }
        write_record(run.out / "metrics.json", record)
    log.say(f"flops {flops / 1e12:.2f} TFLOP")
    for verdict in judge(read_events(run.events_file), spec.require):
        log.verdict(verdict)


def filled(student: LatentStudent, weights: dict[str, Tensor], precision: torch.dtype) -> LatentStudent:
    """A student with the weights of one that several processes have trained, as one process would have it."""
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            parameter.data = weights[name].to(parameter.device, precision)
    return student


def open_codec(run: RunDir, data: ShardSet) -> Codec:
    """The codec of the input ``codec``, frozen; refused where it is not one of this data's chunks and tokens."""
    folder = run.input_path("codec") / "codec"
    codec = Codec.open(folder, tokenizer_sha256=data.tokenizer_sha256)
    for name, wanted in (("chunk", data.chunk), ("vocab_size", data.vocab_size)):
        found = getattr(codec.shape, name)
        if found != wanted:
            raise RefusedError(f"{folder}: {name} = {found}, and the data's is {wanted}")
    return codec


def new_student(spec: LatentSpec, codec: Codec, *, seed: int) -> LatentStudent:
    """The student before its first step; it writes the codec's chunks, latents and tokens."""
    asked, shape = spec.student, codec.shape
    decoder = DecoderShape(asked.layers, asked.hidden, asked.heads, asked.kv_heads, asked.intermediate)
    student = LatentStudent.new(
        LatentShape(
            shape.vocab_size,
            shape.chunk,
            shape.latent,
            decoder,
            head_blocks=asked.head_blocks,
            noise=asked.noise,
            token_layers=asked.token_layers,
            tempered=spec.tempered_weight > 0,
        ),
        seed=seed,
        energy=EnergySettings(spec.alpha, spec.draws, spec.samples),
    )
    student.requires_grad_(not asked.frozen)
    if spec.activation_checkpointing:
        student.checkpoint_activations()
    return student


def open_teaching(
    run: RunDir, spec: LatentSpec, codec: Codec, data: ShardSet, kernel: str, held: ExitStack
) -> Teaching:
    """The signals and what they are made of; refused where a row of the data is missing. ``held`` closes stores."""
    rows = continued = covered = None
    notes: list[str] = []
    if spec.takes_rows:
        rows = held.enter_context(open_stored(run, teacher_folder(run)))
        require_rows(rows.store, data)
        notes += rows.notes
    if spec.continues:
        source = run.input_run("continuations")
        assert source is not None  # continuations come of a run alone
        path = source.out / "continuations.sqlite"
        continued = held.enter_context(ContinuationStore.open(path, chunk=data.chunk, eos_id=data.eos_id))
        covered = source.load_identity().spec["continuations"]["rows"]
        notes.append(require_continued(continued, data, covered))
    return Teaching(
        spec,
        codec,
        eos_id=data.eos_id,
        kernel=kernel,
        rows=rows,
        continued=continued,
        covered=covered,
        notes=tuple(notes),
    )


def training_cost(student: LatentStudent, teaching: Teaching, *, positions: int, rows: int) -> TokenCost:
    """What a token costs in training, each signal with its own share: texts of ``positions`` chunks, of ``rows`` rows
    those continued that were."""
    sampled = len(teaching.temperatures) * teaching.continued_share(rows)
    text, vector = float(TEXT in teaching.weights), float(teaching.has_vector)
    return latent_training(
        student.shape,
        teaching.codec.shape,
        positions=positions,
        draws=student.energy.draws * (text + sampled) + vector,
        encoded=text + teaching.used * sampled + vector,
        decoded=float(teaching.decodes),
        token_head=teaching.has_tokens,
    )


def require_continued(store: ContinuationStore, data: ShardSet, covered: int | None) -> str:
    """Refuse a store that lacks a row that is to be continued, else say what it has."""
    wanted = min(covered or len(data.train), len(data.train))
    rows = [(data.train, number) for number in range(wanted)]
    rows += [(data.heldout, number) for number in range(len(data.heldout))]
    found = store.coverage(store.key(shard.rows([number])[0]) for shard, number in rows)
    if found.present < found.total:
        raise RefusedError(
            f"{store.path.name} holds continuations of {found} of the rows",
            next="go on with the continuations run:  latentforge dispatch go --attempt next",
        )
    made, temperatures = store.made, ", ".join(f"{one:g}" for one in store.made.temperatures)
    share = "all" if wanted == len(data.train) else f"the first {wanted} of {len(data.train)}"
    return f"{made.count} continuations a chunk at T = {temperatures}, of {share} training rows"


def covered_rows(teaching: Teaching, order: BatchOrder, step: int) -> Tensor | None:
    """Which rows of a step's batch were continued, bool [B]; None: all."""
    if teaching.covered is None:
        return None
    return torch.from_numpy(order.indices(step) < teaching.covered)


def say_held_out(log: EventLog, value: HeldOut, *, step: int, kept: bool = False) -> None:
    """Say held-out values as events (``kept``: of the weights that were put back, those of ``step``): the weighted
    loss, which a line for people says too, and each signal's."""
    of: dict[str, Any] = {"step": step, "split": "heldout", "model": MODEL, "rows_sha256": value.rows_sha256}
    log.metric("val_loss", value.loss, kept=kept, **of)
    for part, loss in value.parts.items():
        log.metric(f"val_{part}", loss, kept=kept, **of)
    if not kept:
        log.say(f"{'val_loss' if step else 'initial_loss'}={value.loss:.4f} (held-out, step {step})")


def values_in_force(
    run: RunDir, spec: LatentSpec, trainer: LatentTrainer, order: BatchOrder, data: ShardSet, device: torch.device
) -> dict[str, object]:
    """Every value of the spec as the objects that will run hold it."""
    student, optimiser, teaching = trainer.student, trainer.optimiser, trainer.teaching
    config = student.backbone.decoder.model.config
    batch = training_batch(data.train, order, 0, device)
    world, wrapped = trainer.engine.world, trainer.engine.wrapped()
    size = min(trainer.micro_batch_size or len(batch), -(-len(batch) // world.size))
    weights = {name: getattr(teaching.spec, name) for name in LatentSpec.model_fields if name.endswith("_weight")}
    return {
        "profile": run.load_identity().spec["profile"],
        "seed": trainer.seed,
        "endurance": meaning_of(endurance_of(run)),
        MODEL: {
            "student": {
                "layers": len(student.backbone.decoder.model.layers),
                "hidden": student.table.embedding_dim,
                "heads": config.num_attention_heads,
                "kv_heads": config.num_key_value_heads,
                "intermediate": config.intermediate_size,
                "head_blocks": len(student.head.blocks),
                "noise": student.head.noise_size,
                "token_layers": 0 if student.token_head is None else len(student.token_head.decoder.model.layers),
                "frozen": not any(p.requires_grad for p in student.parameters()),
            },
            "alpha": student.energy.alpha,
            "draws": student.energy.draws,
            "samples": student.energy.samples,
            **weights,
            "sample_continuations": teaching.used or spec.sample_continuations,
            "token_temperature": teaching.spec.token_temperature,
            "steps": spec.steps,
            "batch_size": len(batch),
            "micro_batch_size": size,
            "learning_rate": optimiser.peak_learning_rate,
            "warmup_steps": spec.warmup_steps,
            "weight_decay": optimiser.weight_decay,
            "clip_norm": optimiser.clip_norm,
            "precision": {torch.float32: "fp32", torch.bfloat16: "bf16"}[trainer.engine.precision],
            "distributed": wrapped.engine,
            "processes": world.local,
            "activation_checkpointing": student.checkpoints_activations,
            "device": student.table.weight.device.type,
            "checkpoint_every": spec.checkpoint_every,
            "validate_every": spec.validate_every,
            "keep": spec.keep,
            "beside": run.has_input("beside"),
            "require": list(spec.require),
        },
        "chunk": student.shape.chunk,
        "latent_size": student.shape.latent,
        "predictions_per_sequence": batch.shape[1] - student.shape.chunk,
        "micro_batches": world.passes(len(batch), trainer.micro_batch_size),
        "parameters": wrapped.parameters if world.size > 1 else sum(p.numel() for p in student.parameters()),
        **({} if wrapped.engine == "none" else {"engine": wrapped.record()}),
    }
