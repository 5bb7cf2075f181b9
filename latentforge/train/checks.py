"""Executable checks of what training claims; contracts name these functions and plant their faults."""

from __future__ import annotations

import io
import tempfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from latentforge.contracts.finding import Finding
from latentforge.events import Event, EventLog, read_events
from latentforge.students.causal import LossParts, Student
from latentforge.train import falsifiers
from latentforge.train.arrival_checks import moment_of
from latentforge.train.checkpoint import Position, load_checkpoint, save_checkpoint, snapshot
from latentforge.train.loop import Trainer, evaluate, log_step
from latentforge.train.products import start_digests
from latentforge.train.rehearsal import (
    SEQUENCES,
    fixture_targets,
    small_batch,
    small_trainer,
    tiny_events,
)
from latentforge.verdicts import Outcome, Verdict


def finding_of(verdict: Verdict) -> Finding:
    """A run's verdict as the finding of a contract's check."""
    passed = {Outcome.PASS: True, Outcome.FAIL: False, Outcome.UNKNOWN: None}[verdict.outcome]
    return Finding(passed, verdict.text, verdict.measured)


def events_of_a_run() -> list[Event]:
    """The events of the recipe ``tiny``'s distill run, trained once a process: what predicates over events look at."""
    return tiny_events()


def whole_line_trains(*, frozen: bool = False) -> Finding:
    """Data, teacher, targets, student: all steps made and held-out loss lower. ``frozen`` plants a student at rest."""
    return finding_of(falsifiers.pipeline_001(tiny_events(frozen=frozen)))


def heldout_loss_falls(*, frozen: bool = False) -> Finding:
    """Held-out cross-entropy is lower after training, on the same rows; ``frozen`` plants a student at rest."""
    return finding_of(falsifiers.smoke_001(tiny_events(frozen=frozen)))


def teacher_helps(*, kd_weight: float | None = None) -> Finding:
    """Held-out KL to the teacher ends below the twin's; ``kd_weight`` 0 plants a student that is its own twin."""
    return finding_of(falsifiers.smoke_002(tiny_events(kd_weight=kd_weight)))


def effective_is_requested(*, field: str | None = None, value: Any = None) -> Finding:
    """The values in force are those asked; ``field`` plants a trainer that held another ``value`` for one of them."""
    return finding_of(falsifiers.effective_config_001([_planted(e, field, value) for e in tiny_events()]))


def _planted(event: Event, field: str | None, value: Any) -> Event:
    if field is None or event.fields.get("name") != "ready":
        return event
    effective = event.fields["effective"]
    effective = {**effective, "distill": {**effective["distill"], field: value}}
    return replace(event, fields={**event.fields, "effective": effective})


class _LastSequenceOnly(Student):
    """Planted: pays for the batch and trains its last sequence."""

    def forward(self, tokens: Tensor, targets: Any, denominator: float, **settings: Any) -> LossParts:
        own = fixture_targets()(tokens[-1:])
        return super().forward(tokens[-1:], own, denominator, **settings)


def every_row_moves_the_loss(*, mutant: str | None = None) -> Finding:
    """Changing any one sequence of a batch changes the gradient. ``mutant`` "last" trains the last sequence only."""
    batch, other = small_batch(), small_batch(seed=6)
    plain = _gradient(batch, mutant)
    changed = []
    for row in range(SEQUENCES):
        tokens = batch.clone()
        tokens[row] = other[row]
        changed.append(bool((_gradient(tokens, mutant) - plain).abs().max() > 1e-9))
    moved = sum(changed)
    text = f"{moved} of {SEQUENCES} rows moved the loss"
    return Finding(moved == SEQUENCES, text, {"moved": moved, "rows": SEQUENCES})


def _gradient(tokens: Tensor, mutant: str | None) -> Tensor:
    trainer = small_trainer()
    student = trainer.student
    if mutant == "last":
        student = _LastSequenceOnly(student.model, student.vocab_size)
    targets = fixture_targets()(tokens)
    denominator = tokens[:, 1:].numel()
    parts = student(tokens, targets, denominator, temperature=1.0, ce_weight=0.3, kd_weight=0.7)
    parts.loss.backward()
    return _gradients(trainer)


def accumulation_is_the_batch(*, mutant: str | None = None) -> Finding:
    """Micro-batches of 5, 5, 5 and 1 give the update of 16 at once. ``mutant`` "own" divides each by its own rows."""
    updates = []
    for size in (None, 5):
        trainer = small_trainer(ce_weight=0.3, kd_weight=0.7, micro_batch_size=size)
        if mutant == "own" and size is not None:
            _divide_by_own_rows(trainer)
        trainer.optimiser.step = lambda: 0.0  # type: ignore[method-assign]
        trainer.step(0, small_batch(), fixture_targets())
        updates.append(_gradients(trainer))
    off = float((updates[0] - updates[1]).norm() / updates[0].norm())
    return Finding(off < 1e-5, f"gradient of 4 micro-batches differs by {off:.1e} of its length", {"relative": off})


def _divide_by_own_rows(trainer: Trainer) -> None:
    student = trainer.student
    forward = student.forward

    def own(tokens: Tensor, targets: Any, denominator: float, **settings: Any) -> LossParts:
        return forward(tokens, targets, tokens[:, 1:].numel(), **settings)

    student.forward = own  # type: ignore[method-assign]


def cuda_student_is_the_cpus(*, device: str = "cuda", mutant: str | None = None) -> Finding:
    """Steps of a student on ``device`` have the losses and the gradient of the same steps on the CPU, both in fp32.

    UNKNOWN where torch sees no such device, or no kernel is proven there. Mutant ``forgetful``: the KD term is lost on
    the device.
    """
    if mutant not in (None, "forgetful"):
        raise ValueError(f"unknown mutant {mutant!r}")
    if device == "cuda" and not torch.cuda.is_available():
        return Finding(None, "torch sees no CUDA device")
    losses, gradients = [], []
    for place in ("cpu", device):
        kd_weight = 0.0 if mutant and losses else 0.7
        trainer = small_trainer(ce_weight=0.3, kd_weight=kd_weight, device=place)
        tokens = small_batch().to(place)
        steps = [trainer.step(0, tokens, fixture_targets()).loss]
        gradients.append(moment_of(trainer).cpu())
        steps += [trainer.step(step, tokens, fixture_targets()).loss for step in (1, 2)]
        losses.append(steps)
    (first, *_, last), (its_first, *_, its_last) = losses
    off = {
        "loss": abs(its_first - first) / first,
        "gradient": float((gradients[1] - gradients[0]).norm() / gradients[0].norm()),
        "third_loss": abs(its_last - last) / last,
    }
    passed = off["loss"] < 1e-5 and off["gradient"] < 1e-4 and off["third_loss"] < 1e-3
    text = (
        f"a student on {device} differs from the CPU's by {off['loss']:.1e} of its loss, {off['gradient']:.1e} of its "
        f"gradient, {off['third_loss']:.1e} of the third step's loss"
    )
    return Finding(passed, text, off)


def preferred_logit_rises(*, mutant: str | None = None) -> Finding:
    """One step raises the log-probability of the teacher's preferred tokens. ``mutant`` "ascent" climbs the loss."""
    batch, targets = small_batch(), fixture_targets()
    preferred = targets(batch).logits.argmax(-1, keepdim=True)  # type: ignore[union-attr]
    trainer = small_trainer()
    if mutant == "ascent":
        for group in trainer.optimiser.groups:
            group["maximize"] = True
    found = []
    for step in range(2):
        with torch.no_grad():
            logits = trainer.student.logits(batch)
            found.append(float(torch.log_softmax(logits, -1).gather(-1, preferred).mean()))
        if step == 0:
            trainer.step(0, batch, targets)
    text = f"log-probability of the preferred token {found[0]:.4f} before, {found[1]:.4f} after one step"
    return Finding(found[1] > found[0], text, {"before": found[0], "after": found[1]})


def ten_steps_descend(*, mutant: str | None = None) -> Finding:
    """Ten steps on one batch: the loss never rises and ends below 90 % of its start. ``mutant`` "still" never steps."""
    trainer = small_trainer(learning_rate=1e-2)
    if mutant == "still":
        trainer.optimiser.step = lambda: 0.0  # type: ignore[method-assign]
    losses = [trainer.step(step, small_batch(), fixture_targets()).loss for step in range(11)]
    falling = all(after <= before for before, after in pairwise(losses))
    share = losses[-1] / losses[0]
    text = f"loss {losses[0]:.4f} to {losses[-1]:.4f} ({share:.0%}), {'never' if falling else 'at times'} rising"
    return Finding(falling and share < 0.9, text, {"first": losses[0], "last": losses[-1], "never_rising": falling})


class _RowsOff(Student):
    """Planted: the logits of each row stand where its neighbour's belong, so that its label is another token."""

    def logits(self, tokens: Tensor) -> Tensor:
        return super().logits(tokens).roll(1, dims=0)


def label_is_the_next_token(*, mutant: str | None = None) -> Finding:
    """Trained and evaluated cross-entropy are the one that transformers computes with its own shift of the labels.

    ``mutant`` "shifted" pairs each row with its neighbour's label.
    """
    trainer, batch = small_trainer(), small_batch()
    model = trainer.student.model
    model(input_ids=batch, labels=batch).loss.backward()
    wanted, wanted_gradient = float(model(input_ids=batch, labels=batch).loss.detach()), _gradients(trainer)
    trainer.optimiser.adamw.zero_grad(set_to_none=True)  # type: ignore[union-attr]
    student = (_RowsOff if mutant == "shifted" else Student)(model, trainer.student.vocab_size)
    parts = student(batch, None, batch[:, 1:].numel(), temperature=1.0, ce_weight=1.0, kd_weight=0.0)
    parts.loss.backward()
    gradient = float((_gradients(trainer) - wanted_gradient).norm() / wanted_gradient.norm())
    evaluated = evaluate(student, [batch], None, temperature=1.0, backend="auto").loss
    off = max(abs(float(parts.ce) - wanted), abs(evaluated - wanted))
    text = f"cross-entropy off transformers' own by {off:.1e} nats, its gradient by {gradient:.1e} of its length"
    return Finding(off < 1e-5 and gradient < 1e-4, text, {"off": off, "gradient": gradient, "wanted": wanted})


def checkpoint_weighs_its_tensors(*, truncate_to: int | None = None) -> Finding:
    """A checkpoint on disk is as large as its tensors; ``truncate_to`` plants a file of that many bytes."""
    trainer = small_trainer()
    trainer.step(0, small_batch(), fixture_targets())
    with tempfile.TemporaryDirectory(prefix="latentforge-") as folder:
        written = _save(trainer, Path(folder), 1)
        if truncate_to is not None:
            for file in written.path.iterdir():
                with open(file, "r+b") as stream:
                    stream.truncate(truncate_to if file.name == "model.safetensors" else 0)
        size = sum(file.stat().st_size for file in written.path.iterdir())
        record = {"path": written.path.name, "bytes": size, "expected_bytes": written.expected_bytes}
        return finding_of(falsifiers.size_verdict([record]))


def saved_tensors_moved(*, frozen: bool = False) -> Finding:
    """Every tensor of the saved student differs from its start; ``frozen`` plants a student at rest."""
    return finding_of(falsifiers.artefact_moved_001(tiny_events(frozen=frozen)))


def canary_gates_hold(*, frozen: bool = False) -> Finding:
    """An early checkpoint is whole, all of it moved, and the teacher differs at step 0; ``frozen`` plants a student at
    rest.
    """
    return finding_of(falsifiers.canary_001(tiny_events(frozen=frozen)))


def resume_repeats_the_losses(*, mutant: str | None = None) -> Finding:
    """Three steps, a checkpoint, three more: bit for bit the losses of six. ``mutant`` "moments" forgets AdamW's."""
    whole = small_trainer()
    wanted = [whole.step(step, small_batch(step), fixture_targets()).loss for step in range(6)]
    first = small_trainer()
    found = [first.step(step, small_batch(step), fixture_targets()).loss for step in range(3)]
    with tempfile.TemporaryDirectory(prefix="latentforge-") as folder:
        kept = load_checkpoint(_save(first, Path(folder), 3).path)
    second = small_trainer()
    moments = {name: torch.zeros_like(value) for name, value in kept.moments.items()} if mutant else kept.moments
    second.optimiser.load(kept.weights, moments)
    found += [second.step(step, small_batch(step), fixture_targets()).loss for step in range(3, 6)]
    equal = sum(a == b for a, b in zip(wanted, found, strict=True))
    return Finding(equal == 6, f"{equal} of 6 losses equal bit for bit after a resume at step 3", {"equal": equal})


def no_compile_in_a_step(*, mutant: str | None = None) -> Finding:
    """Nothing is compiled after set-up. ``mutant`` "compile" calls a torch.compile for the first time inside a step."""
    trainer = small_trainer()

    def targets_of(tokens: Tensor) -> Any:
        if mutant == "compile":
            torch.compile(lambda x: x + 1, backend="eager")(tokens)
        return fixture_targets()(tokens)

    with tempfile.TemporaryDirectory(prefix="latentforge-") as folder:
        path = Path(folder) / "events.jsonl"
        with EventLog(path, "distill-" + "0" * 20, text=io.StringIO()) as log:
            log.ready(requested={}, effective={})
            for step in range(3):
                log_step(log, trainer.step(step, small_batch(), targets_of), step=step + 1, steps=3, model="student")
        return finding_of(falsifiers.kernel_nojit_001(read_events(path)))


def _save(trainer: Trainer, folder: Path, step: int) -> Any:
    optimiser = trainer.optimiser
    start = start_digests(small_trainer().optimiser)
    weights: dict[str, Tensor] = {**dict(trainer.student.model.named_parameters()), **optimiser.masters}
    position = Position("0" * 64, 0, len(small_batch()))
    taken = snapshot("student", step, weights.items(), optimiser.each_moment(), position)
    return save_checkpoint(folder, taken, start=start)


def _gradients(trainer: Trainer) -> Tensor:
    return torch.cat([p.grad.reshape(-1) for p in trainer.optimiser.masters.values() if p.grad is not None])
