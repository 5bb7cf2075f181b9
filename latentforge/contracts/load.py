"""Reading contract files: from the checkout, or from what a wheel carries."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from latentforge.contracts.document import Document, Location, parse_document
from latentforge.contracts.schema import TAGS, Contract, EventCheck, Falsifier, Precondition
from latentforge.errors import RefusedError

_CHECKS: tuple[type[BaseModel], ...] = (EventCheck, Precondition)
"""The kinds of check that are mappings."""


@dataclass(frozen=True)
class ContractSet:
    """All contracts of a folder, dependencies before what depends on them."""

    contracts: tuple[Contract, ...]

    def __iter__(self) -> Iterator[Contract]:
        return iter(self.contracts)

    def named(self, name: str) -> Contract:
        """The contract of that name, or the one that holds the falsifier of that id; refused with the nearest."""
        for contract in self.contracts:
            if name == contract.contract or any(name == falsifier.id for falsifier in contract.falsifiers):
                return contract
        known = [c.contract for c in self.contracts] + [f.id for c in self.contracts for f in c.falsifiers]
        near = difflib.get_close_matches(name, known, n=1)
        raise RefusedError(
            f"there is no contract or falsifier {name!r}",
            next=f"latentforge contracts show {near[0]}" if near else "latentforge contracts list",
        )

    def superseded_by(self, falsifier_id: str) -> str | None:
        """The name of the contract that supersedes a falsifier, or None."""
        return next((c.contract for c in self.contracts if falsifier_id in c.supersedes), None)

    def falsifiers(self) -> Iterator[tuple[Contract, Falsifier]]:
        """Every falsifier with its contract, in order."""
        for contract in self.contracts:
            for falsifier in contract.falsifiers:
                yield contract, falsifier


def contracts_folder() -> Traversable:
    """The contracts that belong to the running code: the checkout's, or those in the wheel."""
    package = Path(__file__).resolve().parent.parent
    if (package.parent / "pyproject.toml").is_file() and (package.parent / "contracts").is_dir():
        return package.parent / "contracts"
    folder = resources.files("latentforge") / "_data" / "contracts"
    if not folder.is_dir():
        raise RefusedError("this install carries no contracts", next="install latentforge from a checkout or a wheel")
    return folder


def load_contracts(folder: Traversable | None = None) -> ContractSet:
    """Read and validate every ``.yaml`` file of a folder; refused with all problems, each with file and line."""
    folder = contracts_folder() if folder is None else folder
    files = sorted((item for item in folder.iterdir() if item.name.endswith((".yaml", ".yml"))), key=lambda i: i.name)
    if not files:
        raise RefusedError(f"there are no contracts (*.yaml) in {folder}")
    read: list[tuple[Contract, Document]] = []
    problems: list[str] = []
    owners: dict[str, str] = {}
    for file in files:
        name = f"{folder.name}/{file.name}"
        try:
            if not file.is_file():  # a folder, a link to nowhere, a pipe that nobody writes
                raise RefusedError(f"{name}:1: is no file that can be read")
            document = parse_document(file.read_text(encoding="utf-8"), name)
            contract = validate_contract(document, stem=file.name.rpartition(".")[0])
        except UnicodeDecodeError as error:
            problems.append(f"{name}:1: not UTF-8 ({error.reason} at byte {error.start})")
            continue
        except OSError as error:
            problems.append(f"{name}:1: cannot be read: {error.strerror}")
            continue
        except RefusedError as error:
            problems.append(str(error))
            continue
        for index, falsifier in enumerate(contract.falsifiers):
            if falsifier.id in owners:
                message = f"falsifier {falsifier.id} is already defined in {owners[falsifier.id]}"
                problems.append(document.problem(("falsifiers", index, "id"), message))
            owners.setdefault(falsifier.id, name)
        read.append((contract, document))
    # Of a file that could not be read nothing is known: what the others say of it cannot be judged.
    problems = problems or [*_dependencies(read), *_supersession(read)]
    if problems:
        raise RefusedError("\n".join(problems), next="correct the lines above; contracts/ is read strictly")
    return ContractSet(tuple(_ordered([contract for contract, _ in read])))


def validate_contract(document: Document, *, stem: str) -> Contract:
    """The contract that a document states; RefusedError with a line for each problem."""
    if not isinstance(document.value, dict):
        raise RefusedError(document.problem((), "a contract is a mapping of keys"))
    unknown = list(_unknown_keys(document, document.value, Contract, ()))
    if unknown:
        raise RefusedError("\n".join(unknown))
    try:
        contract = Contract.model_validate(document.value)
    except ValidationError as error:
        raise RefusedError("\n".join(_told(document, problem) for problem in error.errors(include_url=False))) from None
    if contract.contract != stem:
        raise RefusedError(document.problem(("contract",), f"contract {contract.contract!r} stands in {stem}.yaml"))
    return contract


def _models_of(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_of(argument)


def _unknown_keys(document: Document, value: Any, model: type[BaseModel], location: Location) -> Iterator[str]:
    """Problems for keys that the model does not have, each with the nearest one that it has."""
    if isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_keys(document, item, model, (*location, index))
        return
    if not isinstance(value, dict):
        return
    fields = {field.alias or name: field for name, field in model.model_fields.items()}
    for key, item in value.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}?" if near else "known: " + ", ".join(fields)
            where = f" in {_dotted(location)}" if location else ""
            yield document.problem((*location, key), f"unknown key {key!r}{where}; {hint}")
            continue
        for inner in _models_of(fields[key].annotation):
            if inner in _CHECKS and isinstance(item, dict) and inner is not _meant(item):
                continue  # the other kind of check
            yield from _unknown_keys(document, item, inner, (*location, key))


def _meant(check: Mapping[str, Any]) -> type[BaseModel]:
    """The kind of check that a mapping is, or was to be: one with a misspelt key has the others of its kind."""
    if "accepts" in check:
        return Precondition
    return max(_CHECKS, key=lambda kind: len(check.keys() & kind.model_fields.keys()))


def _told(document: Document, problem: Any) -> str:
    location: Location = tuple(part for part in problem["loc"] if part not in TAGS)
    message = str(problem["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:]
    where = _dotted(location)
    if problem["type"] == "missing":
        return document.problem(
            location, f"key {location[-1]!r} is missing from {_dotted(location[:-1]) or 'the file'}"
        )
    value = problem["input"]
    if where and not isinstance(value, dict | list):
        return document.problem(location, f"{where} = {value!r}: {message}")
    return document.problem(location, f"{where}: {message}" if where else message)


def _dotted(location: Location) -> str:
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _dependencies(read: Sequence[tuple[Contract, Document]]) -> Iterator[str]:
    """Problems of ``depends_on``: a contract that is not there, a circle."""
    wanted = {contract.contract: contract.depends_on for contract, _ in read}
    for contract, document in read:
        for index, other in enumerate(contract.depends_on):
            where = ("depends_on", index)
            if other not in wanted:
                yield document.problem(where, f"depends_on {other!r}: no such contract{_nearest(other, wanted)}")
            elif circle := _circle(contract.contract, other, wanted):
                yield document.problem(where, f"contracts depend on each other in a circle: {circle}")


def _supersession(read: Sequence[tuple[Contract, Document]]) -> Iterator[str]:
    """Problems of ``supersedes``: a claim that is not there, two successors of one, a circle."""
    owner = {falsifier.id: contract.contract for contract, _ in read for falsifier in contract.falsifiers}
    successors: dict[str, str] = {}
    replaced = {contract.contract: [owner[one] for one in contract.supersedes if one in owner] for contract, _ in read}
    for contract, document in read:
        for index, one in enumerate(contract.supersedes):
            where = ("supersedes", index)
            if one not in owner:
                yield document.problem(where, f"supersedes {one}: no contract claims it{_nearest(one, owner)}")
            elif one in successors:
                yield document.problem(where, f"{one} is already superseded by {successors[one]}")
            elif circle := _circle(contract.contract, owner[one], replaced):
                yield document.problem(where, f"contracts supersede each other in a circle: {circle}")
            successors.setdefault(one, contract.contract)


def _nearest(name: str, known: Iterable[str]) -> str:
    """The end of a refusal of ``name``: what may have been meant, if anything is like it."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _circle(start: str, first: str, onward: Mapping[str, Sequence[str]]) -> str | None:
    """The way from ``first`` back to ``start``, told; None where there is none."""
    ways, seen = [[start, first]], {first}
    for way in ways:  # grows meanwhile: breadth first, so that the shortest way is told
        if way[-1] == start:
            return " → ".join(way)
        for name in onward.get(way[-1], ()):
            if name not in seen:
                seen.add(name)
                ways.append([*way, name])
    return None


def _ordered(contracts: Sequence[Contract]) -> Iterator[Contract]:
    """Dependencies first, otherwise by name; there is no circle among them."""
    by_name = {contract.contract: contract for contract in contracts}
    done: set[str] = set()

    def visit(name: str) -> Iterator[Contract]:
        if name in done:
            return
        done.add(name)
        for other in by_name[name].depends_on:
            yield from visit(other)
        yield by_name[name]

    for name in by_name:
        yield from visit(name)
