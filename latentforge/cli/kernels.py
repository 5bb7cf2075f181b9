"""``latentforge kernels``: what the kernels are on this machine, whether they are right, and how fast."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from latentforge.cli import kernels_bench, kernels_parity, kernels_warmup

app = typer.Typer(no_args_is_help=True, help="Measure and prove the kernels on this machine.")
app.add_typer(kernels_bench.app, name="bench")
app.command("parity")(kernels_parity.parity)
app.command("warmup")(kernels_warmup.warmup)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show the backends, what the extension was built from, and what the warm-up has proven."""
    import torch

    from latentforge.kernels.bench.machine import cpu_name

    said: dict[str, Any] = {
        "machine": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cpu": _cpu(),
        "cuda": _cuda(),
        "triton": _triton(),
        "warmup": _warmup(),
    }
    if as_json:
        typer.echo(json.dumps(said))
        return
    typer.echo(f"{said['machine']}, {said['threads']} threads, torch {said['torch']}\n")
    typer.echo("  backend     state")
    typer.echo("  reference   ready: the definition, any device and precision")
    for name in ("cpu", "cuda", "triton"):
        typer.echo(f"  {name:<11} {_line(said[name])}")
    typer.echo(f"\nwarm-up     {said['warmup']['text']}")
    if "source_digest" in said["cpu"]:
        typer.echo(f"built from sources {said['cpu']['source_digest'][:12]} by {said['cpu']['compiler']}")


def _line(backend: dict[str, Any]) -> str:
    if "unavailable" in backend:
        return f"missing: {backend['unavailable']}" + (f"\n  next: {backend['next']}" if backend.get("next") else "")
    return str(backend["text"])


def _cpu() -> dict[str, Any]:
    from latentforge.errors import LatentForgeError
    from latentforge.kernels.cpu.variants import variant
    from latentforge.kernels.native import extension_identity

    try:
        found = {"variant": variant(), **extension_identity()}
    except LatentForgeError as error:
        return {"unavailable": str(error), "next": error.next}
    others = [name for name in found["cpu_variants"] if name != found["variant"]]  # type: ignore[attr-defined]
    return {**found, "text": f"ready: {found['variant']}" + (f" (also {', '.join(others)})" if others else "")}


def _cuda() -> dict[str, Any]:
    from latentforge.errors import LatentForgeError
    from latentforge.kernels.native import native

    try:
        module = native()
    except LatentForgeError as error:
        return {"unavailable": str(error), "next": error.next}
    built = module.cuda_info() if hasattr(module, "cuda_info") else None
    if built is None:
        return {"unavailable": "the extension was built without CUDA kernels"}
    archs = [f"sm_{arch.partition('-')[0]}" for arch in str(built["architectures"]).replace(";", " ").split()]
    return {**dict(built), "text": f"built for {', '.join(archs)} by nvcc {built['nvcc']}"}


def _triton() -> dict[str, Any]:
    from latentforge.kernels.guard.machine import ptxas_version
    from latentforge.kernels.guard.machine import version_of as version

    found = version("triton")
    if found == "none":
        return {"unavailable": "triton is not installed"}
    return {"version": found, "ptxas": ptxas_version(), "text": f"triton {found}, ptxas {ptxas_version()}"}


def _warmup() -> dict[str, Any]:
    """The records of this host by state; those of older builds or drivers are counted apart."""
    from contextlib import suppress

    from latentforge.errors import RefusedError
    from latentforge.kernels.guard.composite import composites
    from latentforge.kernels.guard.key import key_of
    from latentforge.kernels.guard.ladder import choose, read_states
    from latentforge.kernels.guard.records import DamagedRecordError, Records
    from latentforge.kernels.guard.table import table
    from latentforge.kernels.guard.warmup import Limits, look_in_child

    records = Records()
    everything = list(records.all())
    if not everything:
        return {"variants": {}, "text": "no records:  latentforge kernels warmup"}
    machine = look_in_child(Limits())
    variants = table(machine)
    held = read_states(variants, machine, records)
    choices = []
    for op, dtype in dict.fromkeys((variant.op, variant.dtype) for variant in variants):
        with suppress(RefusedError):  # not everything has been tried
            choices.append(choose(op, dtype, variants, held))
    current = {key_of(variant, machine).digest for variant in (*variants, *composites(machine, choices))}
    whole = [record for record in everything if not isinstance(record, DamagedRecordError)]
    states = {record.variant: record.state for record in whole if record.key in current}
    count = {state: list(states.values()).count(state) for state in dict.fromkeys(states.values())}
    text = ", ".join(f"{number} {state}" for state, number in count.items()) or "no record holds here now"
    older, damaged = len(whole) - len(states), len(everything) - len(whole)
    text += f"; {older} of other builds, drivers or libraries" if older else ""
    text += f"; {damaged} damaged" if damaged else ""
    return {"variants": states, "older": older, "damaged": damaged, "text": text}
