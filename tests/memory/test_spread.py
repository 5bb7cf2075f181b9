"""What each of several processes holds under each engine: by hand, and beside what two processes were measured to
hold."""

from __future__ import annotations

import pytest

from latentforge.memory import ModelShape, Term
from latentforge.memory.estimate import pipeline_memory
from latentforge.memory.measured import FAR_SHARE
from latentforge.memory.plan import MemoryPlan
from latentforge.memory.spread import Held, Numbers, Spread
from latentforge.memory.training import Step, training_terms
from latentforge.spec.fields import Distributed
from latentforge.spec.resolve import resolve_pipeline

MIB = 1 << 20
SHAPE = ModelShape.qwen3(8192, layers=8, hidden=512, heads=8, kv_heads=4, intermediate=1536)
"""29.4 M numbers: an embedding of 4 194 304, and 8 layers of 3 146 880."""

MEASURED: dict[tuple[Distributed, str, int], int] = {
    ("ddp", "fp32", 2): 593,
    ("ddp", "bf16", 2): 597,
    ("ddp", "fp32", 1): 647,
    ("fsdp2", "fp32", 2): 313,
    ("fsdp2", "bf16", 2): 288,
    ("fsdp2", "fp32", 1): 356,
    ("deepspeed-zero2", "fp32", 2): 529,
    ("deepspeed-zero2", "bf16", 2): 447,
    ("deepspeed-zero2", "fp32", 1): 651,
    ("deepspeed-zero3", "fp32", 2): 672,
    ("deepspeed-zero3", "bf16", 2): 493,
    ("deepspeed-zero3", "fp32", 1): 726,
}
"""MiB of one of two processes at its peak beyond what it held before, in three steps of four rows of 64 tokens, so many
a pass (docs/memory.md)."""


def planned(engine: Distributed, world: int, precision: str, rows: int, accumulates: bool) -> int:
    step = Step(rows, 64, precision, accumulates, spread=Spread(engine, world))
    terms = training_terms(SHAPE, step, who="student", device="cpu")
    return sum(term.bytes for term in terms if term.name != "checkpoint") // MIB


def near(plan: int, measured: int) -> bool:
    return abs(plan / measured - 1.0) <= FAR_SHARE


@pytest.mark.parametrize(("engine", "precision", "rows"), MEASURED)
def test_a_process_is_planned_to_hold_what_it_was_measured_to_hold(
    engine: Distributed, precision: str, rows: int
) -> None:
    measured = MEASURED[engine, precision, rows]
    assert near(planned(engine, 2, precision, rows, rows < 2), measured)
    # Planted: a plan that knows no shares; of DDP, which has none, one that shares out all the same.
    other: tuple[Distributed, int] = ("fsdp2", 2) if engine == "ddp" else (engine, 1)
    wrong = planned(*other, precision, rows, rows < 2)
    assert not near(wrong, measured)


NUMBERS = Numbers(all=1000, layer=90, outside=100)
ON_A_GPU = {"accumulates": False, "device": "cuda"}


def test_what_four_processes_hold_of_a_thousand_numbers_is_what_is_counted_by_hand() -> None:
    ddp = Held.of(Spread("ddp", 4), NUMBERS, "fp32", **ON_A_GPU)
    # Weights and two moments; no gradient yet but its bucket; at the end both.
    assert (ddp.weights, ddp.states, ddp.sharded) == (4000, 8000, False)
    assert (sum(ddp.turn), sum(ddp.end)) == (4000, 8000)
    fsdp2 = Held.of(Spread("fsdp2", 4), NUMBERS, "bf16", **ON_A_GPU)
    # A quarter of fp32 weights and moments; as bf16 what is outside of the layers, and two of them; at the end those
    # outside with gradients, twice while they are added up, and a layer's in fp32.
    assert (fsdp2.weights, fsdp2.states, fsdp2.sharded) == (1000, 2000, True)
    assert (sum(fsdp2.turn), sum(fsdp2.end)) == (2 * (100 + 180), 1000 + 600 + 360)
    bucket = 50_000_000  # of the preset
    zero2 = Held.of(Spread("deepspeed-zero2", 4), NUMBERS, "bf16", **ON_A_GPU)
    # Whole bf16 weights; a quarter of masters and moments, and of gradients; two buckets in bf16.
    assert (zero2.weights, zero2.states, zero2.sharded) == (2000, 3000, False)
    assert (zero2.turn, zero2.end) == ((0, 4 * bucket, 0), (1000, 4 * bucket, 250 * 6))
    zero3 = Held.of(Spread("deepspeed-zero3", 4), NUMBERS, "bf16", **ON_A_GPU)
    # All of it a quarter, but one bucket, and what a pass has gathered and keeps.
    assert (zero3.weights, zero3.states, zero3.sharded) == (500, 3000, True)
    assert (zero3.turn, zero3.end) == ((1000, 2 * bucket, 2000), (1000, 2 * bucket, 2000 + 1000 + 200))


def test_a_host_holds_as_much_as_its_processes_and_what_the_first_writes_once() -> None:
    plan = MemoryPlan("distill", (Term("student share", 5), Term("checkpoint", 12), Term("engine", 7, elsewhere=True)))
    assert [term.bytes for term in plan.on(3).terms] == [15, 12, 7]
    assert [term.bytes for term in plan.on(3, first=False).terms] == [15, 0, 7]


@pytest.mark.parametrize(
    ("recipe", "stage"), [("smoke", "distill"), ("smoke-latent", "autoencoder"), ("smoke-latent", "latent")]
)
def test_on_two_hosts_each_holds_a_smaller_share_of_what_is_sharded_and_names_it(recipe: str, stage: str) -> None:
    spread = [f"{stage}.distributed=fsdp2", f"{stage}.processes=2"]
    alone = {t.name: t.bytes for t in pipeline_memory(resolve_pipeline(recipe).spec)[stage].terms}
    spec = resolve_pipeline(recipe, overrides=spread).spec
    one, two = ({t.name: t.bytes for t in pipeline_memory(spec, hosts=hosts)[stage].terms} for hosts in (1, 2))
    who = "codec" if stage == "autoencoder" else "student"
    # Two processes with a half each, or a quarter.
    assert one[f"{who} share"] == pytest.approx(alone[who], abs=16)
    assert two[f"{who} share"] == pytest.approx(alone[who] / 2, abs=16)
    assert one["checkpoint"] == two["checkpoint"] == alone["checkpoint"]
    assert one["gathered"] == two["gathered"] > 0
    # Their passes have fewer rows.
    assert two["activations"] < one["activations"]
