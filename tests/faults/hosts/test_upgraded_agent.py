"""A laptop with a newer agent: a run that goes on keeps the one it was started with, and both tell the same story."""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch import agent_package
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]


def newer(content: bytes) -> bytes:
    """The same agent with one file more: other bytes, another digest."""
    buffer = io.BytesIO(content)
    with zipfile.ZipFile(buffer, "a", zipfile.ZIP_STORED) as archive:
        archive.writestr("latentforge_agent/newer.py", "NEWER = True\n")
    return buffer.getvalue()


@pytest.mark.fault(row=39)
def test_a_run_keeps_the_agent_that_started_it_and_a_newer_one_follows_it_to_its_end(
    jobs: Any, ask: Make, session: Make, eventually: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.hold_at(5)
    assert session().go(ask(), detach=True) is ExitCode.PASS
    run = eventually(lambda: next((one for one in jobs.starts() if one.startswith("distill-")), None), "it starts")
    old, upgraded = agent_package.agent_sha256(), newer(agent_package.agent_bytes())
    monkeypatch.setattr(agent_package, "agent_bytes", lambda: upgraded)
    monkeypatch.setattr(agent_package, "agent_sha256", lambda: hashlib.sha256(upgraded).hexdigest())
    monkeypatch.setattr(agent_package, "_squeezed", lambda: zlib.compress(upgraded))
    assert agent_package.agent_sha256() != old

    after = session()
    after.transport.install()
    agents = Path(os.environ["XDG_STATE_HOME"]) / "latentforge/agent"
    assert {path.stem for path in agents.glob("*.pyz")} == {old, agent_package.agent_sha256()}
    reply = after.transport.call("status", {"runs": [run]})
    assert reply.agent == agent_package.agent_sha256()
    supervisor = reply.result[run]["supervisor_pid"]
    assert f"agent/{old}.pyz" in Path(f"/proc/{supervisor}/cmdline").read_bytes().decode()
    jobs.open()
    assert session().go(ask()) is ExitCode.PASS, "the newer agent follows, collects and verifies"
    assert len(jobs.starts()) == 4
    # The next launch is the newer one's.
    assert session().go(ask(None, "distill.steps=61")) is ExitCode.PASS
    assert len(jobs.starts()) == 5
