"""What is wrong with a host is told before a launch, and nothing of the launch is left there."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts.inventory import Host
from dispatch.session import preview
from latentforge.errors import LatentForgeError
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]


def refused(session: Make, ask: Make, host: Host, **more: Any) -> LatentForgeError:
    """The error with which `go` ends, after a look that it started and reserved nothing."""
    with pytest.raises(LatentForgeError) as raised:
        session(host).go(ask(host, **more))
    assert not (Path(str(host.root)) / "runs").exists()
    assert raised.value.code is ExitCode.FAIL
    assert raised.value.next
    return raised.value


def local(root: Path) -> Host:
    return Host(name="local", root=str(root))


@pytest.mark.fault(row=15)
def test_a_disk_without_room_for_the_run_is_refused_with_both_numbers(
    mounted: Make, jobs: Any, ask: Make, session: Make
) -> None:
    error = refused(session, ask, local(mounted("size=24m")))
    assert "0.0 GiB free in" in str(error)
    assert "2.0 GiB needed" in str(error)
    assert jobs.starts() == []


@pytest.mark.fault(row=16)
def test_a_disk_without_inodes_is_refused_with_both_numbers(mounted: Make, jobs: Any, ask: Make, session: Make) -> None:
    error = refused(session, ask, local(mounted("size=4g,nr_inodes=50")))
    assert "49 inodes free in" in str(error)
    assert "10000 needed" in str(error)


@pytest.mark.fault(row=24)
def test_a_root_that_others_may_read_or_write_is_refused_with_the_command_that_mends_it(
    tmp_path: Path, jobs: Any, ask: Make, session: Make
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    for mode, told in ((0o755, "others may read"), (0o777, "others may write")):
        root.chmod(mode)
        error = refused(session, ask, local(root))
        assert f"mode {mode:04o}: {told} there" in str(error)
        assert error.next == f"on the host:  chmod 700 {root}"
        assert list(root.iterdir()) == []


@pytest.mark.fault(row=24)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a folder cannot be given to another user")
def test_a_root_of_another_user_is_refused_with_both_users(tmp_path: Path, jobs: Any, ask: Make, session: Make) -> None:
    root = tmp_path / "root"
    root.mkdir(mode=0o700)
    os.chown(root, 12345, 12345)
    assert "belongs to uid 12345, not to uid 0" in str(refused(session, ask, local(root)))


@pytest.mark.fault(row=24)
def test_a_root_on_a_read_only_file_system_is_refused(mounted: Make, jobs: Any, ask: Make, session: Make) -> None:
    disk = mounted("size=24m")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert "mounted read-only" in str(refused(session, ask, local(disk)))


@pytest.mark.fault(row=24)
@pytest.mark.sshd
def test_a_root_from_which_nothing_can_be_run_is_refused(
    mounted: Make, shared_sshd: Any, enrolled: Make, jobs: Any, ask: Make, session: Make
) -> None:
    host = enrolled(shared_sshd, root=mounted("size=8g,noexec"))
    assert "noexec: an environment in it cannot be run" in str(refused(session, ask, host))


@pytest.mark.fault(row=33)
def test_a_foreign_process_on_the_gpu_is_refused_by_pid_and_a_waiver_is_kept_with_the_run(
    gb10: Any, jobs: Any, ask: Make, session: Make, tmp_path: Path
) -> None:
    host = local(tmp_path / "root")
    stranger = subprocess.Popen(["sleep", "600"], stdin=subprocess.DEVNULL)
    try:
        gb10.write(apps=f"{stranger.pid}, python3, [N/A]\n")
        error = refused(session, ask, host)
        assert f"pid {stranger.pid} of " in str(error)
        assert "sleep 600" in str(error)
        assert "--waive tenants=" in str(error.next)
        assert session(host).go(ask(host, waived=(("tenants", "it is mine"),))) is ExitCode.PASS
    finally:
        stranger.kill()
        stranger.wait()
    launches = [json.loads(one.read_text()) for one in Path(str(host.root)).glob("runs/*/launch.json")]
    assert launches
    assert all(one["host"]["waived"] == {"tenants": "it is mine"} for one in launches)
    manifests = [json.loads(one.read_text()) for one in Path.cwd().glob("runs/*/manifest.json")]
    assert "it is mine" in json.dumps(manifests)


@pytest.mark.fault(row=34)
def test_a_gb10_without_memory_figures_is_judged_by_the_systems_memory(
    gb10: Any, ask: Make, laptop: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    request = ask(local(tmp_path / "root"))
    assert gb10.shape["gpu"]["memory.total"] == "[N/A]"
    assert preview(request, laptop.places, as_json=False) is ExitCode.PASS
    shown = capsys.readouterr().out
    assert "preflight  check" in shown
    assert "memory: enough" in shown
    assert "(GB10, " in shown


@pytest.mark.fault(row=35)
@pytest.mark.parametrize("hours", [1, -1])
def test_a_clock_that_is_an_hour_off_is_a_warning_and_changes_no_outcome(
    jobs: Any, ask: Make, session: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    import time

    from dispatch.preflight import asking
    from dispatch.preflight.judge import judge

    host, seen = local(tmp_path / "root"), []
    monkeypatch.setattr(asking, "time", type("Shim", (), {"time": staticmethod(lambda: time.time() + 3600 * hours)}))
    real = asking.facts_of

    def facts_of(*words: Any, **more: Any) -> Any:
        facts = real(*words, **more)
        seen.append(judge(facts, host)["clock"])
        return facts

    monkeypatch.setattr("dispatch.planning.survey.facts_of", facts_of)
    assert session(host).go(ask(host)) is ExitCode.PASS
    assert {one.outcome for one in seen} == {"warn"}
    assert ("behind" if hours > 0 else "ahead") in seen[0].measured
