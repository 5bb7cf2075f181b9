"""Executable checks that what a spec asks for reaches the weights; contracts name these functions."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from latentforge.contracts.finding import Finding, worse
from latentforge.train.loop import Trainer
from latentforge.train.rehearsal import fixture_targets, small_batch, small_trainer


def learning_rate_arrives(*, mutant: str | None = None) -> Finding:
    """Twice the learning rate moves the weights twice as far in the first step. ``mutant`` "constant" ignores it."""
    lengths = []
    for rate in (1e-3, 2e-3):
        trainer = small_trainer(learning_rate=rate)
        if mutant == "constant":
            for group in trainer.optimiser.groups:
                group["initial_lr"] = 1e-3
        before = _flat(trainer)
        trainer.step(0, small_batch(), fixture_targets())
        lengths.append(float((_flat(trainer) - before).norm()))
    ratio = lengths[1] / lengths[0]
    return Finding(
        abs(ratio - 2.0) < 1e-2, f"twice the learning rate: update {ratio:.4f} times as long", {"ratio": ratio}
    )


def schedule_arrives(*, mutant: str | None = None) -> Finding:
    """AdamW moves each tensor whose gradient is one by the learning rate of the step: up over the warm-up, then down a
    cosine. ``mutant`` "constant" stays at the peak.
    """
    peak, warmup, steps = 1e-2, 4, 12
    optimiser = small_trainer(learning_rate=peak, warmup_steps=warmup, steps=steps).optimiser
    if mutant == "constant":
        optimiser.schedule = lambda step: 1.0
    worst, where = 0.0, ""
    for step in range(steps):
        along = max(0, step - warmup) / (steps - 1 - warmup)
        # Written otherwise than the schedule is: 1 + cos x = 2 cos^2 (x / 2).
        wanted = peak * ((step + 1) / (warmup + 1) if step < warmup else 0.1 + 0.9 * math.cos(math.pi * along / 2) ** 2)
        before = {name: value.detach().clone() for name, value in optimiser.masters.items()}
        for value in optimiser.masters.values():
            value.grad = torch.ones_like(value)
        optimiser.set_learning_rate(step)
        optimiser.step()
        for name, value in optimiser.masters.items():
            off = float(((before[name] - value.detach()) / wanted - 1.0).abs().nan_to_num(math.inf).max())
            worst, where = (off, f" ({name}, step {step + 1})") if off > worst else (worst, where)
    text = f"{len(optimiser.masters)} tensors over {steps} steps, moved off the schedule by at most {worst:.1e}{where}"
    return Finding(worst < 1e-3, text, {"worst_relative": worst, "tensors": len(optimiser.masters)})


def objective_arrives(*, mutant: str | None = None) -> Finding:
    """A step's loss is that of its temperature and weights, as torch computes it. Mutants: "temperature" trains at
    T = 1 whatever was asked, "swapped" takes one weight for the other.
    """
    worst = 0.0
    for temperature, ce_weight, kd_weight in ((1.0, 0.3, 0.7), (2.0, 0.3, 0.7), (4.0, 0.0, 1.0)):
        trainer, batch = small_trainer(), small_batch()
        with torch.no_grad():
            s = trainer.student.logits(batch)
        t = fixture_targets()(batch).logits  # type: ignore[union-attr]
        log_q, log_p = (s / temperature).log_softmax(-1), (t / temperature).log_softmax(-1)
        kd = temperature**2 * float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        ce = float(torch.nn.functional.cross_entropy(s, batch[:, 1:].reshape(-1)))
        held = (kd_weight, ce_weight) if mutant == "swapped" else (ce_weight, kd_weight)
        trained_at = 1.0 if mutant == "temperature" else temperature
        trainer.objective = replace(trainer.objective, temperature=trained_at, ce_weight=held[0], kd_weight=held[1])
        loss = trainer.step(0, batch, fixture_targets()).loss
        wanted = ce_weight * ce + kd_weight * kd
        worst = worse(worst, abs(loss - wanted) / wanted)
    text = f"loss of a step off torch's own by {worst:.1e} of it, T in 1, 2, 4"
    return Finding(worst < 1e-4, text, {"relative": worst})


def decay_arrives(*, mutant: str | None = None) -> Finding:
    """Weight decay takes learning rate x decay of each matrix, nothing of a vector. ``mutant`` "nothing" drops it."""
    rate, decay = 1e-2, 0.5
    found: list[dict[str, Tensor]] = []
    start = {name: value.detach().clone() for name, value in small_trainer().optimiser.masters.items()}
    for weight_decay in (0.0, decay):
        trainer = small_trainer(learning_rate=rate, weight_decay=weight_decay)
        if mutant == "nothing":
            for group in trainer.optimiser.groups:
                group["weight_decay"] = 0.0
        trainer.step(0, small_batch(), fixture_targets())
        found.append({name: value.detach() for name, value in trainer.optimiser.masters.items()})
    shares = {
        name: float((found[0][name] - found[1][name]).norm() / value.norm()) / (rate * decay)
        for name, value in start.items()
    }
    matrices = [share for name, share in shares.items() if start[name].dim() >= 2]
    vectors = [share for name, share in shares.items() if start[name].dim() < 2]
    passed = all(abs(share - 1.0) < 1e-2 for share in matrices) and max(vectors) == 0.0
    text = (
        f"of learning rate x decay, {len(matrices)} matrices lost {min(matrices):.3f} to {max(matrices):.3f}, "
        f"{len(vectors)} vectors at most {max(vectors):.3f}"
    )
    return Finding(passed, text, {"matrices": [min(matrices), max(matrices)], "vectors": max(vectors)})


def clip_arrives(*, mutant: str | None = None) -> Finding:
    """The gradient that AdamW's first moment takes in has the clipping norm. ``mutant`` "none" forgets to clip."""
    limit = 1e-3
    trainer = small_trainer(clip_norm=limit)
    if mutant == "none":
        trainer.optimiser.clip_norm = None
    before = trainer.step(0, small_batch(), fixture_targets()).grad_norm
    (beta, _) = trainer.optimiser.groups[0]["betas"]
    taken = float(moment_of(trainer).norm()) / (1.0 - beta)
    text = f"gradient norm {before:.3g} before clipping to {limit:g}, {taken:.3g} as AdamW took it"
    return Finding(before > limit and abs(taken / limit - 1.0) < 1e-2, text, {"before": before, "taken": taken})


def moment_of(trainer: Trainer) -> Tensor:
    """AdamW's first moment: after one step the gradient that it took, times 1 - beta."""
    moments = trainer.optimiser.moments()
    return torch.cat([value.reshape(-1) for name, value in moments.items() if name.endswith("/exp_avg")])


def _flat(trainer: Trainer) -> Tensor:
    return torch.cat([p.detach().reshape(-1).clone() for p in trainer.optimiser.masters.values()])
