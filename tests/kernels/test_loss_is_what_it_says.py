"""The claims of kd-mathematics and kd-step hold, and each planted mistake is caught."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

CONTRACTS = Path(__file__).resolve().parents[2] / "contracts"


def falsifiers() -> list[dict[str, Any]]:
    found = []
    for name in ("kd-mathematics", "kd-step"):
        found += yaml.safe_load((CONTRACTS / f"{name}.yaml").read_text(encoding="utf-8"))["falsifiers"]
    return found


def check(falsifier: dict[str, Any], arguments: dict[str, Any]) -> Any:
    module, function = falsifier["check"].split(":")
    return getattr(import_module(module), function)(**arguments)


@pytest.mark.parametrize("falsifier", falsifiers(), ids=lambda f: f["id"])
def test_claim_holds(falsifier: dict[str, Any]) -> None:
    finding = check(falsifier, falsifier.get("with", {}))
    assert finding.passed is True, finding.text


@pytest.mark.parametrize("falsifier", falsifiers(), ids=lambda f: f["id"])
def test_planted_mistake_is_caught(falsifier: dict[str, Any]) -> None:
    finding = check(falsifier, falsifier["control"]["with"])
    assert finding.passed is False, finding.text


@pytest.mark.parametrize("falsifier", falsifiers(), ids=lambda f: f["id"])
def test_a_misspelt_mistake_is_an_error_and_not_a_pass(falsifier: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="nonesuch"):
        check(falsifier, {"mutant": "nonesuch"})
