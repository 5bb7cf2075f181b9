"""``latentforge promote``: publish the student of a run whose evidence and claims hold."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from latentforge.verdicts.exitcode import ExitCode

app = typer.Typer()


@app.command()
def promote(
    run: Annotated[
        str, typer.Argument(metavar="RUN", help="A distill or latent run: its folder, or its id's beginning.")
    ],
    to: Annotated[
        Path | None, typer.Option("--to", metavar="DIR", help="The folder to make. Without it: only look.")
    ] = None,
    signers: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Allowed signers, one of whom must have signed.  [EVIDENCE_SIGNERS]"),
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Take a run of profile smoke too; its card says so.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> ExitCode:
    """Publish a student as a Hugging Face folder with a card, if every condition holds; what is there is kept.

    The evidence is verified, every falsifier judged again from the run's events, the weights read and tried.

    Exit code: 0 published (or, without --to, may be), 1 a condition does not hold, 3 one is not known to.
    """
    from latentforge.cli.terminal import Passing, accent, print_json
    from latentforge.evidence.reading import find_run
    from latentforge.evidence.signatures import allowed_signers
    from latentforge.promotion.gate import look
    from latentforge.promotion.publish import publish
    from latentforge.report.words import one_line
    from latentforge.verdicts import exit_code, meet

    passing = Passing(active=not json)
    passing.show(f"looking at {run}")
    gate = look(find_run(run, next="latentforge runs list"), signers=allowed_signers(signers), smoke=smoke)
    passing.clear()
    if json:
        conditions = [
            {"name": one.name, "outcome": one.outcome.name.lower(), "text": one.text} for one in gate.conditions
        ]
    else:
        width = max(len(one.name) for one in gate.conditions)
        for one in gate.conditions:
            print(f"  {one.name:<{width}}  {accent(f'{one.outcome.name:<7}')}  {one_line(one.text)}")
    published = publish(gate, to) if to is not None and not gate.unmet else None
    outcome = meet(one.outcome for one in gate.conditions)
    if json:
        print_json(
            {
                "run": gate.record.id,
                "outcome": outcome.name.lower(),
                "published": None if published is None else str(published),
                "conditions": conditions,
            }
        )
    elif published is not None:
        print(f"{gate.record.id} published in {published}")
    elif gate.unmet:
        print(f"{gate.record.id} is not promoted: {len(gate.unmet)} of {len(gate.conditions)} conditions do not hold")
    else:
        asked = (" --smoke" if smoke else "") + (f" --signers {signers}" if signers else "")
        print(f"all {len(gate.conditions)} conditions hold. To publish:  latentforge promote {run}{asked} --to DIR")
    return exit_code(outcome)
