"""``latentforge evidence``: verify, offline, what a run left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from latentforge.evidence.verify import Verification

app = typer.Typer(no_args_is_help=True, help="Verify, offline, what a run left behind.")


@app.callback()
def _group() -> None:
    """Verify, offline, what a run left behind."""


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="A run's folder, its manifest.json, a folder of runs, or a run id.")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Recompute every digest, the statement and the ledger's chain.

    Exit code: 0 verified, 1 something was altered, 3 something could not be verified here.
    """
    from latentforge.cli.terminal import Passing, print_json
    from latentforge.evidence import file_sha256, verify_evidence
    from latentforge.evidence.reading import evidence_folder, find_run
    from latentforge.verdicts import exit_code

    passing = Passing(active=not json)

    def hasher(file: Path) -> str:
        passing.show(f"hashing {file}")
        return file_sha256(file)

    verification = verify_evidence(
        find_run(path, next=f"latentforge evidence verify {evidence_folder()}/"), hasher=hasher
    )
    passing.clear()
    if json:
        print_json(verification.as_json())
    else:
        print("\n".join(_told(verification)))
    return exit_code(verification.outcome)


def _told(verification: Verification) -> list[str]:
    from latentforge.cli.terminal import accent, size
    from latentforge.evidence.ledger import LEDGER
    from latentforge.verdicts import Outcome

    lines = []
    for run in [verification, *verification.runs]:
        where = f"{run.run}/" if run.run is not None and run is not verification else ""
        for problem in run.problems:
            word = "FAILED " if problem.outcome is Outcome.FAIL else "UNKNOWN"
            lines.append(f"{accent(word)}  {where}{problem.what}  {problem.text}")
    if verification.outcome is Outcome.PASS:
        counted = f"{verification.subjects} subjects, {size(verification.bytes)} in {verification.seconds:.1f} s"
        if verification.run is None:
            runs = f"{len(verification.runs)} {'run' if len(verification.runs) == 1 else 'runs'}"
            lines.append(f"{accent('verified, unsigned')}  {runs}, {counted} · {LEDGER} is whole")
        elif (entry := verification.entry) is not None:
            link = f"links to {entry.entry - 1}" if entry.entry > 1 else "is the first"
            lines.append(f"{accent('verified, unsigned')}  {counted} · ledger entry {entry.entry} {link}")
    if verification.run is not None:
        return lines + _about_run(verification)
    for run in verification.runs:
        lines += [f"{run.run}: {line}" for line in _about_run(run) if line != _AGREE]
    return lines


_AGREE = "requested and effective configuration agree"


def _about_run(run: Verification) -> list[str]:
    """What the evidence says of the run itself; sound evidence of a failed run is still of a failed run."""
    import json

    from latentforge.verdicts import Outcome

    lines: list[str] = []
    if run.configuration is None or run.end is None or run.outcome is Outcome.FAIL:
        return lines
    if run.configuration["effective"] is None:
        lines.append("the effective configuration was not recorded")
    elif differences := run.configuration["differences"]:
        lines.append("requested and effective configuration differ:")
        lines += [
            f"  {one['field']}  {json.dumps(one['requested'])} asked, {json.dumps(one['effective'])} in force"
            for one in differences
        ]
    else:
        lines.append(_AGREE)
    if run.end["outcome"] != "pass":
        code = "no exit code recorded" if run.end["code"] is None else f"exit code {run.end['code']}"
        lines.append(f"the run itself did not pass: {run.end['outcome']}, {code}")
    return lines
