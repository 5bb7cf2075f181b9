"""The whole line over a real SSH server: a real build on the host, a real pipeline, a verdict, evidence."""

from __future__ import annotations

import json
import os
import pwd
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.sshd, pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def line(sshd_at: Any, checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Enrol, preview twice, and go once; the words, codes and times of each.

    The host's owner has turned the CUDA kernels off for its sessions: they take minutes, and tests/kernels/cuda and
    tests/packaging compile them.
    """
    import getpass

    server = sshd_at(LATENTFORGE_CUDA="OFF")
    for name in (".config/pip", ".pip", ".cache/pip"):  # how this machine reaches its package index
        if (there := Path(pwd.getpwuid(os.geteuid()).pw_dir, name)).exists():
            (server.home / name).parent.mkdir(exist_ok=True)
            (server.home / name).symlink_to(there)
    home = tmp_path_factory.mktemp("operator")
    env = {**os.environ, "XDG_STATE_HOME": str(home / "state"), "XDG_CONFIG_HOME": str(home / "config")}
    env |= {"EVIDENCE_DIR": str(home / "runs"), "PYTHONDONTWRITEBYTECODE": "1"}
    env = {name: value for name, value in env.items() if not name.startswith("GX10_") and name != "DRY_RUN"}

    def run(*words: str, group: str = "dispatch", **more: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-P", "-m", "latentforge", group, *words]
        return subprocess.run(
            argv, cwd=checkout, env={**env, **more}, capture_output=True, text=True, timeout=800, check=False
        )

    enrol = run(
        *("enrol", "box", "--address", "127.0.0.1", "--port", str(server.port), "--user", getpass.getuser()),
        *("--identity", str(server.key), "--root", str(home / "remote"), "--python", sys.executable, "--yes"),
    )
    assert enrol.returncode == 0, enrol.stderr
    previews = [run("go", "tiny", DRY_RUN="1", GX10_HOST="box") for _ in range(2)]
    untouched = not (home / "remote").exists() and not (home / "runs").exists()
    went = run("go", "tiny", "--host", "box")
    return {"home": home, "run": run, "previews": previews, "untouched": untouched, "went": went}


def test_a_preview_over_ssh_touched_nothing_and_was_the_same_twice(line: dict[str, Any]) -> None:
    first, second = line["previews"]
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert "no build for this lock file and code" in first.stdout
    assert line["untouched"]


def test_go_builds_there_runs_and_ends_with_the_verdicts_and_verified_evidence(line: dict[str, Any]) -> None:
    went = line["went"]
    assert went.returncode == 0, went.stdout[-3000:] + went.stderr
    *_, first, second, evidence = went.stdout.splitlines()
    assert re.fullmatch(r"F-DISTILL-SMOKE-001 PASS run=distill-[0-9a-f]{20} val_loss .* < .*", first)
    assert re.fullmatch(r"F-DISTILL-SMOKE-002 PASS run=distill-[0-9a-f]{20} val_kl .* < .*", second)
    assert evidence.endswith("manifest.json  verified, unsigned")
    for kind in ("data", "teacher", "score", "distill"):
        assert re.search(rf"^  {kind} +[0-9.]+ s ", went.stdout, re.M), "the time of each phase is printed"


def test_the_evidence_verifies_offline_and_one_flipped_byte_does_not(line: dict[str, Any]) -> None:
    run = re.findall(r"run=(distill-[0-9a-f]{20})", line["went"].stdout)[-1]
    folder = line["home"] / "runs" / run
    assert line["run"]("verify", str(folder), group="evidence").returncode == 0
    weights = folder / "out" / "student" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    broken = line["run"]("verify", str(folder), group="evidence")
    assert broken.returncode == 1
    assert "model.safetensors" in broken.stdout + broken.stderr
    weights.write_bytes(content)


def test_a_second_go_changes_nothing_in_seconds_and_gives_the_same_verdict(line: dict[str, Any]) -> None:
    begin = time.monotonic()
    again = line["run"]("go", "tiny", "--host", "box")
    assert time.monotonic() - begin < 15
    assert again.returncode == 0, again.stderr
    assert "no changes. " in again.stdout
    assert again.stdout.splitlines()[-3:] == line["went"].stdout.splitlines()[-3:]


def test_the_run_used_what_was_built_there_and_says_so(line: dict[str, Any]) -> None:
    run = re.findall(r"run=(distill-[0-9a-f]{20})", line["went"].stdout)[-1]
    launch = json.loads((line["home"] / "runs" / run / "launch.json").read_text())
    remote = str(line["home"] / "remote")
    assert launch["argv"][0].startswith(f"{remote}/venvs/")
    assert launch["env"]["PYTHONPATH"].startswith(f"{remote}/builds/")
    assert list((line["home"] / "remote" / "warmup").glob("*.json")), "what was proven of the build is kept there too"
    effective = json.loads((line["home"] / "runs" / run / "effective.json").read_text())
    assert effective["code"] == json.loads((line["home"] / "runs" / run / "identity.json").read_text())["code"]


def test_watching_a_finished_run_prints_its_verdict_and_exits_with_its_code(line: dict[str, Any]) -> None:
    watched: Callable[..., Any] = line["run"]
    done = watched("watch", "distill-")
    assert done.returncode == 0, done.stderr
    assert "F-DISTILL-SMOKE-001 PASS" in done.stdout
    assert watched("status", "distill-").returncode == 0
