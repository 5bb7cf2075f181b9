"""A child may end in any way: each is told from the others, and nothing of it stays behind."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from latentforge.kernels.guard.process import Outcome, run_child

LIMITS = {"load": 100.0, "parity": 100.0}
Run = Callable[..., Outcome]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Run a script as a child."""

    def run(script: str, **options: object) -> Outcome:
        command = (sys.executable, "-c", script)
        return run_child({"x": 1}, tmp_path, command=command, **{"limits": LIMITS, **options})  # type: ignore[arg-type]

    return run


def gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that nobody reaps has)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def test_a_result_is_taken_from_the_last_line(run: Run) -> None:
    stages: list[str] = []
    found = run('print(\'{"stage": "load"}\\n{"stage": "parity"}\\n{"result": {"a": 1}}\')', entered=stages.append)
    assert (found.kind, found.stage, found.result) == ("result", "parity", {"a": 1})
    assert stages == ["load", "parity"]


def test_an_exit_without_a_result_is_no_result(run: Run) -> None:
    found = run("import sys; print('{\"stage\": \"parity\"}', flush=True); sys.exit('so it ends')")
    assert (found.kind, found.value, found.stage) == ("exit", 1, "parity")
    assert found.last_words == "so it ends"
    assert run("pass").kind == "exit"
    assert run("print('{\"result\": [1]}')").kind == "exit"
    assert run("import sys; print('{\"result\": {}}', flush=True); sys.exit(4)").kind == "exit"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL, signal.SIGABRT])
def test_a_signal_is_a_signal(run: Run, number: signal.Signals) -> None:
    found = run(f"import os; os.kill(os.getpid(), {int(number)})")
    assert (found.kind, found.value) == ("signal", number)
    assert number.name in found.text


def test_what_a_shell_says_of_a_killed_child_is_a_kill(run: Run) -> None:
    found = run("import sys; sys.exit(137)")
    assert (found.kind, found.value) == ("signal", signal.SIGKILL)
    assert found.text.startswith("killed")


HANG = """
import os, signal, subprocess, sys
grandchild = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
with open({fifo!r}, "w") as fifo:
    fifo.write(f"{{os.getpid()}} {{grandchild.pid}}")
print('{{"stage": "parity"}}', flush=True)
{last}
"""


@pytest.mark.parametrize("last", ["signal.pause()", "print('{\"result\": {}}', flush=True)"])
def test_the_whole_group_ends_with_the_child(run: Run, tmp_path: Path, last: str) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    found = run(HANG.format(fifo=str(fifo), last=last), limits={"load": 100.0, "parity": 0.0})
    child, grandchild = (int(pid) for pid in os.read(reader, 100).split())
    os.close(reader)
    if "pause" in last:
        assert (found.kind, found.stage) == ("timeout", "parity")
        assert "its process group was killed" in found.text
    assert gone(child)
    _wait_gone(grandchild)


def _wait_gone(pid: int) -> None:
    """Its parent is dead and does not reap it: wait by the kernel's own notice, with a deadline."""
    import select

    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    assert select.select([descriptor], [], [], 30)[0], f"{pid} still runs"
    os.close(descriptor)


def test_a_child_dies_with_its_guard(tmp_path: Path) -> None:
    import subprocess

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    child = (
        "import os, signal, sys; from latentforge.kernels.guard.child import die_with; die_with(int(sys.argv[1]));"
        f"f = open({str(fifo)!r}, 'w'); f.write(str(os.getpid())); f.close(); signal.pause()"
    )
    parent = (
        "import os, signal, subprocess, sys;"
        f"subprocess.Popen([sys.executable, '-c', {child!r}, str(os.getpid())], start_new_session=True); signal.pause()"
    )
    guard = subprocess.Popen([sys.executable, "-c", parent])
    pid = int(fifo.read_text())
    guard.kill()
    guard.wait()
    _wait_gone(pid)
