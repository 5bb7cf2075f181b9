"""What one of the processes that train together holds of weights, moments and gradients, by engine.

As the libraries' sources have it, with the settings of the project's presets; held against what processes were measured
to hold (docs/memory.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from latentforge.memory.plan import Term
from latentforge.spec.fields import Distributed
from latentforge.spec.spread import settings_of

WIDTH = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Spread:
    """The engine of a training, and on how many processes it runs, over all hosts."""

    engine: Distributed = "none"
    world: int = 1

    @classmethod
    def of(cls, engine: Distributed, processes: int, hosts: int) -> Spread:
        """That of a spec with so many ``processes`` on each of ``hosts``; one process where no engine is asked for."""
        return cls(engine, 1 if engine == "none" else processes * hosts)

    def rows(self, batch: int, micro: int | None) -> int:
        """Rows of a pass: those of the largest share of a batch, or ``micro`` of them at a time."""
        share = -(-batch // self.world)
        return min(share, micro or share)


ALONE = Spread()


class Numbers(NamedTuple):
    """How many numbers are trained: in ``all``, in the largest ``layer``, and ``outside`` all layers, where the
    embedding and the head lie."""

    all: int
    layer: int
    outside: int


class Moment(NamedTuple):
    """What stands at one moment of a pass beside weights and moments, in bytes: ``gradients``, the library's
    ``buckets`` for them, and what is ``gathered`` whole of tensors whose parts lie on all processes."""

    gradients: int
    buckets: int = 0
    gathered: int = 0


@dataclass(frozen=True)
class Held:
    """What one process holds, in bytes: ``weights``, ``states`` (AdamW's moments, and fp32 masters) all the time, and
    the rest where a pass turns back (``turn``) and at its end."""

    weights: int
    states: int
    turn: Moment
    end: Moment
    sharded: bool = False

    @classmethod
    def of(cls, spread: Spread, of: Numbers, precision: str, *, accumulates: bool, device: str) -> Held:
        """What one process of ``spread`` holds of what is trained in ``precision``; with ``accumulates`` a step is
        several passes, and finds the gradients of those before it."""
        width, masters = WIDTH[precision], 4 if precision == "bf16" else 0
        share = -(-of.all // spread.world)
        early = 4 * accumulates
        if spread.engine == "fsdp2":
            turn, end = _fsdp2(of, width, device)
            return cls(4 * share, 8 * share, Moment(early * share, 0, turn), Moment(4 * share, 0, end), sharded=True)
        if spread.engine == "deepspeed-zero2":
            # DeepSpeed has masters beside fp32 weights too.
            return cls(width * of.all, 12 * share, *_zero2(of, width, share, early, device))
        if spread.engine == "deepspeed-zero3":
            moments = _zero3(of, width, share, device)
            return cls(width * share, 12 * share, *moments, sharded=True)
        # Those of a single pass in bf16 become fp32 one after the other, with nothing to be added to.
        late = 4 * of.all + (width * of.all if masters and accumulates else 0)
        buckets = width * of.all if spread.engine == "ddp" else 0
        states = (8 + masters) * of.all
        return cls(width * of.all, states, Moment(early * of.all, buckets), Moment(late, buckets))

    def standing(self, who: str) -> list[Term]:
        """The terms of this process without those of a pass; what is gathered at its most."""
        both = self.turn, self.end
        buckets, gathered = (max(getattr(at, name) for at in both) for name in ("buckets", "gathered"))
        return self._terms(who, buckets, gathered)

    def passing(self, who: str, *, kept: int, layer: int, logits: int) -> list[Term]:
        """The terms of this process with those of a pass that keeps so many bytes until it turns back, and holds those
        of one ``layer`` at its end.

        The peak is at either: gradients that are not there yet leave their room to the activations.
        """
        turn, end = sum(self.turn) + kept + logits, sum(self.end) + layer
        at = self.turn if turn >= end else self.end
        rest = max(turn, end) - self.end.gradients - at.buckets - at.gathered - logits
        return [
            *self._terms(who, at.buckets, at.gathered),
            Term("activations", max(0, rest)),
            Term("logits", logits),
        ]

    def _terms(self, who: str, buckets: int, gathered: int) -> list[Term]:
        beside = [Term("buckets", buckets), Term("gathered", gathered)]
        return [
            Term(f"{who} share" if self.sharded else who, self.weights),
            Term("states", self.states + self.end.gradients),
            *(term for term in beside if term.bytes),
        ]


def whole_terms(spread: Spread, bytes: int) -> list[Term]:
    """The copy into which each process of a codec's or a latent student's training gathers it, to be measured and
    saved; none where one process trains it."""
    return [] if spread.engine == "none" else [Term("whole", bytes)]


def _fsdp2(of: Numbers, width: int, device: str) -> tuple[int, int]:
    """What FSDP2 has gathered where a pass turns back and at its end: what is outside the layers all along, and of
    these the one that is computed and the next; at the end the gradients of the former, and as much again in fp32 to be
    summed.
    """
    # gloo works on copies of what it gathers and sums.
    copies = device == "cpu"
    turn = width * of.outside + width * of.layer * (3 if copies else 2)
    end = max(3 * width * of.outside, (8 if copies else 4 + width) * of.outside) + 4 * of.layer
    return turn, end


def _zero2(of: Numbers, width: int, share: int, early: int, device: str) -> tuple[Moment, Moment]:
    """ZeRO-2 copies gradients into buckets (two, where sums are to hide behind the pass), and keeps sums of the own
    part; the step has them once more."""
    settings = settings_of(2)["zero_optimization"]
    buckets = settings["reduce_bucket_size"] * (2 if settings["overlap_comm"] else 1)
    # On a CPU a page that nothing was written to is none.
    filled = min(buckets, of.all) if device == "cpu" else buckets
    at_turn = 0 if device == "cpu" else width * buckets
    kept = 4 * share if early else 0
    summed = min(settings["reduce_bucket_size"], share) * (width if width == 4 else width + 4)
    return Moment(kept, at_turn), Moment(4 * share + kept, width * filled, summed)


def _zero3(of: Numbers, width: int, share: int, device: str) -> tuple[Moment, Moment]:
    """ZeRO-3 keeps what it has gathered for as long as its limits let it, here until a pass has used it twice;
    gradients have a bucket and the own part of their sums, both all the time."""
    settings = settings_of(3)["zero_optimization"]
    bucket = settings["reduce_bucket_size"]
    filled = min(bucket, of.all)
    standing = width * (filled if device == "cpu" else bucket)
    live = width * min(of.all, settings["stage3_max_live_parameters"])
    # Whole gradients in the order in which they are shared out (gloo sums a copy), and their own part as fp32, beside
    # the embedding.
    summed = width * filled * (2 if device == "cpu" else 1) + (0 if width == 4 else 4 * share) + width * of.outside
    return Moment(4 * share, standing, live), Moment(4 * share, standing, max(summed, 4 * share))
