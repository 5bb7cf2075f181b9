"""A process that neither ends nor goes on is told from one that takes its time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from latentforge.errors import CrashedError
from latentforge.train.engines import beating
from latentforge.train.engines.beating import Pulse
from latentforge.train.engines.launching import Ended, refuse_failed

BEAT, HUNG = 0.2, 2.0
PROGRAM = (
    "import sys, signal; from latentforge.train.engines import beating; "
    f"beating.BEAT_SECONDS = {BEAT}; beating.beat(int(sys.argv[1])); signal.pause()"
)


def test_a_stopped_process_is_found_and_one_that_waits_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryFile() as beats:
        command = [sys.executable, "-c", PROGRAM, str(beats.fileno())]
        with subprocess.Popen(command, pass_fds=[beats.fileno()]) as process:
            try:
                while not os.pread(beats.fileno(), 8, 0):
                    time.sleep(0.02)
                monkeypatch.setattr(beating, "HUNG_SECONDS", HUNG)
                monkeypatch.setattr(beating, "BEAT_SECONDS", BEAT)
                pulse, found, until = Pulse(process.pid, beats), None, time.monotonic() + 1.5 * HUNG
                while time.monotonic() < until:  # it computes nothing, and beats
                    assert pulse.hangs() is None
                    time.sleep(0.05)
                process.send_signal(signal.SIGSTOP)
                os.waitpid(process.pid, os.WUNTRACED)  # no beat comes after this
                assert pulse.hangs() is None
                # Nobody looks for a while, as where this process was stopped itself: no silence of the other.
                monkeypatch.setattr(beating.time, "monotonic", lambda clock=time.monotonic: clock() + 3600.0)
                assert pulse.hangs() is None
                while found is None:
                    found = pulse.hangs()
                    time.sleep(0.05)
                assert found == "T (stopped)"
            finally:
                process.kill()


def test_a_run_says_which_process_hung_and_not_those_that_missed_it() -> None:
    ended = [
        Ended(0, 11, 5, {"code": 5, "crash": "RuntimeError: Connection closed by peer"}),
        Ended(1, 12, -9, {}, hung="T (stopped)"),
    ]
    with pytest.raises(CrashedError, match=r"process 1 of 2 \(pid 12\) gave no sign of life for 120 s, its state was"):
        refuse_failed(ended)
