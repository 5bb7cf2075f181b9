"""The claims about the store of targets: each holds, and its planted control is seen failing."""

from __future__ import annotations

import pytest

from ..claims import claims_of, require_claim


@pytest.mark.parametrize("falsifier_id", [name for name, _ in claims_of("targets.test_claims")])
def test_the_claim_holds_and_its_control_is_seen_failing(falsifier_id: str) -> None:
    require_claim(falsifier_id)
