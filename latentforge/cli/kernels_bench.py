"""``latentforge kernels bench``: time the kernels beside torch and beside the memory's own speed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from latentforge.kernels.bench.run import Work

app = typer.Typer(help="Time a kernel beside torch and beside the memory's own speed.")

Threads = Annotated[
    str | None, typer.Option(help="Numbers of threads, each measured by itself: 1,2 (default: torch's).")
]
Device = Annotated[str | None, typer.Option(help="cpu or cuda (default: cuda where there is one).")]
Compiled = Annotated[bool, typer.Option("--compile/--no-compile", help="Include torch.compile.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Ledger = Annotated[bool, typer.Option("--ledger", help="Append the measurements to evidence/kernels.csv.")]
LedgerFile = Annotated[Path | None, typer.Option("--ledger-file", help="Append them to this file.")]
Quick = Annotated[bool, typer.Option("--quick", help="Two rounds over small streams: a smoke, not a measurement.")]


@app.callback(invoke_without_command=True)
def every(
    context: typer.Context,
    all_ops: Annotated[bool, typer.Option("--all", help="Every operator, on one thread and on all.")] = False,
    threads: Threads = None,
    device: Device = None,
    compiled: Compiled = True,
    quick: Annotated[bool, typer.Option("--quick", help="Toy sizes: a smoke, not a measurement.")] = False,
    as_json: AsJson = False,
    ledger: Ledger = False,
    ledger_file: LedgerFile = None,
) -> None:
    """Time one operator (kd, linear, decode), or with --all every one at its default sizes."""
    if context.invoked_subcommand is not None:
        if all_ops:
            from latentforge.errors import RefusedError

            raise RefusedError(f"--all and {context.invoked_subcommand!r}: it is one or the other")
        return
    if not all_ops:
        typer.echo(context.get_help())
        return
    from latentforge.kernels.bench import run

    works = run.everything(quick=quick, compiled=compiled)
    _measure(works, threads or _one_and_all(), device, quick, as_json, ledger, ledger_file)


@app.command("kd")
def bench_kd(
    rows: Annotated[int, typer.Option(help="Rows of logits (positions).")] = 512,
    vocab: Annotated[int, typer.Option(help="Columns (vocabulary).")] = 151936,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32, of both sides.")] = "bf16",
    k: Annotated[str, typer.Option(help="Top-k targets as well, with these k: 16,64,128; 0: dense only.")] = "64",
    dense: Annotated[bool, typer.Option("--dense/--no-dense", help="Dense targets.")] = True,
    ce: Annotated[bool, typer.Option("--ce/--no-ce", help="With the cross-entropy, or the divergence alone.")] = True,
    direction: Annotated[str, typer.Option(help="forward, reverse or both: forward,reverse.")] = "forward",
    threads: Threads = None,
    temperature: Annotated[float, typer.Option(help="Distillation temperature.")] = 2.0,
    device: Device = None,
    compiled: Compiled = True,
    quick: Quick = False,
    as_json: AsJson = False,
    ledger: Ledger = False,
    ledger_file: LedgerFile = None,
) -> None:
    """Time kd_loss with its gradient, on dense and on top-k targets."""
    from latentforge.kernels.bench import kd

    ks = tuple(value for value in _numbers("k", k) if value)
    directions = tuple(part.strip() for part in direction.split(","))
    work = kd.Work(rows, vocab, dtype, ks, dense, directions, (ce,), temperature, compiled)
    _measure([work], threads, device, quick, as_json, ledger, ledger_file)


@app.command("linear")
def bench_linear(
    rows: Annotated[int, typer.Option(help="Hidden rows.")] = 256,
    vocab: Annotated[int, typer.Option(help="Vocabulary.")] = 151936,
    hidden: Annotated[int, typer.Option(help="Width of the student.")] = 1024,
    teacher_hidden: Annotated[int | None, typer.Option(help="Width of the teacher (default: the student's).")] = None,
    dtype: Annotated[str, typer.Option(help="bf16 or fp32.")] = "bf16",
    k: Annotated[int, typer.Option(help="Top-k targets; 0: a teacher's layer.")] = 64,
    threads: Threads = None,
    temperature: Annotated[float, typer.Option(help="Distillation temperature.")] = 2.0,
    device: Device = None,
    compiled: Compiled = True,
    quick: Quick = False,
    as_json: AsJson = False,
    ledger: Ledger = False,
    ledger_file: LedgerFile = None,
) -> None:
    """Time linear_kd_loss with its gradients, beside its bare products."""
    from latentforge.kernels.bench import linear

    work = linear.Work(rows, vocab, hidden, dtype, k or None, teacher_hidden, temperature, compiled)
    _measure([work], threads, device, quick, as_json, ledger, ledger_file)


@app.command("decode")
def bench_decode(
    rows: Annotated[str, typer.Option(help="Numbers of hidden rows, each measured by itself.")] = "1,4,8,16",
    vocab: Annotated[int, typer.Option(help="Vocabulary.")] = 151936,
    hidden: Annotated[int, typer.Option(help="Width.")] = 1024,
    dtype: Annotated[str, typer.Option(help="Of the weight: bf16, fp32, int8, or several.")] = "bf16,int8",
    threads: Threads = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy; above, a draw.")] = 0.0,
    device: Device = None,
    compiled: Compiled = True,
    quick: Quick = False,
    as_json: AsJson = False,
    ledger: Ledger = False,
    ledger_file: LedgerFile = None,
) -> None:
    """Time latent_decode, beside torch's product, argmax and log-sum-exp."""
    from latentforge.kernels.bench import decode

    kinds = tuple(part.strip() for part in dtype.split(","))
    work = decode.Work(_numbers("rows", rows), vocab, hidden, kinds, temperature, compiled)
    _measure([work], threads, device, quick, as_json, ledger, ledger_file)


def _measure(
    works: Sequence[Work],
    threads: str | None,
    device: str | None,
    quick: bool,
    as_json: bool,
    ledger: bool,
    ledger_file: Path | None,
) -> None:
    from latentforge.cli.progress import Progress
    from latentforge.kernels.bench import ledger as book
    from latentforge.kernels.bench import run
    from latentforge.kernels.bench.report import render

    path = ledger_file or (book.default_path() if ledger else None)
    counts = _numbers("threads", threads) if threads is not None else ()
    with Progress() as progress:
        report = run.measure(works, threads=counts, device=device, quick=quick, tell=progress.tell)
    typer.echo(json.dumps(report.as_json()) if as_json else render(report))
    if path is not None:
        count = book.append(path, report)
        typer.echo(f"{count} rows appended to {path}", err=True)


def _numbers(name: str, text: str) -> tuple[int, ...]:
    from latentforge.errors import RefusedError

    found = []
    for part in text.split(","):
        try:
            found.append(int(part))
        except ValueError:
            raise RefusedError(f"{name}: {part.strip()!r} is not a whole number") from None
    return tuple(found)


def _one_and_all() -> str:
    import torch

    everybody = torch.get_num_threads()
    return "1" if everybody == 1 else f"1,{everybody}"
