"""Contracts: claims with falsifiers, each an executable check and a planted control on which it must fail.

``Finding`` and ``worse`` are imported eagerly (checks return one and call the other); the loader and the runner, which
need pydantic and YAML, lazily.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from latentforge.contracts.finding import Finding, worse

if TYPE_CHECKING:
    from latentforge.contracts.load import ContractSet, contracts_folder, load_contracts
    from latentforge.contracts.runner import Checked, check_contract, check_falsifier, check_run, overall, summary
    from latentforge.contracts.schema import Contract, Falsifier

_HOMES = {
    "ContractSet": "load",
    "contracts_folder": "load",
    "load_contracts": "load",
    "Checked": "runner",
    "check_contract": "runner",
    "check_falsifier": "runner",
    "check_run": "runner",
    "overall": "runner",
    "summary": "runner",
    "Contract": "schema",
    "Falsifier": "schema",
}

__all__ = [
    "Checked",
    "Contract",
    "ContractSet",
    "Falsifier",
    "Finding",
    "check_contract",
    "check_falsifier",
    "check_run",
    "contracts_folder",
    "load_contracts",
    "overall",
    "summary",
    "worse",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
