"""``latentforge kernels parity``: every backend beside fp64 and beside torch at the same precision."""

from __future__ import annotations

from typing import Annotated

import typer

from latentforge.verdicts.exitcode import ExitCode


def parity(
    op: Annotated[list[str] | None, typer.Option("--op", help="Only this operator (may be repeated).")] = None,
    backend: Annotated[list[str] | None, typer.Option("--backend", help="Only this backend (may be repeated).")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Every group of cases, small ones only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> ExitCode:
    """Compare the kernels with fp64, beside torch at the same precision; exit 1 where one is worse than allowed."""
    from latentforge.cli.progress import Progress
    from latentforge.cli.terminal import print_json
    from latentforge.kernels import backends
    from latentforge.kernels.parity import run, where

    with Progress() as progress:
        found = run.check(
            tuple(op) if op else tuple(backends.OPS),
            tuple(backend) if backend else where.BACKENDS,
            quick=quick,
            tell=progress.tell,
        )
    if as_json:
        print_json(found.as_json())
    else:
        typer.echo(run.render(found))
    return ExitCode.PASS if found.passed else ExitCode.FAIL
