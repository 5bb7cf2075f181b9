"""``latentforge kernels``: what the kernels are on this machine, and how fast."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from latentforge.cli import kernels_bench, kernels_parity

app = typer.Typer(no_args_is_help=True, help="Measure the kernels on this machine.")
app.add_typer(kernels_bench.app, name="bench")
app.command("parity")(kernels_parity.parity)


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show the backends, the processor's variants and what the extension was built from."""
    import torch

    from latentforge.errors import LatentForgeError
    from latentforge.kernels.bench.machine import cpu_name
    from latentforge.kernels.cpu.variants import variant
    from latentforge.kernels.native import extension_identity

    said: dict[str, object] = {"machine": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    try:
        said["cpu"] = {"variant": variant(), **extension_identity()}
    except LatentForgeError as error:
        said["cpu"] = {"unavailable": str(error), "next": error.next}
    if as_json:
        typer.echo(json.dumps(said))
        return
    typer.echo(f"{said['machine']}, {said['threads']} threads, torch {said['torch']}\n")
    typer.echo("  backend     state")
    typer.echo("  reference   ready: the definition, any device and precision")
    extension = said["cpu"]
    assert isinstance(extension, dict)
    if "unavailable" in extension:
        typer.echo(f"  cpu         missing: {extension['unavailable']}\n  next: {extension['next']}")
        return
    others = [name for name in extension["cpu_variants"] if name != extension["variant"]]
    typer.echo(f"  cpu         ready: {extension['variant']}" + (f" (also {', '.join(others)})" if others else ""))
    typer.echo("  cuda        not in this version")
    typer.echo(f"\nbuilt from sources {extension['source_digest'][:12]} by {extension['compiler']}")
