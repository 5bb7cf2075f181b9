"""Executable checks of what the engines promise; contracts name these functions and plant their faults."""

from __future__ import annotations

import gc
import importlib.util
from functools import cache, reduce
from typing import Any

import torch

from latentforge.contracts.finding import Finding, worse
from latentforge.errors import FailedError
from latentforge.spec.fields import Distributed
from latentforge.train.engines.equality import TOLERANCE, Compared, compared, furthest
from latentforge.train.engines.fsdp2 import Fsdp2
from latentforge.train.engines.launching import together
from latentforge.train.engines.precision import ROUNDED, Precise, precise
from latentforge.train.engines.precision import TOLERANCE as BF16_TOLERANCE
from latentforge.train.engines.small import small_student
from latentforge.train.optimiser import MasterOptimiser, Updates

OF_TORCH: tuple[Distributed, ...] = ("ddp", "fsdp2")
OF_DEEPSPEED: tuple[Distributed, ...] = ("deepspeed-zero2", "deepspeed-zero3")
WAYS = {"1x8": None, "8x1": 1}
"""Rows a pass: all that a process has of eight, or one after the other."""

UNTIED = "untied"
"""Two rows a pass, of a student whose head is a tensor of its own."""

RECOMPUTED = "recomputed"
"""Two rows a pass, of a student that computes its activations again for the gradient."""

CODEC = "codec"
"""Two rows a pass of a codec, after a rehearsal."""

Case = tuple[Distributed, str, str | None]


@cache
def _measured(processes: int) -> tuple[dict[Case, Compared], dict[tuple[Distributed, str | None], Precise]]:
    """What each engine that is installed was found to differ by, in each way and with a second division planted, and
    what it computes in bf16; all of them in one start of the processes."""
    engines = OF_TORCH + (OF_DEEPSPEED if importlib.util.find_spec("deepspeed") else ())
    cases: list[Case] = [(engine, way, None) for engine in engines for way in WAYS]
    cases.append(("fsdp2", UNTIED, None))
    cases += [(engine, RECOMPUTED, None) for engine in engines]
    if processes > 1:
        cases += [(engine, CODEC, None) for engine in engines]
        cases += [(engine, "1x8", "divided-twice") for engine in engines]
    asked: list[dict[str, Any]] = [
        {
            "distributed": engine,
            "micro_batch_size": WAYS.get(way, 2),
            "mutant": mutant,
            "tied": way != UNTIED,
            "recomputed": way == RECOMPUTED,
            "codec": way == CODEC,
            "rehearsed": way == CODEC,
        }
        for engine, way, mutant in cases
    ]
    bf16 = [(engine, mutant) for engine in engines for mutant in (None, ROUNDED)] if processes > 1 else []
    measured = together(
        "latentforge.train.engines.checks:measured_here", {"cases": asked, "bf16": bf16}, processes, threads=1
    )
    equal, precise = (zip(*(one[name] for one in measured), strict=True) for name in ("equal", "bf16"))
    return (
        dict(zip(cases, map(furthest, equal), strict=True)),
        # Weights and dtypes are read whole: they are those of any process.
        dict(zip(bf16, (Precise(*ranks[0]) for ranks in precise), strict=True)),
    )


def measured_here(cases: list[dict[str, Any]], bf16: list[tuple[Distributed, str | None]]) -> dict[str, Any]:
    """The cases of both kinds, in one of the processes that compute them together."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    found: dict[str, Any] = {"equal": [], "bf16": []}
    for case in cases:
        found["equal"].append(compared(**case))
        gc.freeze()  # DeepSpeed collects garbage for every engine that it makes: the libraries are not looked through
    found["bf16"] += [precise(engine, mutant=mutant) for engine, mutant in bf16]
    return found


def table(processes: int = 2) -> dict[Case, Compared]:
    """What each engine that is installed was found to differ by from one process, computed once a process."""
    return _measured(processes)[0]


def torch_engines_are_equal(*, mutant: str | None = None) -> Finding:
    """Two processes under DDP and FSDP2 train what one does; ``mutant`` "divided-twice" lets the library average."""
    return _equal(OF_TORCH, mutant)


def deepspeed_engines_are_equal(*, mutant: str | None = None) -> Finding:
    """The same of ZeRO-2 and ZeRO-3."""
    return _equal(OF_DEEPSPEED, mutant)


def _equal(engines: tuple[Distributed, ...], mutant: str | None) -> Finding:
    found = {case: one for case, one in table().items() if case[0] in engines and case[2] == mutant}
    loss, norm = (reduce(worse, (getattr(one, name) for one in found.values())) for name in ("loss", "norm"))
    # Each engine has to be caught with the fault in it, not one of them.
    off = [worse(one.loss, one.norm) for one in found.values()]
    passed = all(one <= TOLERANCE for one in off) if mutant is None else not all(one > TOLERANCE for one in off)
    text = f"{' and '.join(engines)}, 2 processes against 1: loss off by {loss:.1e}, gradient norm by {norm:.1e}"
    measured = {f"{engine} {way}": one._asdict() for (engine, way, _), one in found.items()}
    return Finding(passed, text, measured)


def torch_engines_keep_fp32_masters(*, mutant: str | None = None) -> Finding:
    """DDP and FSDP2 in bf16 compute in bf16, add up and keep in fp32; ``mutant`` "rounded-masters" keeps in bf16."""
    return _keep_masters(OF_TORCH, mutant)


def deepspeed_engines_keep_fp32_masters(*, mutant: str | None = None) -> Finding:
    """The same of ZeRO-2 and ZeRO-3."""
    return _keep_masters(OF_DEEPSPEED, mutant)


def _keep_masters(engines: tuple[Distributed, ...], mutant: str | None) -> Finding:
    found = {engine: _measured(2)[1][engine, mutant] for engine in engines}
    right = [one[:3] == ("bfloat16", "float32", "float32") for one in found.values()]
    held = [one.off <= BF16_TOLERANCE and one.finer > 0.5 for one in found.values()]
    passed = all(right) and (all(held) if mutant is None else any(held))
    text = "; ".join(
        f"{name} computes in {one.computes}, adds up in {one.gradients}, keeps {one.masters}, off by {one.off:.2f}"
        for name, one in found.items()
    )
    return Finding(passed, text, {name: one._asdict() for name, one in found.items()})


def shares_are_what_was_asked(*, mutant: str | None = None) -> Finding:
    """Each engine's wrapper and the sizes that a process really keeps; ``mutant`` "left-whole" asks FSDP2 of a student
    that nothing has sharded."""
    if mutant == "left-whole":
        student = small_student()
        updates = Updates(1e-3, weight_decay=0.0, warmup_steps=0, steps=1, clip_norm=None)
        try:
            Fsdp2(student, MasterOptimiser(student.model, updates)).wrapped()
        except FailedError as error:
            return Finding(False, str(error), {})
        return Finding(True, "a student that nothing has sharded passes for FSDP2's", {})
    said = {}
    for (engine, _, _), one in table().items():
        wrapped = one.wrapped
        share = (wrapped["weights"] / wrapped["parameters"], wrapped["states"] / wrapped["parameters"])
        said[engine] = f"{engine} {share[0]:.2f}/{share[1]:.2f}"
    # The engines have refused themselves where a type or a size was another: what came back here is what held.
    return Finding(True, f"share of weights/states in each of 2 processes: {', '.join(said.values())}", said)


def print_table() -> None:
    """The equality table of docs/distributed.md, for one process and for two."""
    print("| processes | engine | passes | loss | gradient norm | weights and moments | weights here | states here |")
    print("|---|---|---|---|---|---|---|---|")
    for processes in (1, 2):
        for (engine, way, mutant), one in table(processes).items():
            off = " | ".join(f"{value:.1e}" for value in one[:3])
            here = " | ".join(f"{one.wrapped[name] / one.wrapped['parameters']:.2f}" for name in ("weights", "states"))
            print(f"| {processes} | {engine} | {way if mutant is None else f'{way}, {mutant}'} | {off} | {here} |")


if __name__ == "__main__":
    print_table()
