"""The warm-up over a real SSH server: before the first launch with a build, never again, and a failed one stops all."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dispatch.building.build import BuildNames
from latentforge.errors import FailedError
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]

pytestmark = pytest.mark.sshd


def test_nothing_trains_before_the_kernels_of_its_build_are_proven(
    shared_sshd: Any, enrolled: Make, built: Make, ask: Make, session: Make, jobs: Any, tmp_path: Path, capsys: Any
) -> None:
    host = enrolled(shared_sshd)
    request = ask(host)
    built(host, request, warm=False)
    able = subprocess.run([sys.executable, "-P", "-m", "latentforge", "capabilities"], capture_output=True, check=True)
    Path(host.root, "builds", BuildNames.of(request).build, "capabilities.json").write_bytes(able.stdout)
    code, said, starts = tmp_path / "code", tmp_path / "said", tmp_path / "starts"
    python = Path(host.root) / "venvs" / BuildNames.of(request).venv / "bin" / "python"
    python.parent.mkdir()
    python.write_text(f'#!/bin/sh\necho "$PYTHONPATH $@" >> {said}\nexit $(cat {code})\n')
    python.chmod(0o755)
    code.write_text("1")
    for _ in range(2):  # a second go reports what ended, and repeats nothing
        with pytest.raises(FailedError, match=r"warm-up warmup-[0-9a-f]{20} on box did not pass: fail") as refused:
            session(host).go(request)
        assert refused.value.code == ExitCode.FAIL
        assert "--attempt next" in str(refused.value.next)
    (words,) = said.read_text().splitlines()
    site = f"{host.root}/builds/{BuildNames.of(request).build}/site"
    assert words == f"{site} -P -m latentforge kernels warmup --only cpu/kd_loss.fp32.topk.forward"
    assert not starts.exists()
    code.write_text("0")
    assert session(host).go(replace(request, attempt_next=True)) == ExitCode.PASS
    assert len(said.read_text().splitlines()) == 2
    assert len(starts.read_text().splitlines()) == 4
    capsys.readouterr()
    assert session(host).go(request) == ExitCode.PASS
    assert "its kernels were proven here" in capsys.readouterr().out
    assert len(said.read_text().splitlines()) == 2
