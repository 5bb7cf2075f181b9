"""The real ``fab`` command over a real SSH server: each task is its command, over the pinned transport."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from latentforge.verdicts import ExitCode

Make = Callable[..., Any]
pytestmark = pytest.mark.sshd
CHECKOUT = Path(__file__).resolve().parents[2]
TASKS = {"preflight", "build", "pull", "smoke", "full", "watch", "collect", "cancel"}


@pytest.fixture
def fab(laptop: Any, checkout: Path) -> Make:
    """Run ``fab -r dispatch …`` to its end, from the checkout under test."""

    def run(*words: str, **env: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "fabric", "-r", str(CHECKOUT / "dispatch"), *words]
        more = {"EVIDENCE_DIR": str(laptop.cwd / "runs"), **env}
        return subprocess.run(
            argv, cwd=checkout, env={**laptop.env, **more}, capture_output=True, text=True, timeout=120, check=False
        )

    return run


def test_the_tasks_of_the_operator_are_there_and_each_says_what_it_does(fab: Make) -> None:
    listed = fab("--list")
    assert listed.returncode == 0, listed.stderr
    lines = {line.split()[0]: line for line in listed.stdout.splitlines() if line.startswith("  ")}
    assert set(lines) >= TASKS
    assert all(len(line.split()) > 2 for line in lines.values())


def test_tasks_give_the_bytes_and_exit_codes_of_their_commands(
    fab: Make, shared_sshd: Any, enrolled: Make, built: Make, jobs: Any, ask: Make, session: Make, laptop: Any
) -> None:
    host = enrolled(shared_sshd)
    built(host, ask(host))
    assert session(host).go(ask(host)) is ExitCode.PASS
    run = jobs.starts()[-1]
    again = fab("-H", "box", "go", "--pipeline", "tiny")
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"no changes. {run} pass" in again.stdout
    assert "host key ED25519 SHA256:" in again.stdout
    watched = fab("-H", "box", "watch", "--run", run[:14])
    assert (watched.returncode, f"F-DISTILL-SMOKE-001 PASS run={run}" in watched.stdout) == (0, True)
    collected = fab("-H", "box", "collect", "--run", run, EVIDENCE_DIR="copies")
    assert collected.returncode == 0, collected.stderr
    cancelled = fab("cancel", "--run", run, GX10_HOST="box")
    assert "there was nothing to end (pass" in cancelled.stdout
    judged = fab("-H", "box", "preflight", "--only", "disk", "--json")
    assert (judged.returncode, '"disk"' in judged.stdout) == (0, True), judged.stdout + judged.stderr
    unnamed = fab("-H", "box", "pull", "--model", str(laptop.cwd))
    assert (unnamed.returncode, "needs a name for its model" in unnamed.stderr) == (2, True), unnamed.stderr
    assert fab("-H", "box", "build").stdout.startswith("box  keep ")
    assert len(jobs.starts()) == 4


def test_environment_names_and_dry_run_steer_the_tasks_as_they_steer_the_commands(
    fab: Make, shared_sshd: Any, enrolled: Make, ask: Make, laptop: Any, checkout: Path, tmp_path: Path
) -> None:
    enrolled(shared_sshd)
    preview = fab("-H", "box", "smoke", DRY_RUN="1", STEPS="77")
    assert preview.returncode == 0, preview.stderr
    assert preview.stdout.endswith(
        f"To do it:  EVIDENCE_DIR={laptop.cwd}/runs STEPS=77 latentforge dispatch go smoke --host box\n"
    )
    assert not (tmp_path / "remote").exists()
    refused = fab("-H", "box", "smoke", STEPS="5OO")
    assert refused.returncode == 2
    assert "STEPS='5OO' is not a whole number" in refused.stderr
    full = fab("-H", "box", "full", "--pipeline", "smoke")
    assert full.returncode == 2
    assert "data.corpus = 'stdlib' is only fit for profile smoke" in full.stderr


@pytest.mark.parametrize(
    ("words", "code", "why"),
    [
        (("-H", "nobody", "go", "--pipeline", "tiny"), 2, "host 'nobody' is not enrolled"),
        (("-H", "me@box", "go", "--pipeline", "tiny"), 2, "name an enrolled host alone"),
        (("-H", "box:2222", "go", "--pipeline", "tiny"), 2, "name an enrolled host alone"),
    ],
)
def test_a_host_that_is_not_enrolled_gets_no_connection(fab: Make, words: Any, code: int, why: str) -> None:
    done = fab(*words)
    assert (done.returncode, why in done.stderr) == (code, True), done.stdout + done.stderr


def test_a_task_is_done_on_every_host_and_ends_with_the_worst_code_before_the_next_task(
    fab: Make, laptop: Any, tmp_path: Path
) -> None:
    hosts = "".join(f'[hosts.{name}]\naddress = "127.0.0.1"\nport = 1\n' for name in ("a", "b"))
    laptop.places.hosts_file.parent.mkdir(parents=True)
    laptop.places.hosts_file.write_text(hosts)
    done = fab("-H", "a,local,b", "preflight", "--only", "clock", "cancel", "--run", "nonsense")
    assert done.returncode == 6, done.stdout + done.stderr
    assert [done.stderr.count(f"{name} (") for name in ("a", "b")] == [1, 1]
    assert "clock" in done.stdout, "the host between them was judged"
    assert "nonsense" not in done.stderr
    fine = fab("-H", "local,local", "preflight", "--only", "clock", "cancel", "--run", "nonsense")
    assert (fine.returncode, fine.stderr.count("begins with 'nonsense'")) == (2, 2)


def test_a_changed_host_key_ends_a_task_with_6_though_fabric_itself_takes_any_key(
    fab: Make, sshd_at: Make, enrolled: Make, jobs: Any
) -> None:
    server = sshd_at()
    enrolled(server)
    server.stop()
    server.make_host_key()
    server.log.unlink()
    server.start()
    done = fab("-H", "box", "go", "--pipeline", "tiny")
    assert done.returncode == 6
    assert "host key of box changed" in done.stderr
    assert "publickey" not in server.log.read_text()
