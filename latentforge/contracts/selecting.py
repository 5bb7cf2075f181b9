"""Which falsifiers of all contracts are meant: by name, by scope as it is written, by kind of check, by state."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from latentforge.contracts.load import ContractSet
from latentforge.contracts.schema import ARCHITECTURE, Contract, EventCheck, Falsifier, Precondition, Scope
from latentforge.errors import RefusedError

_KINDS = ("function", "events", "precondition")
_STATES = ("current", "superseded")


@dataclass(frozen=True)
class Selection:
    """What is asked for; None (of ``names``: none) asks for all of them."""

    names: tuple[str, ...] = ()
    arch: str | None = None
    device: str | None = None
    profile: str | None = None
    kind: str | None = None
    state: str | None = None


def select(contracts: ContractSet, asked: Selection) -> list[tuple[Contract, list[Falsifier]]]:
    """The contracts that have falsifiers of which all that is asked for is true, each with these; both in order.

    RefusedError for a name that no contract has, and for a value that no falsifier could have.
    """
    wanted = _named(contracts, asked.names)
    for name in ("device", "profile"):
        _known(name, getattr(asked, name), get_args(Scope.model_fields[name].annotation))
    _known("kind", asked.kind, _KINDS)
    _known("state", asked.state, _STATES)
    if asked.arch is not None and not re.fullmatch(f"any|{ARCHITECTURE}", asked.arch):
        raise RefusedError(f"--arch {asked.arch!r} is no architecture (any, x86_64, aarch64, arm64, sm_121)")

    def meant(contract: Contract, falsifier: Falsifier) -> bool:
        scope = contract.scope_of(falsifier)
        state = _STATES[contracts.superseded_by(falsifier.id) is not None]
        return (
            falsifier.id in wanted
            and (asked.arch is None or asked.arch in ([scope.arch] if scope.arch == "any" else scope.arch))
            and asked.device in (None, scope.device)
            and asked.profile in (None, scope.profile)
            and asked.kind in (None, _kind(falsifier))
            and asked.state in (None, state)
        )

    found = [(contract, [one for one in contract.falsifiers if meant(contract, one)]) for contract in contracts]
    return [(contract, chosen) for contract, chosen in found if chosen]


def _named(contracts: ContractSet, names: Sequence[str]) -> set[str]:
    wanted: set[str] = set()
    for name in names or [contract.contract for contract in contracts]:
        contract = contracts.named(name)
        wanted |= {name} if name != contract.contract else {falsifier.id for falsifier in contract.falsifiers}
    return wanted


def _kind(falsifier: Falsifier) -> str:
    check = falsifier.check
    return _KINDS[1 if isinstance(check, EventCheck) else 2 if isinstance(check, Precondition) else 0]


def _known(option: str, value: str | None, known: Sequence[str]) -> None:
    if value is None or value in known:
        return
    near = difflib.get_close_matches(value, known, n=1)
    raise RefusedError(
        f"--{option} {value!r} is none of {', '.join(known)}",
        next=f"latentforge contracts list --{option} {near[0] if near else known[0]}",
    )
