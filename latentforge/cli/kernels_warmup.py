"""``latentforge kernels warmup``: prove every kernel of this machine in children, and show what will run."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from latentforge.verdicts.exitcode import ExitCode

if TYPE_CHECKING:
    from latentforge.kernels.guard.machine import Machine

ONLY = "Only this variant, operator, backend or precision, as the report names them (may be repeated)."


def warmup(
    only: Annotated[list[str] | None, typer.Option("--only", help=ONLY)] = None,
    timeout: Annotated[float, typer.Option(help="Seconds for all variants together.")] = 1800.0,
    again: Annotated[bool, typer.Option("--again", help="Prove again what has a record, crashed ones too.")] = False,
    accept_crash: Annotated[
        bool, typer.Option("--accept-crash", help="Live with the fallbacks of variants that crashed.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> ExitCode:
    """Prove the kernels on this machine before any training: compile, load, compare, time, each in a child.

    Exit code 0: what runs was proven (fallbacks are shown); 1: an operator has no kernel left; 3: an earlier attempt
    crashed and waits for a person; 7: another warm-up is at work.
    """
    from latentforge.cli.terminal import Passing, print_json
    from latentforge.errors import RefusedError
    from latentforge.kernels.guard.composite import composites
    from latentforge.kernels.guard.records import Records
    from latentforge.kernels.guard.report import Report, choices_of, render
    from latentforge.kernels.guard.table import table
    from latentforge.kernels.guard.variants import select
    from latentforge.kernels.guard.warmup import Limits, WarmUp, look_in_child

    if timeout <= 0:
        raise RefusedError(f"--timeout {timeout:g} leaves no time")
    if again and accept_crash:
        raise RefusedError("--again tries a crashed variant, --accept-crash lives without it: one of the two")
    limits = Limits(total=timeout)
    machine = look_in_child(limits)
    if machine.capability is None:
        # Nothing is chosen by the time that a call takes on the processor.
        limits = replace(limits, calls=5, seconds=0.05)
    variants = select(only or (), table(machine))
    passing = Passing(active=not as_json)
    total = len(variants)
    count = {variant.name: number for number, variant in enumerate(variants, 1)}
    records = Records()
    run = WarmUp(
        machine,
        records,
        limits,
        again=again,
        accept=accept_crash,
        tell=lambda variant, stage: passing.show(f"{count.get(variant.name, total)}/{total} {variant.name}: {stage}"),
    )
    try:
        lines = run.run(variants)
        choices = choices_of(lines, machine, records, table(machine))
        together = composites(machine, choices)
        lines += run.run(together) if together else []
    finally:
        passing.clear()
    report = Report(machine, lines, choices, inspected(machine))
    if as_json:
        print_json(report.as_json())
    else:
        typer.echo(render(report))
    return report.code


def inspected(machine: Machine) -> list[str]:
    """What can be said of CUDA and Triton on a machine that cannot load them."""
    from latentforge.kernels.guard.warmup import inspect_extension

    if machine.capability is not None:
        return []
    code = inspect_extension(machine)
    found = code.detail if code.reason is None else f"{code.reason}: {code.detail}"
    triton = f"triton {machine.triton}" if machine.triton != "none" else "triton is not installed"
    return [
        f"no CUDA device ({machine.why_not}): compiled code inspected, not loaded",
        f"cuda    {found}",
        f"triton  {triton}, ptxas {machine.ptxas}: compiled for the GPU at hand, so not here",
    ]
