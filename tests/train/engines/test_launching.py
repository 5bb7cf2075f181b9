"""Who starts the processes of a run speaks for them: how they ended, and when they were told to stop."""

from __future__ import annotations

import io
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from latentforge.errors import CrashedError, LatentForgeError, RefusedError
from latentforge.events import EventLog, read_events
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.train import spread
from latentforge.train.engines.launching import Ended, Ranks, refuse_failed
from latentforge.train.hosts.abreast import Abreast
from latentforge.train.stopping import Interrupted, Overdue, deferred_stop, handled_signals
from latentforge.verdicts import ExitCode

CRASH = {"code": 5, "crash": "RuntimeError: the others are gone"}


def run_on(device: str, below: Path) -> RunDir:
    identity = RunIdentity("distill", {"distill": {"device": device}}, {}, "0" * 64, "1" * 64)
    return RunDir.create(below, identity, LaunchRecord(identity.run_id, "2" * 64, {}))


def test_processes_that_are_told_to_stop_while_they_start_were_stopped_and_did_not_crash() -> None:
    with Ranks("no.such:function", {}, 2) as ranks:
        ranks.tell(signal.SIGTERM)
        ended = ranks.wait()
    assert [(one.returncode, one.ours) for one in ended] == [(-signal.SIGTERM, True)] * 2
    with pytest.raises(Interrupted, match="interrupted by SIGTERM before the processes of the run had begun"):
        refuse_failed([Ended(0, 1, 5, CRASH), *ended])
    # What somebody else killed it by is not what it was told.
    with pytest.raises(CrashedError, match="killed by SIGKILL"):
        refuse_failed([*ended, Ended(2, 3, -signal.SIGKILL, {})])


def test_what_one_process_refused_is_what_the_run_ends_by() -> None:
    refused = Ended(1, 2, 2, {"code": 2, "error": "no such teacher", "next": "name another"})
    with pytest.raises(LatentForgeError, match="no such teacher") as raised:
        refuse_failed([Ended(0, 1, 5, CRASH), refused])
    assert (raised.value.code, raised.value.next) == (ExitCode.REFUSED, "name another")


def test_who_waits_for_the_processes_gives_up_behind_them() -> None:
    told = list[int]()
    ranks: Any = SimpleNamespace(tell=told.append, failing=False)
    abreast = Abreast([])
    with handled_signals(100.0), deferred_stop():
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(2):
            abreast.look(ranks)
        assert told == [signal.SIGTERM]
        assert 90.0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 95.0


def test_the_end_of_a_run_whose_processes_are_killed_is_numbered_behind_what_they_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = run_on("auto", tmp_path)

    class Killed:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            return

        def wait(self, **_: object) -> Any:
            with EventLog(run.events_file, run.run, text=io.StringIO()) as theirs:
                theirs.warning("one")
                theirs.warning("two")
            raise Overdue("the time is over")

    monkeypatch.setattr(spread, "begin", lambda *_, **__: Killed())
    with EventLog(run.events_file, run.run, text=io.StringIO()) as log:
        with pytest.raises(Overdue):
            spread.run_spread(run, log, 2, None)
        log.end(ExitCode.UNKNOWN)
    assert [event.seq for event in read_events(run.events_file)] == [0, 1, 2]


def test_more_processes_than_gpus_are_refused_where_they_would_use_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    spread.check_devices(run_on("cpu", tmp_path), 2)
    with pytest.raises(RefusedError, match=r"processes = 2, and this host has 1 GPU"):
        spread.check_devices(run_on("auto", tmp_path), 2)
