"""``latentforge bench memory``: what a training was planned to hold beside what it held."""

from __future__ import annotations

from typing import Annotated

import typer

from latentforge.verdicts.exitcode import ExitCode


def memory(
    hidden: Annotated[int, typer.Option(min=64, help="Width of the student; heads are 64 wide.")] = 512,
    layers: Annotated[int, typer.Option(min=1, help="Its layers.")] = 8,
    vocabulary: Annotated[int, typer.Option(min=16, help="Its tokens.")] = 8192,
    rows: Annotated[int, typer.Option(min=1, help="Rows a pass.")] = 4,
    length: Annotated[int, typer.Option(min=9, help="Tokens a row.")] = 257,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> ExitCode:
    """Train a student of this size in each way, each in a process of its own; print planned and measured peak.

    The ways: fp32, bf16, activations computed again, several passes a step, LoRA. Ends with 1 where a plan is more than
    15 % off. bf16 takes minutes on a CPU without instructions for it.
    """
    from latentforge.cli.progress import Progress
    from latentforge.cli.terminal import print_json
    from latentforge.errors import RefusedError
    from latentforge.train.memory_bench import Case, Compared, cases, table

    if hidden % 64:
        raise RefusedError(f"--hidden {hidden} is no multiple of 64", next=f"for example {(hidden // 64 + 1) * 64}")
    size, found = Case(hidden=hidden, layers=layers, vocabulary=vocabulary, rows=rows, length=length), []
    with Progress() as progress:
        for case in cases(size):
            progress.tell(f"training: {case.name}")
            found.append(Compared.of(case))
    if json:
        print_json({one.case.name: one.as_json() for one in found})
    else:
        print("\n".join(table(found)))
    return ExitCode.PASS if all(one.holds for one in found) else ExitCode.FAIL
