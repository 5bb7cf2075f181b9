"""``latentforge contracts``: list, show and check the project's claims."""

from __future__ import annotations

import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from latentforge.contracts.load import ContractSet
    from latentforge.contracts.runner import Checked
    from latentforge.contracts.schema import Contract, Falsifier

app = typer.Typer(no_args_is_help=True, help="List, show and check the claims that this project makes.")

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_contracts(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Contracts or falsifier ids; all if none is named.")
    ] = None,
    arch: Annotated[str | None, typer.Option(metavar="ARCH", help="Scope: any, x86_64, aarch64, sm_121, …")] = None,
    device: Annotated[str | None, typer.Option(metavar="DEVICE", help="Scope: any, cpu or cuda.")] = None,
    profile: Annotated[str | None, typer.Option(metavar="PROFILE", help="Scope: any, smoke or full.")] = None,
    kind: Annotated[
        str | None, typer.Option(metavar="KIND", help="Kind of check: function, events or precondition.")
    ] = None,
    state: Annotated[str | None, typer.Option(metavar="STATE", help="current or superseded.")] = None,
    json: AsJson = False,
) -> None:
    """List the contracts, dependencies first; with a name or a filter, the falsifiers that it is true of.

    A scope is looked for as written: --device cuda lists what needs a GPU, --device any what holds on all devices.
    """
    from latentforge.cli.terminal import print_json
    from latentforge.contracts import load_contracts
    from latentforge.contracts.selecting import Selection, select

    contracts = load_contracts()
    asked = Selection(tuple(names or ()), arch, device, profile, kind, state)
    found = select(contracts, asked)
    if json:
        print_json(
            [
                {
                    "contract": contract.contract,
                    "version": contract.version,
                    "title": contract.title,
                    "falsifiers": [falsifier.id for falsifier in chosen],
                    "superseded": {one.id: by for one in chosen if (by := contracts.superseded_by(one.id))},
                    "scope": {one.id: contract.scope_of(one).model_dump() for one in chosen},
                }
                for contract, chosen in found
            ]
        )
        return
    width = max((len(contract.contract) for contract, _ in found), default=0)
    for contract, chosen in found:
        count = len(chosen)
        print(
            f"{contract.contract:<{width}}  {count:>2} {'falsifier ' if count == 1 else 'falsifiers'}  {contract.title}"
        )
        for one in chosen if asked != Selection() else ():
            by = contracts.superseded_by(one.id)
            print(f"  {one.id}  {_one_line(one.statement)}" + (f"  (superseded by {by})" if by else ""))
    if not found:
        print("no such claim.   next:  latentforge contracts list")


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A contract, or the id of one of its falsifiers.")], json: AsJson = False
) -> None:
    """Show one contract, or one falsifier: what it claims, and what would refute it."""
    from latentforge.cli.terminal import print_json
    from latentforge.contracts import load_contracts

    contracts = load_contracts()
    contract = contracts.named(name)
    only = name if name != contract.contract else None
    superseded = {f.id: contracts.superseded_by(f.id) for f in contract.falsifiers}
    if json:
        said = contract.model_dump(mode="json", by_alias=True)
        claims = [{**claim, "superseded_by": superseded[claim["id"]]} for claim in said["falsifiers"]]
        one = next((claim for claim in claims if claim["id"] == only), None)
        print_json({**said, "falsifiers": claims} if one is None else {"contract": contract.contract, **one})
        return
    print("\n".join(_told(contract, only, superseded)))


def _told(contract: Contract, only: str | None, superseded: dict[str, str | None]) -> list[str]:
    import textwrap

    def paragraph(text: str, indent: str) -> list[str]:
        return textwrap.wrap(_one_line(text), 100, initial_indent=indent, subsequent_indent=indent)

    lines = [f"{contract.contract}  version {contract.version}  {contract.title}", ""]
    if only is None:
        lines += [*paragraph(contract.description, "  "), ""]
        lines += [f"  {equation.id}: {equation.formula}   ({equation.source})" for equation in contract.equations]
        lines += [f"  [{reference}]" for reference in contract.references]
        lines += [f"  depends on {', '.join(contract.depends_on)}"] if contract.depends_on else []
        lines += [f"  supersedes {', '.join(contract.supersedes)}"] if contract.supersedes else []
    for falsifier in contract.falsifiers:
        if only not in (None, falsifier.id):
            continue
        successor = superseded[falsifier.id]
        lines += ["", f"  {falsifier.id}" + (f"  (superseded by {successor})" if successor else "")]
        lines += paragraph(falsifier.statement, "    ")
        lines += [
            f"    predicts   {_one_line(falsifier.prediction)}",
            f"    check      {falsifier.check}" + (f"  with {falsifier.arguments}" if falsifier.arguments else ""),
            f"    control    {_one_line(falsifier.control.name)}  {_planted(falsifier)}",
            f"    if it fails  {_one_line(falsifier.if_fails)}",
        ]
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _planted(falsifier: Falsifier) -> str:
    control = falsifier.control
    return f"with {control.arguments}" if control.change is None else f"change {control.change}"


@app.command()
def check(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Contracts or falsifier ids; all if none is named.")
    ] = None,
    run: Annotated[
        str | None, typer.Option(metavar="RUN", help="Judge the predicates over events on this run (folder or id).")
    ] = None,
    json: AsJson = False,
) -> int:
    """Run falsifiers and their planted controls.

    Exit code: 0 all pass, 1 one fails, 3 one is unknown.
    """
    from latentforge.cli.terminal import print_json
    from latentforge.contracts import check_contract, load_contracts, overall, summary
    from latentforge.contracts.machine import this_machine

    contracts = load_contracts()
    if run is not None:
        return _check_run(contracts, run, names or [], json=json)
    wanted: dict[str, set[str]] = {}
    for name in names or [contract.contract for contract in contracts]:
        contract = contracts.named(name)
        wanted.setdefault(contract.contract, set()).update(
            [name] if name != contract.contract else [falsifier.id for falsifier in contract.falsifiers]
        )
    machine = this_machine()
    table = _Table(max(len(falsifier.id) for _, falsifier in contracts.falsifiers()), quiet=json)
    results: list[Checked] = []
    with _one_thread():
        for contract in contracts:
            if contract.contract not in wanted:
                continue
            table.contract(contract)
            results += check_contract(
                contract,
                contracts,
                only=wanted[contract.contract],
                machine=machine,
                begin=table.begin,
                end=table.end,
            )
    code = overall(results)
    if json:
        print_json(
            {
                "exit_code": int(code),
                "summary": summary(results),
                "machine": {"arch": machine.arch, "gpus": list(machine.gpus)},
                "falsifiers": [result.as_json() for result in results],
            }
        )
    else:
        print(summary(results), flush=True)
    return code


def _check_run(contracts: ContractSet, run: str, names: list[str], *, json: bool) -> int:
    """The predicates over events, on the events of a run, each with its control planted into them."""
    from latentforge.cli.terminal import print_json
    from latentforge.contracts import check_run, overall, summary
    from latentforge.contracts.schema import EventCheck
    from latentforge.errors import RefusedError
    from latentforge.evidence.reading import find_run, read_run

    wanted: list[str] = []
    for name in names:
        contract = contracts.named(name)
        predicates = [one.id for one in contract.falsifiers if isinstance(one.check, EventCheck)]
        if name == contract.contract and not predicates:
            raise RefusedError(
                f"{name} has no predicate over events: nothing of it is judged on a run",
                next=f"latentforge contracts check {name}",
            )
        wanted += [name] if name != contract.contract else predicates
    record = read_run(find_run(run, next="latentforge contracts check --run FOLDER"))
    profile = None if record.identity is None else record.identity.spec.get("profile")
    doubts = [f"{one}: what it said is not known" for one in record.unread]
    if not any(event.kind == "end" for event in record.events):
        doubts.append("the run has not ended: more may be written, or its log was cut")
    results = check_run(contracts, record.events, kind=record.kind, profile=profile, only=wanted, doubts=doubts)
    code = overall(results)
    if json:
        found = [result.as_json() for result in results]
        print_json({"exit_code": int(code), "run": record.id, "summary": summary(results), "falsifiers": found})
        return code
    print(record.id)
    table = _Table(max((len(result.falsifier.id) for result in results), default=0), quiet=False)
    for result in results:
        table.end(result)
    print(summary(results), flush=True)
    return code


@contextmanager
def _one_thread() -> Iterator[None]:
    """torch computes with one thread, unless OMP_NUM_THREADS asks for more.

    The checks' tensors are small, each of their many operators would wait for its slowest thread, and where another
    process wants a core that takes ten times as long as one thread does.
    """
    asked = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read where torch is imported, which only some checks do
    torch = sys.modules.get("torch") if asked is None else None
    before = torch.get_num_threads() if torch else 0
    try:
        if torch:
            torch.set_num_threads(1)
        yield
    finally:
        if torch:
            torch.set_num_threads(before)
        if asked is None:
            del os.environ["OMP_NUM_THREADS"]


class _Table:
    """The table of UX.md, a line as each falsifier finishes; on a terminal the one that runs is shown meanwhile."""

    def __init__(self, width: int, *, quiet: bool) -> None:
        from latentforge.cli.terminal import Passing

        self._width = width
        self._quiet = quiet
        self._passing = Passing(active=not quiet)

    def contract(self, contract: Contract) -> None:
        if not self._quiet:
            print(contract.contract, flush=True)

    def begin(self, falsifier: Falsifier) -> Callable[[str], None]:
        def stage(name: str) -> None:
            what = "check" if name == "check" else f"control {falsifier.control.name}"
            self._passing.show(f"  {falsifier.id:<{self._width}}  …  {what}")

        return stage

    def end(self, checked: Checked) -> None:
        from latentforge.cli.terminal import accent
        from latentforge.report.words import one_line

        self._passing.clear()
        if self._quiet:
            return
        verdict, control = checked.verdict, checked.control
        said = one_line(verdict.text)
        word = accent(f"{verdict.outcome.name:<7}")
        line = f"  {verdict.falsifier:<{self._width}}  {word}  "
        if control is None or control.passed is not False:
            print(line + said, flush=True)
        else:
            seen = f"control {_one_line(checked.falsifier.control.name)} seen FAIL ({one_line(control.text)})"
            # In a pipe one line a falsifier, for grep; on a terminal too narrow for it, the control below.
            room = self._passing.columns - self._width - 13
            if max(46, len(said)) + 2 + len(seen) > room:
                print(f"{line}{said}\n{' ' * (self._width + 13)}{seen}", flush=True)
            else:
                print(f"{line}{said:<46}  {seen}", flush=True)
        if verdict.outcome.name != "PASS" and checked.counts:
            indent = " " * (self._width + 4)
            if verdict.outcome.name == "FAIL":
                print(f"{indent}means  {_one_line(checked.falsifier.if_fails)}", flush=True)
            print(f"{indent}next   latentforge contracts show {verdict.falsifier}", flush=True)
