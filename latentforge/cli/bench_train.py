"""``latentforge bench train``: where the time of a training step goes."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from latentforge.verdicts.exitcode import ExitCode


def train(
    recipe: Annotated[str, typer.Argument(metavar="SPEC", help="A recipe's name, or a .toml file.")] = "smoke",
    steps: Annotated[int, typer.Option(min=1, max=10_000, help="Steps that are timed, with targets and without.")] = 10,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="FIELD=VALUE", help="Set a value; may be repeated.")
    ] = None,
    max_overhead: Annotated[
        float | None, typer.Option(help="Gate: KD over plain cross-entropy, as a share (0.15).")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> ExitCode:
    """Time steps of SPEC's token-level student: data, targets from a store, forward, KD kernel, backward, optimiser.

    Steps of KD and of plain cross-entropy are taken on the same batches; rows and targets are real files of made-up
    values. A gate that fails ends with 1.
    """
    import math

    from latentforge.cli.progress import Progress
    from latentforge.cli.terminal import print_json
    from latentforge.errors import RefusedError
    from latentforge.kernels.bench.machine import cpu_name
    from latentforge.spec.resolve import resolve_pipeline
    from latentforge.train.speed.asked import measurable
    from latentforge.train.speed.material import make_material
    from latentforge.train.speed.measure import measure
    from latentforge.train.speed.table import lines

    if max_overhead is not None and not (math.isfinite(max_overhead) and max_overhead >= 0):
        raise RefusedError(f"--max-overhead {max_overhead} is not a share of a step", next="for example 0.15")
    spec = measurable(resolve_pipeline(recipe, env={}, overrides=overrides or []).spec)
    with Progress() as progress, tempfile.TemporaryDirectory(prefix="latentforge-bench-") as folder:
        progress.tell("writing rows and targets")
        material = make_material(
            Path(folder),
            rows=spec.distill.batch_size * min(steps + 1, 4),
            length=spec.data.sequence_length,
            vocab_size=spec.data.vocab_size,
            k=spec.score.k,
        )
        found = measure(spec, material, steps=steps, say=progress.tell)
    machine = cpu_name()
    if json:
        print_json({"machine": machine, **found.as_json()})
    else:
        print("\n".join(lines(found, machine)))
    if max_overhead is None or found.overhead <= max_overhead:
        return ExitCode.PASS
    if not json:
        print(f"gate failed: KD over plain cross-entropy {found.overhead:.1%} is above {max_overhead:.1%}")
    return ExitCode.FAIL
