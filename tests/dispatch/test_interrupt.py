"""Ctrl-C by a real signal, on a real terminal, at each stage of a dispatch."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# `latentforge dispatch`, with the tests' fake jobs: or with a verb of the agent that never answers.
_PROGRAM = """
import json, sys
import dispatch.apply, dispatch.planning.ask, dispatch.transport.local
from latentforge.spec.code import running_code
how, trainer, slow = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
dispatch.planning.ask.code_around = lambda folder=None: running_code()
def job(one, facts, plan):
    mine = how if one.kind == "distill" else {"steps": 3}
    argv = [sys.executable, "-B", trainer, f"{facts.root}/runs/{one.run}", json.dumps(mine)]
    return argv, {"PYTHONPATH": how["path"]}
dispatch.apply.job = job
real = dispatch.transport.local.LocalTransport.call
def call(self, verb, *args, **more):
    if verb == slow:
        print("STUCK", flush=True)
        import time; time.sleep(60)
    return real(self, verb, *args, **more)
dispatch.transport.local.LocalTransport.call = call
from latentforge.cli import main
sys.exit(main(["dispatch", *sys.argv[4:]]))
"""
TRAINER = Path(__file__).with_name("fake_trainer.py")


class Terminal:
    """A command on a terminal of its own, with a size, whose every byte is kept."""

    def __init__(self, laptop: Any, how: dict[str, Any], slow: str, *words: str, columns: int = 80) -> None:
        how = {**how, "path": str(Path(__file__).resolve().parents[2])}
        self.said = b""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
            os.chdir(laptop.cwd)
            # A shell that runs the tests in the background has them ignore SIGINT; a terminal's command does not.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            argv = [sys.executable, "-P", "-c", _PROGRAM, json.dumps(how), str(TRAINER), slow, *words]
            os.execve(sys.executable, argv, {**laptop.env, "TERM": "xterm-256color"})

    def until(self, mark: bytes | None, seconds: float = 60.0) -> None:
        """Read until a mark is seen, or to the end of the command."""
        deadline = time.monotonic() + seconds
        while mark is None or mark not in self.said:
            assert time.monotonic() < deadline, self.said[-2000:]
            if select.select([self.fd], [], [], 0.1)[0]:
                with contextlib.suppress(OSError):
                    if chunk := os.read(self.fd, 65536):
                        self.said += chunk
                        continue
                assert mark is None, self.said[-2000:]
                return

    def press_ctrl_c(self) -> None:
        os.write(self.fd, b"\x03")

    def end(self) -> int:
        """The command's exit code, once it has ended."""
        self.until(None)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    @property
    def text(self) -> str:
        """What was said, without the sequences that move the cursor and colour the words."""
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.said.decode())


@pytest.fixture
def gate(tmp_path: Path) -> Path:
    return tmp_path / "gate"


def test_ctrl_c_while_following_detaches_with_130_and_the_run_goes_on(
    laptop: Any, gate: Path, eventually: Callable[..., Any]
) -> None:
    terminal = Terminal(laptop, {"wait_at": 5, "gate": str(gate)}, "", "go", "tiny")
    terminal.until(b"step 4/20")
    terminal.press_ctrl_c()
    assert terminal.end() == 130
    told = re.search(r"detached; the run goes on\.\s+back: +latentforge dispatch watch (distill-\w+)", terminal.text)
    assert told, terminal.text
    run = told[1]
    assert f"stop:  latentforge dispatch cancel {run}" in terminal.text
    assert json.loads(laptop.cli("status", run, "--json").stdout)["runs"][run]["state"] == "running"
    gate.touch()
    done = laptop.cli("watch", run)
    assert done.returncode == 0, done.stderr
    assert "F-DISTILL-SMOKE-001 PASS" in done.stdout


@pytest.mark.parametrize("stage", ["probe", "launch"])
def test_ctrl_c_before_the_launch_never_claims_that_a_run_goes_on(laptop: Any, stage: str) -> None:
    terminal = Terminal(laptop, {}, stage, "go", "tiny")
    terminal.until(b"STUCK")
    terminal.press_ctrl_c()
    assert terminal.end() == 130
    assert "detached;" not in terminal.text
    assert "stopped before a launch was confirmed" in terminal.text
    assert "again:  latentforge dispatch go tiny --host local" in terminal.text
    # What it says is true: asked again, everything is done, once.
    again = Terminal(laptop, {}, "", "go", "tiny")
    assert again.end() == 0, again.text
    assert again.text.rstrip().endswith("verified, unsigned")


def test_ctrl_c_while_collecting_says_that_nothing_is_lost(laptop: Any) -> None:
    terminal = Terminal(laptop, {}, "collect", "go", "tiny")
    terminal.until(b"STUCK")
    terminal.press_ctrl_c()
    assert terminal.end() == 130
    assert re.search(r"stopped while collecting distill-\w{20}; nothing is lost", terminal.text), terminal.text
    again = Terminal(laptop, {}, "collect", "go", "tiny")
    again.until(b"STUCK")
    again.press_ctrl_c()
    assert again.end() == 130
    assert re.search(r"stopped while collecting distill-\w{20}; nothing is lost", again.text), again.text


@pytest.mark.parametrize("columns", [80, 40])
def test_the_live_display_keeps_its_lines_in_the_terminal_and_gives_it_back(
    laptop: Any, gate: Path, columns: int
) -> None:
    gate.touch()
    terminal = Terminal(laptop, {"steps": 60, "wait_at": 50, "gate": str(gate)}, "", "go", "tiny", columns=columns)
    assert terminal.end() == 0, terminal.text
    assert terminal.said.rstrip().endswith(b"verified, unsigned")
    assert terminal.said.rindex(b"\x1b[?25h") > terminal.said.rindex(b"\x1b[?25l"), "the cursor is shown again"
    colours = set(re.findall(rb"\x1b\[(?:\d;)?(3[0-7]|9[0-7])m", terminal.said))
    assert colours == {b"36"}, "one accent colour"


def test_a_preview_in_a_pipe_has_no_colour_and_moves_no_cursor(laptop: Any) -> None:
    done = laptop.cli("plan", "tiny")
    assert "\x1b" not in done.stdout + done.stderr
