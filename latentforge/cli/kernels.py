"""``latentforge kernels``: what the kernels are on this machine, and how fast."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from latentforge.kernels.bench.kd import Report

app = typer.Typer(no_args_is_help=True, help="Measure the kernels on this machine.")
bench = typer.Typer(no_args_is_help=True, help="Time a kernel beside torch and beside the memory's own speed.")
app.add_typer(bench, name="bench")


@app.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show the backends, the processor's variants and what the extension was built from."""
    import torch

    from latentforge.errors import LatentForgeError
    from latentforge.kernels.bench.kd import cpu_name
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


@bench.command("kd")
def bench_kd(
    rows: Annotated[int, typer.Option(help="Rows of logits (positions).")] = 512,
    vocab: Annotated[int, typer.Option(help="Columns (vocabulary).")] = 151936,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32, of both sides.")] = "bf16",
    k: Annotated[int, typer.Option(help="Top-k targets as well, with this k; 0: dense only.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Threads for everybody (default: torch's).")] = None,
    temperature: Annotated[float, typer.Option(help="Distillation temperature.")] = 2.0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Include torch.compile.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time kd_loss with its gradient: the cpu kernel, torch eager, torch.compile, and a += b, in one run."""
    from latentforge.kernels.bench import kd as kernels_bench

    report = kernels_bench.bench_kd(
        rows=rows,
        vocab=vocab,
        dtype=dtype,
        k=k or None,
        threads=threads,
        temperature=temperature,
        compiled=compiled,
    )
    typer.echo(json.dumps(report.as_json()) if as_json else render(report))


def render(report: Report) -> str:
    """The report as a table per kind of targets."""
    many = "s" if report.threads != 1 else ""
    element = 2 if report.dtype == "bf16" else 4
    text = [
        f"{report.machine}, {report.threads} thread{many}, torch {report.torch}",
        f"N={report.rows} V={report.vocab} {report.dtype} T={report.temperature:g}, "
        f"loss and gradient of CE + KD; a+=b {report.bandwidth / 1e9:.1f} GB/s measured in this run",
    ]
    for section in report.sections:
        floor_ms = section.floor_bytes / report.bandwidth * 1e3
        compiled = [line.median for line in section.lines if line.backend.startswith("torch.compile") and line.median]
        text += [
            "",
            f"{section.targets}: floor = {section.floor}·{element} B = {section.floor_bytes / 1e6:.1f} MB"
            f" = {floor_ms:.1f} ms",
            f"  {'backend':<26}{'median':>11}  {'vs floor':>8}  {'vs torch.compile':>16}  {'gradient error':>14}",
        ]
        for line in section.lines:
            if line.median is None:
                text.append(f"  {line.backend:<26}not measured: {line.note}")
                continue
            ratio = f"{compiled[0] / line.median:.1f}x" if compiled else "–"
            text.append(
                f"  {line.backend:<26}{line.median:>8.1f} ms  {100 * floor_ms / line.median:>6.0f} %"
                f"  {ratio:>16}  {line.gradient_error or 0.0:>14.2e}"
            )
    return "\n".join(text)
