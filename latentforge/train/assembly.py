"""What a distill run is put together from: targets, start, trainer, and the values that they hold in force."""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from latentforge.data.order import BatchOrder
from latentforge.data.shards import ShardSet
from latentforge.data.tokenizer import Tokenizer
from latentforge.errors import RefusedError
from latentforge.events import EventLog
from latentforge.memory.estimate import ahead_bytes
from latentforge.spec.endurance import endurance_of, meaning_of
from latentforge.spec.run import RunDir
from latentforge.spec.sections import DistillSpec, StudentSpec
from latentforge.spec.teacher import answers_of, teacher_of
from latentforge.students.adapters import Lora, adapt, adapted, adapters, merged, trained_part
from latentforge.students.causal import ModelShape, Student, cast_weights, model_from_folder, new_model
from latentforge.targets.store import TargetStore
from latentforge.teachers.alignment import compare_vocabularies
from latentforge.teachers.crossed import CrossCoverage, CrossedShards, CrossedTeacher
from latentforge.teachers.crossing import Bridge
from latentforge.teachers.folder import check_model_folder
from latentforge.teachers.opening import open_teacher
from latentforge.teachers.protocol import Scorer
from latentforge.teachers.scoring import coverage
from latentforge.teachers.store import StoreTeacher
from latentforge.train.asking import answers_dense, check_live, check_on_policy
from latentforge.train.compiled import CompiledLayers
from latentforge.train.data import checked_path
from latentforge.train.engines.choice import Parts, engine_of
from latentforge.train.engines.protocol import at_first
from latentforge.train.engines.single import Single
from latentforge.train.feed import Feed
from latentforge.train.loop import Objective, Trainer
from latentforge.train.onpolicy import OnPolicy
from latentforge.train.optimiser import Updates
from latentforge.train.setting import padding_of, training_batch
from latentforge.train.stopping import stop_requested
from latentforge.train.supply import Supply
from latentforge.train.teaching import in_force

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Job:
    """What student and twin share: the run, the data in its order, the teacher's targets, where it is computed."""

    run: RunDir
    log: EventLog
    spec: DistillSpec
    data: ShardSet
    order: BatchOrder
    supply: Supply
    judge: Supply
    on_policy: OnPolicy
    device: torch.device
    kernel: str


def open_stored(run: RunDir, teacher: Path) -> StoreTeacher:
    """The store of the score run, refused where another teacher filled it.

    What is young enough now is so for the whole run: no row grows too old between two steps.
    """
    scored, began = run.input_run("targets"), time.time()
    if scored is None:
        path = checked_path(run, "targets") or run.input_path("targets")
        source, asked = StoreTeacher.open(path, clock=lambda: began), {}
    else:
        source = StoreTeacher.open(run.input_path("targets") / "targets.sqlite", clock=lambda: began)
        asked = scored.load_identity().spec.get("teacher", {})
    if scored is not None and asked.get("backend", "hf") == "hf":
        filled, wanted = source.identity.sha256, check_model_folder(teacher).sha256
    else:
        # The teacher's files cannot be seen: its tokenizer is what the folder and the rows have in common.
        filled, wanted = source.identity.tokenizer_sha256, Tokenizer.open(teacher).sha256
    if filled != wanted:
        raise RefusedError(
            f"the store was filled by teacher {filled[:12]}…, this run's is {wanted[:12]}…",
            next="score again with this teacher",
        )
    return source


def require_rows(store: TargetStore, data: ShardSet | CrossedShards) -> None:
    """Refuse a store that lacks a row of the data, with the share that it has: else a step finds it, hours later."""
    reached = coverage(store, data)
    if reached.present == reached.total:
        return
    old = store.stats()["too_old"]
    raise RefusedError(
        f"{store.path.name} holds targets for {reached} of the data"
        + (f"; {old} rows are older than the {store.policy.ttl_seconds:g} s that it keeps them" if old else ""),
        next="score what is missing:  latentforge dispatch go --attempt next; a file of teacher.store must cover the "
        "data that is trained on",
    )


def open_supply(
    run: RunDir,
    spec: DistillSpec,
    teacher: Path,
    device: torch.device,
    data: ShardSet,
    held: ExitStack,
    say: Callable[[str], None],
    across: tuple[Bridge, CrossCoverage] | None = None,
) -> tuple[Supply, Supply]:
    """The teacher's targets at the training temperature, of the data and of the student's own text.

    Stored top-k rows with their tail; or, of a teacher that answers while the student trains, dense logits where it has
    them, else top-k rows. Refused where it cannot give them. Both are one where nothing is stored or nothing written.
    ``held`` closes them; ``say`` is told what a reader should know; ``across`` leads to the data from a teacher of
    another tokenizer.
    """

    def facing(source: Scorer) -> Scorer:
        if across is None:
            return source
        return CrossedTeacher(source, across[0], coverage=across[1], least=spec.min_coverage)

    live = None
    if spec.targets == "live" or spec.on_policy > 0.0:
        asked = teacher_of(run)
        kept = run.load_identity().spec.get("score", {}).get("k")  # of a teacher whose answers are rows
        at = (spec.temperature,)
        opened = open_teacher(asked, teacher, str(device), os.environ, say=say, k=kept, temperatures=at)
        source = facing(held.enter_context(closing(opened)))
        k = None if answers_dense(source) else int(kept)
        if asked.cache is not None and k is None:
            say(f"teacher.cache = {asked.cache!r} is not used: dense logits are asked anew, rows alone can be kept")
        check_live(source, spec, data, k=k)
        check_on_policy(source, spec, data)
        live = _supply(source, spec, data, k=k, live=True)
    if spec.targets == "live":
        assert live is not None
        return live, live
    stored = held.enter_context(open_stored(run, teacher))
    require_rows(stored.store, CrossedShards.of(data, *across) if across else data)
    supply = _supply(facing(stored), spec, data, k=stored.store.k, live=False)
    return supply, supply if live is None else live


def _supply(source: Scorer, spec: DistillSpec, data: ShardSet, *, k: int | None, live: bool) -> Supply:
    return Supply(
        source,
        temperature=spec.temperature,
        k=k,
        width=data.vocab_size,
        on_loss=spec.on_teacher_loss,
        live=live,
        # Without targets the student is trained as its twin is.
        ce_alone=spec.ce_weight or 1.0,
    )


def make_feed(job: Job, trainer: Trainer, steps: range) -> Feed:
    """The material of a trainer's ``steps``; without KD in its objective there is no teacher in it."""
    data, spec = job.data, job.spec
    return Feed(
        lambda step: training_batch(data.train, job.order, step, job.device),
        steps,
        supply=job.supply if trainer.objective.kd_weight > 0 else None,
        ahead=spec.prefetch,
        dense_fits=ahead_bytes(spec.prefetch, spec.batch_size, data.sequence_length, data.vocab_size) > 0,
        on_policy=job.on_policy,
        judge=job.judge,
        micro_batch_size=trainer.micro_batch_size,
        eos_id=data.eos_id,
        interrupted=lambda: stop_requested() is not None,
        world=trainer.engine.world,
    )


def start_model(run: RunDir, spec: StudentSpec, data: ShardSet, teacher: Path, seed: int) -> Any:
    """The model before its first step: the named folder's, or a new one."""
    if run.has_input("student_init"):
        folder = checked_path(run, "student_init") or run.input_path("student_init")
        limit = check_model_folder(folder).max_positions
        if limit is not None and data.sequence_length - 1 > limit:
            raise RefusedError(
                f"data.sequence_length = {data.sequence_length} is longer than the student's {limit} positions",
                next=f"set data.sequence_length = {limit + 1} or less",
            )
        compare_vocabularies(teacher, folder)
        return model_from_folder(folder)
    shape = ModelShape(spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.intermediate)
    return new_model(shape, vocab_size=data.vocab_size, positions=data.sequence_length, eos_id=data.eos_id, seed=seed)


def make_trainer(job: Job, start: Any, *, kd_weight: float, ce_weight: float) -> Trainer:
    """A fresh copy of the start with its optimiser: student and twin differ in the weights of the loss alone."""
    spec = job.spec
    model = copy.deepcopy(start).to(job.device)
    model.requires_grad_(not spec.student.frozen)
    if (lora := lora_of(spec)) is not None:
        adapt(model, lora, seed=job.order.seed)
        cast_weights(model, PRECISIONS[spec.precision])
    student = Student(model, job.data.vocab_size, padding_of(job.data))
    if spec.activation_checkpointing:
        student.checkpoint_activations()
    compiled = CompiledLayers(layers_of(model), job.device) if spec.compile else None
    parts = Parts(student, trained_part(model), layers=layers_of(model), methods=("logits",))
    updates = Updates(spec.learning_rate, spec.weight_decay, spec.warmup_steps, spec.steps, spec.clip_norm)
    engine = engine_of(spec.distributed, parts, updates, precision=PRECISIONS[spec.precision])
    objective = Objective(spec.temperature, ce_weight, kd_weight, job.kernel)
    return Trainer(student, engine, objective, micro_batch_size=spec.micro_batch_size, compiled=compiled)


def lora_of(spec: DistillSpec) -> Lora | None:
    """The adapters that a spec asks for; None: every tensor of its student is trained."""
    asked = spec.lora
    return Lora(asked.rank, asked.alpha, asked.dropout, asked.target_modules) if asked.rank else None


def layers_of(model: Any) -> list[nn.Module]:
    """The layers of a causal LM that are computed one after the other; none where it keeps them in another way."""
    return list(getattr(model.base_model, "layers", ()))


def whole_student(job: Job, start: Any, trainer: Trainer) -> tuple[Student, dict[str, Tensor]]:
    """The student as one process has it, and its weights with their masters; of several processes the first alone is
    given both, the trained weights in a model of its own, and of adapters a model that they are merged into.
    Collective.
    """
    engine = trainer.engine
    weights = at_first(engine.world, trainer.optimiser.each_weight())
    if (lora := adapted(trainer.student.model)) is not None:
        model = merged(start, lora, weights)
        cast_weights(model, engine.precision)
        return Student(model.to(job.device), job.data.vocab_size, padding_of(job.data)), weights
    if not isinstance(engine, Single) and engine.world.first:
        model = copy.deepcopy(start)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        cast_weights(model, engine.precision)
        return Student(model.to(job.device), job.data.vocab_size, padding_of(job.data)), weights
    return trainer.student, weights


def lora_in_force(spec: DistillSpec, model: nn.Module) -> dict[str, Any]:
    """The adapters as the model's own modules hold them; without any, the other values are as they were asked for."""
    found = adapted(model)
    if found is None:
        return {**spec.lora.model_dump(mode="json"), "rank": 0}
    order = {name: place for place, name in enumerate(spec.lora.target_modules)}
    targets = sorted(found.targets, key=lambda name: order.get(name, len(order)))
    return {"rank": found.rank, "alpha": found.alpha, "dropout": found.dropout, "target_modules": targets}


def size_of(model: nn.Module) -> int:
    """The parameters of a student as it is saved: adapters are merged into its own."""
    return sum(p.numel() for p in model.parameters()) - sum(p.numel() for _, p in adapters(model))


def values_in_force(job: Job, trainer: Trainer, profile: str) -> dict[str, Any]:
    """Every value of the spec as the objects that will run hold it."""
    spec, optimiser, objective = job.spec, trainer.optimiser, trainer.objective
    model = trainer.student.model
    batch = training_batch(job.data.train, job.order, 0, job.device)
    world = trainer.engine.world
    size = min(trainer.micro_batch_size or len(batch), -(-len(batch) // world.size))
    wrapped = trainer.engine.wrapped()
    feed = make_feed(job, trainer, range(0))
    config = model.config
    student: dict[str, Any] = {"frozen": not any(p.requires_grad for p in model.parameters())}
    if job.run.has_input("student_init"):
        student["init"] = f"sha256:{job.run.input_ref('student_init')['sha256']}"
    else:
        student |= {"init": None, "layers": config.num_hidden_layers, "hidden": config.hidden_size}
        student |= {"heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads}
        student |= {"intermediate": config.intermediate_size}
    asked: dict[str, Any] = {}
    if "teacher" in job.run.load_identity().spec:
        answers = answers_of(teacher_of(job.run)) | in_force(job.judge.source)
        asked = {"teacher": answers, "score": {"k": job.judge.k}}
    return {
        "profile": profile,
        "seed": job.order.seed,
        "endurance": meaning_of(endurance_of(job.run)),
        "distill": {
            "student": student,
            "lora": lora_in_force(spec, model),
            "targets": "live" if job.supply.live else "store",
            "steps": spec.steps,
            "batch_size": len(batch),
            "micro_batch_size": size,
            "learning_rate": optimiser.peak_learning_rate,
            "warmup_steps": spec.warmup_steps,
            "weight_decay": optimiser.weight_decay,
            "clip_norm": optimiser.clip_norm,
            "precision": {torch.float32: "fp32", torch.bfloat16: "bf16"}[trainer.engine.precision],
            "temperature": job.supply.temperature if objective.kd_weight > 0 else objective.temperature,
            "ce_weight": objective.ce_weight,
            "kd_weight": objective.kd_weight,
            "direction": "forward",
            "device": next(model.parameters()).device.type,
            "distributed": wrapped.engine,
            "processes": world.local,
            "activation_checkpointing": trainer.student.checkpoints_activations,
            "checkpoint_every": spec.checkpoint_every,
            "validate_every": spec.validate_every,
            "keep": spec.keep,
            "prefetch": feed.asked_ahead,
            "compile": trainer.compiled is not None,
            "on_teacher_loss": job.supply.on_loss,
            "on_policy": feed.on_policy.share,
            "on_policy_tokens": feed.on_policy.tokens,
            "on_policy_temperature": feed.on_policy.temperature,
            "cross_tokenizer": isinstance(job.supply.source, CrossedTeacher),
            # Of a teacher that has the student's tokens nothing is aligned: there the value is as it was asked for.
            "min_coverage": getattr(job.supply.source, "least", spec.min_coverage),
            "require": list(spec.require),
        },
        **asked,
        "targets_fetched_ahead": feed.ahead,
        "predictions_per_sequence": batch.shape[1] - 1,
        "micro_batches": world.passes(len(batch), trainer.micro_batch_size),
        "parameters": wrapped.parameters if world.size > 1 else size_of(model),
        **({} if wrapped.engine == "none" else {"engine": wrapped.record()}),
    }
