"""Previews only read, and what was done is not done again, whatever the carrier."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dispatch.session import preview
from dispatch.transport.call import READING
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]


@pytest.fixture(params=["local", pytest.param("ssh", marks=pytest.mark.sshd)])
def host(request: pytest.FixtureRequest, ask: Make, tmp_path: Any) -> Any:
    """This machine, and a real server on it whose build is there."""
    from dispatch.hosts.inventory import Host

    if request.param == "local":
        return Host(name="local")
    enrolled, server = request.getfixturevalue("enrolled"), request.getfixturevalue("shared_sshd")
    box = enrolled(server)
    request.getfixturevalue("built")(box, ask(box))
    return box


@pytest.mark.fault(row=41)
def test_a_dry_run_sends_reading_verbs_only_changes_no_file_and_shows_the_same_bytes_twice(
    host: Any,
    jobs: Any,
    ask: Make,
    session: Make,
    laptop: Any,
    asked_verbs: list[str],
    snapshot: Make,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Any,
) -> None:
    for state in ("nothing there", "finished"):
        if state == "finished":
            assert session(host).go(ask(host)) is ExitCode.PASS
        capsys.readouterr()
        asked_verbs.clear()
        before, shown = snapshot(tmp_path), []
        for _ in range(2):
            assert preview(ask(host), laptop.places, as_json=False) is ExitCode.PASS
            shown.append(capsys.readouterr().out)
        assert shown[0] == shown[1]
        assert shown[0].startswith("plan ")
        assert asked_verbs
        assert set(asked_verbs) <= READING
        assert snapshot(tmp_path) == before


@pytest.mark.fault(row=42)
def test_a_second_apply_keeps_every_step_of_the_whole_pipeline(
    host: Any, jobs: Any, ask: Make, session: Make, asked_verbs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert session(host).go(ask(host)) is ExitCode.PASS
    capsys.readouterr()
    asked_verbs.clear()
    assert session(host).go(ask(host)) is ExitCode.PASS
    assert set(asked_verbs) <= READING
    out = capsys.readouterr().out
    table = out[out.index("  step ") : out.index("\n\n", out.index("  step "))].splitlines()[1:]
    wills = {line.split()[0]: line.split()[1] for line in table}
    assert {"build", "data", "teacher", "score", "distill", "collect", "evidence"} <= wills.keys()
    assert wills.pop("preflight") == "check"
    assert set(wills.values()) == {"keep"}
    assert "\nno changes. distill-" in out
    assert len(jobs.starts()) == 4
