"""Recipe of the run kind ``autoencoder``: the codec of a latent student, trained on the data's own text."""

from __future__ import annotations

import copy
import hashlib
import json
from functools import partial
from typing import Any

import torch
from torch import Tensor

from latentforge.data.order import BatchOrder
from latentforge.data.shards import ShardSet
from latentforge.data.tokenizer import copy_tokenizer
from latentforge.events import KEPT, EventLog, read_events
from latentforge.spec.endurance import endurance_of, meaning_of
from latentforge.spec.latent import AutoencoderSpec
from latentforge.spec.run import RunDir, write_record
from latentforge.students.latent.codec import CodecShape, new_codec
from latentforge.students.latent.codec_loss import CodecObjective, CodecTraining
from latentforge.students.latent.codec_report import COLLAPSED, CodecReport, report_codec
from latentforge.train import effective
from latentforge.train.best import Best
from latentforge.train.codec_falsifiers import MODEL
from latentforge.train.codec_trainer import CodecTrainer
from latentforge.train.course import Course
from latentforge.train.engines.choice import Parts, engine_of
from latentforge.train.engines.protocol import at_first
from latentforge.train.falsifiers import judge
from latentforge.train.keeping import Keeper, position_of
from latentforge.train.loop import bytes_of, log_compiles, log_step
from latentforge.train.optimiser import Updates
from latentforge.train.products import say_saved, start_digests
from latentforge.train.resume import open_predecessor
from latentforge.train.setting import choose_device, choose_kernel, evaluation_batches, fit_threads, training_batch
from latentforge.train.stopping import deferred_stop, stop_requested

CHECKPOINTS = {MODEL: ""}


def run(run: RunDir, log: EventLog) -> None:
    """Train the codec, from its start or its predecessor's last checkpoint; report on held-out text; save; judge."""
    identity = run.load_identity()
    spec = AutoencoderSpec.model_validate_json(json.dumps(identity.spec["autoencoder"]))
    seed = int(identity.spec["seed"])

    with log.phase("load"):
        data = ShardSet.open(run.input_path("data"))
        data.verify()
        device = choose_device(spec.device, section="autoencoder")
        kernel, slow = choose_kernel(device, torch.float32, op="linear_kd_loss", also=("latent_decode",))
        shape = CodecShape(data.vocab_size, data.chunk, spec.latent, spec.width, spec.inner)
        codec = new_codec(shape, seed=seed).to(device)
        chunks = spec.batch_size * data.sequence_length // data.chunk
        flops = spec.steps * 3.0 * chunks * (shape.encoding_flops + shape.decoding_flops)
        fit_threads(flops / spec.steps)
        updates = Updates(spec.learning_rate, spec.weight_decay, spec.warmup_steps, spec.steps, spec.clip_norm)
        objective = CodecObjective(spec.token_dropout, spec.latent_dropout, spec.kl_weight, spec.kl_floor, kernel)
        plain = codec if spec.distributed == "none" else copy.deepcopy(codec)
        student = CodecTraining(codec, objective)
        engine = engine_of(
            spec.distributed, Parts(student, codec, layers=student.layers()), updates, precision=torch.float32
        )
        optimiser, world, wrapped = engine.optimiser, engine.world, engine.wrapped()
        sized = {"micro_batch_size": spec.micro_batch_size}
        trainer = CodecTrainer(student, engine, plain, eos_id=data.eos_id, seed=seed, **sized)
        order = BatchOrder(len(data.train), spec.batch_size, seed)
        measured = partial(report_of, trainer, data, world.rows(spec.batch_size, spec.micro_batch_size))
        start = start_digests(optimiser)
        earlier = open_predecessor(run, log, CHECKPOINTS).get(MODEL)
    if slow:
        log.warning(slow)

    batch = training_batch(data.train, order, 0, device)
    in_force = {
        "profile": identity.spec["profile"],
        "seed": order.seed,
        "endurance": meaning_of(endurance_of(run)),
        "autoencoder": {
            "latent": codec.decoder_in.in_features,
            "width": codec.embedding.embedding_dim,
            "inner": codec.encoder_chunk.down.in_features,
            "steps": spec.steps,
            "batch_size": len(batch),
            "micro_batch_size": min(spec.micro_batch_size or len(batch), -(-len(batch) // world.size)),
            "learning_rate": optimiser.peak_learning_rate,
            "warmup_steps": spec.warmup_steps,
            "weight_decay": optimiser.weight_decay,
            "clip_norm": optimiser.clip_norm,
            "token_dropout": objective.token_dropout,
            "latent_dropout": objective.latent_dropout,
            "kl_weight": objective.kl_weight,
            "kl_floor": objective.kl_floor,
            "distributed": wrapped.engine,
            "processes": world.local,
            "device": device.type,
            "checkpoint_every": spec.checkpoint_every,
            "validate_every": spec.validate_every,
            "keep": spec.keep,
            "require": list(spec.require),
        },
        "chunk": codec.shape.chunk,
        "predictions_per_sequence": data.sequence_length,
        "micro_batches": world.passes(len(batch), trainer.micro_batch_size),
        **({} if wrapped.engine == "none" else {"engine": wrapped.record()}),
    }
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
            trainer.rehearse(batch)
            measured()
    trainer.watch.drain()
    log.ready(requested=identity.spec, effective=in_force)

    position = position_of(data, order)
    keeper = Keeper(run, log, codec, optimiser, MODEL, start, spec.steps, spec.checkpoint_every, position)
    best = Best(keeper, wanted=spec.keep == "best", every=spec.validate_every)
    best.carry(earlier)
    first, before = keeper.resume(earlier), None
    if first is None:
        with log.phase("evaluate"):
            before = measured()
        say_measures(log, before, data, step=0)
        say_report(log, before, step=0)

    with log.phase("train"), deferred_stop(), keeper:
        course = Course(keeper, best, first=first or 0, earlier=earlier)
        for step in course.steps():
            batch = training_batch(data.train, order, step, device)
            done = course.attempt(step, partial(trainer.step, step, batch))
            if done is None:
                continue
            log_step(log, done.result, step=step + 1, steps=spec.steps, model=MODEL, **done.fields())
            if course.went_back(step, done.result.loss):
                continue
            if best.due(step + 1):
                found = measured()
                say_measures(log, found, data, step=step + 1)
                best.offer(step + 1, found.loss)
            keeper.after(step + 1, world.signal(stop_requested()))

    with log.phase("evaluate"):
        after = measured()
        say_measures(log, after, data, step=spec.steps)
        kept = best.put_back(spec.steps, after.loss)
        if kept != spec.steps:
            after = measured()
            say_measures(log, after, data, step=kept, kept=True)
        plain, weights = trainer.whole(), at_first(world, optimiser.each_weight())
    if not world.first:
        return
    log_compiles(log, trainer.watch.drain(), step=spec.steps, model=MODEL)
    say_report(log, after, step=kept)

    with log.phase("save"):
        run.out.mkdir(exist_ok=True)
        folder = run.out / "codec"
        plain.save(folder, eos_id=data.eos_id, tokenizer_sha256=data.tokenizer_sha256, latent_std=after.latent_std)
        copy_tokenizer(data.tokenizer_dir, folder)
        say_saved(plain, weights, folder, start=start, log=log, step=spec.steps, model=MODEL)
        reports = {"initial": None if before is None else before.as_json(), "final": after.as_json()}
        record = {"steps": spec.steps, "kept_step": kept, "flops": {MODEL: flops}, "heldout": reports}
        write_record(run.out / "metrics.json", record)
    log.say(f"flops {flops / 1e12:.2f} TFLOP")
    for verdict in judge(read_events(run.events_file), spec.require):
        log.verdict(verdict)


def report_of(trainer: CodecTrainer, data: ShardSet, at_most: int) -> CodecReport:
    """The codec on all held-out rows, no more of them at a time than a training pass takes. Collective: each process
    measures them all."""
    kernel = trainer.objective.kernel_backend
    backends = {"backend": kernel, "decode_backend": "reference" if kernel == "reference" else "auto"}
    chunks = at_most * data.sequence_length // data.chunk
    return report_codec(trainer.whole(), lambda: trainer.held_out(data), at_most=chunks, **backends)


def padding_in(tokens: Tensor, data: ShardSet) -> int:
    """The places of rows int64 [B, L] behind the first EOS of their chunk: counted apart from the report's tokens."""
    ended = (tokens.unflatten(-1, (-1, data.chunk)) == data.eos_id).cumsum(-1)
    return int((ended[..., :-1] > 0).sum())


def say_measures(log: EventLog, report: CodecReport, data: ShardSet, *, step: int, kept: bool = False) -> None:
    """Say a report as events; ``kept``: of the weights that were put back, those of ``step``."""
    seen, places, padding = hashlib.sha256(), 0, 0
    for tokens in evaluation_batches(data.heldout, torch.device("cpu")):
        seen.update(bytes_of(tokens))
        places += tokens.numel()
        padding += padding_in(tokens, data)
    of: dict[str, Any] = {"step": step, "split": "heldout", "model": MODEL, "rows_sha256": seen.hexdigest()}
    of |= {KEPT: True} if kept else {}
    counts = {"tokens": report.tokens, "padding": padding, "places": places}
    log.metric("val_loss", report.loss, **of)
    log.emit("metric", name="token_accuracy", value=report.token_accuracy, **counts, **of)
    log.emit("metric", name="chunk_accuracy", value=report.chunk_accuracy, chunks=report.chunks, **of)
    for level, value in report.noisy_accuracy.items():
        log.emit("metric", name="noisy_token_accuracy", value=value, noise=level, **of)
    log.emit(
        "metric", name="latent_kl", value=min(report.kl), by_dimension=list(report.kl), std=report.latent_std, **of
    )


def say_report(log: EventLog, report: CodecReport, *, step: int) -> None:
    """Say a report as lines for people, with an alarm where dimensions tell nothing."""
    log.say(f"{'initial_loss' if step == 0 else 'final_loss'}={report.loss:.4f} (held-out, step {step})")
    log.say(
        f"held out: {report.token_accuracy:.4%} of {report.tokens} tokens, {report.chunk_accuracy:.4%} of "
        f"{report.chunks} chunks (step {step})"
    )
    noisy = ", ".join(f"{value:.2%} at {level:g}" for level, value in report.noisy_accuracy.items())
    log.say(f"held out, noise as a share of the latents' std {report.latent_std:.3f}: {noisy}")
    least, middle = min(report.kl), sorted(report.kl)[len(report.kl) // 2]
    log.say(f"KL of {len(report.kl)} dimensions: {least:.3f} to {max(report.kl):.3f} nats, half below {middle:.3f}")
    if report.collapsed and step > 0:
        told = ", ".join(map(str, report.collapsed[:8])) + (", …" if len(report.collapsed) > 8 else "")
        log.warning(
            f"{len(report.collapsed)} of {len(report.kl)} dimensions are collapsed (KL below {COLLAPSED} nats): "
            f"{told}; lower autoencoder.kl_weight or autoencoder.latent, or raise autoencoder.kl_floor"
        )
