"""``latentforge evidence``: verify, sign, compare and reproduce what runs left behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from pathlib import Path

    from latentforge.evidence.difference import Change
    from latentforge.evidence.verify import Verification

app = typer.Typer(no_args_is_help=True, help="Verify, offline, what a run left behind; sign, compare, reproduce.")


@app.callback()
def _group() -> None:
    """Verify, offline, what a run left behind; sign, compare, reproduce."""


@app.command()
def verify(
    path: Annotated[str, typer.Argument(help="A run's folder, its manifest.json, a folder of runs, or a run id.")],
    signers: Annotated[
        str | None,
        typer.Option(help="Whose signatures count: OpenSSH's allowed signers. Each run must bear one.", metavar="FILE"),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(help="A signed head of the ledger that was kept elsewhere (its .sig beside it).", metavar="FILE"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Recompute every digest, the statement, the ledger's chain and the signatures.

    Signatures that are there are checked always; whose they are, only with --signers (or EVIDENCE_SIGNERS).

    Exit code: 0 verified, 1 something was altered, 3 something could not be verified here.
    """
    import os
    from pathlib import Path

    from latentforge.cli.terminal import Passing, print_json
    from latentforge.errors import RefusedError
    from latentforge.evidence import file_sha256, verify_evidence
    from latentforge.evidence.reading import evidence_folder, find_run
    from latentforge.evidence.signatures import allowed_signers
    from latentforge.verdicts import exit_code

    allowed = allowed_signers(signers)
    if "" in (head or ()):
        raise RefusedError("--head names no file: the name is empty", next="ls runs/heads/")
    passing = Passing(active=not json)

    def hasher(file: Path) -> str:
        passing.show(f"hashing {file}")
        return file_sha256(file)

    verification = verify_evidence(
        find_run(path, next=f"latentforge evidence verify {evidence_folder()}/"),
        hasher=hasher,
        signers=allowed,
        heads=[Path(os.path.expanduser(one)) for one in head or ()],
    )
    passing.clear()
    if json:
        print_json(verification.as_json())
    else:
        print("\n".join(_told(verification)))
    return exit_code(verification.outcome)


@app.command()
def sign(
    paths: Annotated[
        list[str],
        typer.Argument(help="Runs (folders, beginnings of ids), or a folder of runs: its ledger.", metavar="PATH..."),
    ],
    key: Annotated[
        str | None,
        typer.Option(help="An SSH key: private, or public with an agent. Default: EVIDENCE_KEY.", metavar="FILE"),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Sign runs, or the ledger as it stands, with an SSH key; nothing in which something fails, and once.

    A signed ledger vouches for every run in it, and shows where later its last lines are missing. Exit code: 0 all
    signed, 1 something does not verify.
    """
    import os
    from pathlib import Path

    from latentforge.cli.terminal import print_json
    from latentforge.errors import RefusedError
    from latentforge.evidence.reading import find_run
    from latentforge.evidence.signing import sign_evidence

    named = os.environ.get("EVIDENCE_KEY") if key is None else key
    if not named:
        following = f"latentforge evidence sign {paths[0]} --key ~/.ssh/id_ed25519"
        raise RefusedError("no key was named, with --key or EVIDENCE_KEY", next=following)
    found = [find_run(path) for path in paths]
    signed = []
    for path in found:
        what, signature = sign_evidence(path, Path(os.path.expanduser(named)))
        signed.append({"signed": what, "signature": str(signature)})
        if not json:
            print(f"signed {what}: {signature}")
    if json:
        print_json(signed)
    return 0


@app.command()
def diff(
    before: Annotated[str, typer.Argument(help="A run's folder, or the beginning of its id.", metavar="A")],
    after: Annotated[str, typer.Argument(help="The run to compare with it.", metavar="B")],
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Say what changed between two runs: asked for, in force, identities, verdicts, results, cost, files.

    Read from the runs' files, which are not verified by this: evidence verify does.
    """
    from latentforge.cli.terminal import accent, print_json
    from latentforge.evidence.difference import compare_runs
    from latentforge.evidence.reading import find_run, read_run
    from latentforge.report.words import one_line

    first, second = (read_run(find_run(text, next="latentforge runs list")) for text in (before, after))
    sections = compare_runs(first, second)
    if json:
        changes = {one.name: {"changed": [it.as_json() for it in one.changes], "same": one.same} for one in sections}
        print_json({"before": first.id, "after": second.id, "sections": changes})
        return 0
    print(f"{first.id} → {second.id}")
    for section in sections:
        if section.changes:
            print(f"{accent(section.name)}  ({section.same} the same)")
            width = min(48, max(len(change.what) for change in section.changes))
            # Of a model that was trained again every tensor differs: their count says it.
            shown = section.changes if section.name != "tensors" else section.changes[:3]
            for change in shown:
                sides = f"{_shown(change.before)} → {_shown(change.after)}{_ratio(change)}"
                print(f"  {one_line(change.what):<{width}}  {sides}")
            if len(shown) < len(section.changes):
                print(f"  and {len(section.changes) - len(shown)} more: --json lists all")
    alike = [section.name for section in sections if section.same and not section.changes]
    if alike:
        print(f"the same: {', '.join(alike)}")
    return 0


def _shown(value: Any) -> str:
    import json
    import re

    from latentforge.evidence.difference import ABSENT
    from latentforge.report.words import one_line

    if value is ABSENT:
        return "–"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str):
        return f"{value[:12]}…" if re.fullmatch(r"[0-9a-f]{40,}", value) else one_line(value)
    return one_line(json.dumps(value, ensure_ascii=False))


def _ratio(change: Change) -> str:
    numbers = [value for value in (change.before, change.after) if isinstance(value, float | int)]
    if len(numbers) < 2 or any(isinstance(value, bool) or value <= 0 for value in numbers):
        return ""
    ratio = float(numbers[1]) / float(numbers[0])  # as doubles: two whole numbers may be too far apart for Python
    return f"  (× {ratio:.3g})"


@app.command()
def reproduce(
    run: Annotated[str, typer.Argument(help="A run's folder, or the beginning of its id.")],
    to: Annotated[
        str | None, typer.Option(help="Keep the new execution here. Default: removed when compared.", metavar="FOLDER")
    ] = None,
    inputs: Annotated[
        list[str] | None, typer.Option(help="Where runs that are its inputs lie; again for more.", metavar="FOLDER")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, max=1024, help="Default: as many as the first time.")] = None,
    tolerance: Annotated[
        float, typer.Option(min=0, help="What may be apart, relative (< 1), where sums were made in another order.")
    ] = 1e-4,
    python: Annotated[
        str | None, typer.Option(help="Whose LatentForge runs it. Default: this one.", metavar="FILE")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> int:
    """Run a run again from its identity and its inputs, in a fresh folder, and compare what it leaves with the first.

    With the threads, processor and versions of the first time every bit of the weights and every value of a metric has
    to be the same. Where one of them differs, they have to agree within the tolerance, and the difference is named. A
    verdict or an exit code that is another is never within it.

    Exit code: 0 bit-equal or within tolerance, 1 not reproduced, 3 within tolerance and not known whether it may be.
    """
    import sys
    import tempfile
    from pathlib import Path

    from latentforge.cli.terminal import Passing, ended_as_by_ctrl_c, print_json
    from latentforge.errors import RefusedError
    from latentforge.evidence.reading import find_run
    from latentforge.report.words import one_line
    from latentforge.train.reproduce import reproduce
    from latentforge.train.rerun import Rerun
    from latentforge.verdicts import exit_code

    for option, text in (("--to", to), ("--python", python), *(("--inputs", one) for one in inputs or ())):
        if text == "":
            raise RefusedError(f"{option} names nothing", next=f"name something, or leave out {option}")
    source = find_run(run, next="latentforge runs list")
    passing = Passing(active=not json)
    with ended_as_by_ctrl_c(), tempfile.TemporaryDirectory(prefix="latentforge-reproduce-") as fresh:
        folder = Path(fresh if to is None else to).absolute()
        places = tuple(Path(one).absolute() for one in inputs or ())
        program = Path(sys.executable if python is None else python)
        how = Rerun(folder, places, threads, tolerance, program, kept=to is not None)
        try:
            found = reproduce(source, how, say=passing.show)
        finally:
            passing.clear()
    if json:
        print_json({**found.as_json(), **({"folder": None} if to is None else {})})
    else:
        print("\n".join(one_line(line) for line in found.lines()))
    return exit_code(found.outcome)


def _told(verification: Verification) -> list[str]:
    from latentforge.cli.terminal import accent, size
    from latentforge.evidence.ledger import LEDGER
    from latentforge.report.words import one_line
    from latentforge.verdicts import Outcome

    lines = []
    for run in [verification, *verification.runs]:
        where = f"{run.run}/" if run.run is not None and run is not verification else ""
        # A ledger of thousands names as many runs that are elsewhere; --json lists them all.
        unknown = [problem for problem in run.problems if problem.outcome is Outcome.UNKNOWN]
        for problem in run.problems:
            if problem.outcome is Outcome.UNKNOWN and problem not in unknown[:_MOST]:
                continue
            word = "FAILED " if problem.outcome is Outcome.FAIL else "UNKNOWN"
            lines.append(f"{accent(word)}  {where}{one_line(problem.what)}  {one_line(problem.text)}")
        if len(unknown) > _MOST:
            lines.append(f"{accent('UNKNOWN')}  {where}and {len(unknown) - _MOST} more: --json lists all")
    if verification.outcome is Outcome.PASS:
        counted = f"{verification.subjects} subjects, {size(verification.bytes)} in {verification.seconds:.1f} s"
        verified = accent(one_line(verification.standing))
        if verification.run is None:
            runs = f"{len(verification.runs)} {'run' if len(verification.runs) == 1 else 'runs'}"
            lines.append(f"{verified}  {runs}, {counted} · {LEDGER} is whole")
        elif (entry := verification.entry) is not None:
            link = f"links to {entry.entry - 1}" if entry.entry > 1 else "is the first"
            lines.append(f"{verified}  {counted} · ledger entry {entry.entry} {link}")
        else:
            lines.append(f"{verified}  {counted} · no {LEDGER} beside it")
    if verification.run is not None:
        return lines + _about_run(verification)
    for run in verification.runs:
        lines += [f"{run.run}: {line}" for line in _about_run(run) if line != _AGREE]
    return lines


_MOST = 10  # problems of the same weight that are worth a line each
_AGREE = "requested and effective configuration agree"


def _about_run(run: Verification) -> list[str]:
    """What the evidence says of the run itself; sound evidence of a failed run is still of a failed run."""
    import json

    from latentforge.report.words import one_line
    from latentforge.verdicts import Outcome

    lines: list[str] = []
    if run.configuration is None or run.end is None or run.outcome is Outcome.FAIL:
        return lines
    if run.configuration["effective"] is None:
        lines.append("the effective configuration was not recorded")
    elif differences := run.configuration["differences"]:
        lines.append("requested and effective configuration differ:")
        lines += [
            f"  {one_line(one['field'])}  {json.dumps(one['requested'])} asked, {json.dumps(one['effective'])} in force"
            for one in differences
        ]
    else:
        lines.append(_AGREE)
    if run.end["outcome"] != "pass":
        code = "no exit code recorded" if run.end["code"] is None else f"exit code {run.end['code']}"
        lines.append(f"the run itself did not pass: {run.end['outcome']}, {code}")
    return lines
