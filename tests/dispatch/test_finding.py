"""A run is found on its host by the beginning of its id, by whoever trusts the host."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import pytest

from dispatch.agent.paths import Root
from dispatch.agent.reserving import reserve
from dispatch.records import find_there
from dispatch.transport.local import LocalTransport
from latentforge.cli import dispatch as commands
from latentforge.errors import RefusedError
from latentforge.spec.canonical import canonical_bytes


def test_a_host_knows_its_runs_by_their_beginnings(laptop: Any, session: Callable[..., Any]) -> None:
    runs = []
    for seed in range(2):
        identity = canonical_bytes({"kind": "data", "seed": seed}).decode()
        runs.append(f"data-{hashlib.sha256(identity.encode()).hexdigest()[:20]}")
        launch = {"run": runs[-1], "kin": "k", "argv": ["true"], "env": {}, "lease": []}
        reserve(Root(str(laptop.home / "state" / "latentforge")), runs[-1], identity, launch)
    transport = session().transport
    assert isinstance(transport, LocalTransport)
    assert find_there(transport, runs[1][:12]) == runs[1]
    with pytest.raises(RefusedError, match="the beginning of 2 runs on local") as several:
        find_there(transport, "data-")
    assert several.value.next == "\n".join(sorted(runs))
    for strange in ("data-zz", ""):
        with pytest.raises(RefusedError, match="no run on local begins with"):
            find_there(transport, strange)
    _places, record, host = commands.located(runs[0][:12], "local")
    assert (record.run, host.name) == (runs[0], "local")
