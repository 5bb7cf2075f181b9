"""`latentforge teacher serve` with a real vLLM: its cap on log-probabilities, and kill -9."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from latentforge.data import ShardSet
from latentforge.errors import RefusedError
from latentforge.teachers.http.openai import OpenAITeacher
from latentforge.teachers.scoring import check_scorable
from latentforge.teachers.serving.processes import members

_SECONDS_TO_DIE = 120.0


def _parents() -> dict[int, int]:
    """The parent of each process."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                found[int(name)] = int(Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    return found


def test_a_capped_server_is_refused_for_a_larger_k_and_dies_with_a_killed_command(
    vllm_environment: Path, served_folder: Path, served_data: ShardSet, surroundings: dict[str, str], tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "latentforge", "teacher", "serve", str(served_folder), "--port", "0", "--json"]
    command += ["--environment", str(vllm_environment), "--log", str(tmp_path / "log"), "--name", "tiny"]
    # 20 is vLLM's own, where nobody says --max-logprobs.
    command += ["--dtype", "float32", "--max-logprobs", "20"]
    with subprocess.Popen(command, env=surroundings, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, (tmp_path / "log").read_text()[-4000:]
            serving = json.loads(line)
            teacher = OpenAITeacher.open(serving["url"], "tiny", served_folder)
            check_scorable(teacher, served_data, k=20)
            with pytest.raises(RefusedError, match=r"k = 50.* 20") as caught:
                check_scorable(teacher, served_data, k=50)
            assert caught.value.next
            teacher.close()

            (keeper,) = (pid for pid, parent in _parents().items() if parent == process.pid)
            session = members(keeper)
            names = [Path(f"/proc/{pid}/comm").read_text().strip() for pid in session]
            assert any(name.startswith("VLLM::Eng") for name in names), names
            watched = [os.pidfd_open(pid) for pid in session]
        finally:
            process.kill()
    for fd in watched:
        assert select.select([fd], [], [], _SECONDS_TO_DIE)[0]
        os.close(fd)
    assert members(keeper) == []
    assert process.returncode == -signal.SIGKILL
