"""The whole way of a variant in a real child, and what its record says afterwards."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import HERE, QUICK, stub

from latentforge.errors import BusyError, FailedError
from latentforge.kernels.guard import machine as machines
from latentforge.kernels.guard import warmup
from latentforge.kernels.guard.key import key_of
from latentforge.kernels.guard.machine import Machine
from latentforge.kernels.guard.process import Outcome
from latentforge.kernels.guard.records import Record, Records, boot_id
from latentforge.kernels.guard.warmup import WarmUp, finding_of

WarmUpRun = Callable[..., list[Any]]


def test_a_good_kernel_is_ok_and_then_only_looked_at(warm_up: WarmUpRun, records: Records) -> None:
    (line,) = warm_up("good")
    assert (line.record.state, line.did, line.record.stage) == ("ok", "proven", "cost"), line.record.detail
    assert line.record.measured["worst"] < 1
    assert line.record.measured["shapes"] == [[2, 33], [5, 103]]
    assert line.record.measured["speed_up"] > 0
    assert records.read(line.record.key) == line.record
    (again,) = warm_up("good")
    assert (again.record.state, again.did) == ("ok", "verified")
    assert again.record.finished == line.record.finished


@pytest.mark.parametrize(
    ("entry", "state", "reason", "stage"),
    [
        ("kept_second", "failed", "mismatch_later_call", "parity"),
        ("segfault", "failed", "crash_signal", "parity"),
        ("raises_smem", "failed", "smem_exceeded", "parity"),
        ("not_there", "failed", "load_error", "load"),
        ("slow", "degraded", "slow", "cost"),
    ],
)
def test_a_bad_kernel_becomes_a_record_and_no_crash(
    warm_up: WarmUpRun, records: Records, entry: str, state: str, reason: str, stage: str
) -> None:
    (line,) = warm_up(entry)
    found = records.read(line.record.key)
    assert found is not None
    assert (found.state, found.reason, found.stage) == (state, reason, stage), found.detail


def test_a_kernel_that_hangs_is_ended_with_all_that_it_started(
    warm_up: WarmUpRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    monkeypatch.setenv("GUARD_TEST_FIFO", str(fifo))
    (line,) = warm_up("waits", limits=replace(QUICK, parity=5.0))
    assert (line.record.state, line.record.reason) == ("failed", "hang_low_power")
    for pid in os.read(reader, 100).split():
        assert not _runs(int(pid))
    os.close(reader)


def _runs(pid: int) -> bool:
    import select

    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    ended = bool(select.select([descriptor], [], [], 30)[0])
    os.close(descriptor)
    return not ended


def test_the_fastest_right_configuration_is_frozen(warm_up: WarmUpRun, records: Records) -> None:
    candidates = tuple((("tile", tile),) for tile in (3, 2, 1))
    (line,) = warm_up(stub("configured", candidates=candidates))
    assert line.record.config == {"tile": 1}, line.record
    assert [one["config"] for one in line.record.measured["configurations"]] == [{"tile": 2}, {"tile": 1}]


GUARD = """
import sys
from pathlib import Path
sys.path.insert(0, {here!r})
from conftest import QUICK, stub
from latentforge.kernels.guard.machine import Machine
from latentforge.kernels.guard.records import Records
from latentforge.kernels.guard.warmup import WarmUp
machine = Machine(None, 0, "none", "none", "none", "2.13.0", "3.9.0", "13.4.59", "6.17.0")
WarmUp(machine, Records(Path({folder!r})), limits=QUICK).run([stub("waits")])
"""


def test_a_guard_that_is_killed_leaves_its_record_and_is_found_out(
    warm_up: WarmUpRun, records: Records, machine: Machine, tmp_path: Path
) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    script = GUARD.format(here=str(HERE), folder=str(records.folder))
    environment = {**os.environ, "GUARD_TEST_FIFO": str(fifo)}
    guard = subprocess.Popen([sys.executable, "-c", script], env=environment, stderr=subprocess.DEVNULL)
    child, grandchild = (int(pid) for pid in fifo.read_text().split())
    guard.send_signal(signal.SIGKILL)
    guard.wait()
    assert not _runs(child)
    os.kill(grandchild, signal.SIGKILL)

    left = records.read(key_of(stub("waits"), machine).digest)
    assert left is not None
    assert (left.state, left.stage) == ("pending", "parity")
    (line,) = warm_up("waits")
    assert (line.did, line.record.state, line.record.reason) == ("crash found", "crashed", "crash_signal")


def crashed(entry: str, machine: Machine, attempts: int, **fields: Any) -> Record:
    key = key_of(stub(entry), machine)
    values: dict[str, Any] = {"reason": "host_crash", "attempts": attempts, "finished": time.time(), **fields}
    return Record(stub(entry).name, key.digest, "crashed", **values)


def test_a_crash_is_retried_once_and_then_left_to_a_person(
    warm_up: WarmUpRun, records: Records, machine: Machine
) -> None:
    pending = replace(crashed("good", machine, 0), state="pending", reason=None, boot="an earlier boot")
    records.write(pending)
    (line,) = warm_up("good")
    assert (line.did, line.record.reason, line.record.attempts) == ("crash found", "host_crash", 1)
    # The second crash: the retry left its record, too.
    records.write(replace(pending, attempts=1))
    (line,) = warm_up("good")
    assert (line.did, line.record.attempts) == ("crash found", 2)
    for _ in range(2):
        (line,) = warm_up("good")
        assert (line.did, line.record.state) == ("not retried", "crashed")
    (line,) = warm_up("good", accept=True)
    assert (line.did, line.record.accepted, line.record.state) == ("crash accepted", True, "crashed")
    (line,) = warm_up("good")
    assert line.did == "crash accepted"
    (line,) = warm_up("good", again=True)
    assert (line.did, line.record.state) == ("proven", "ok")


def test_the_one_retry_counts_on_the_disk_while_it_runs(
    records: Records, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    records.write(crashed("good", machine, 1))
    seen: list[Record | None] = []

    def child(*rest: Any, **named: Any) -> Outcome:
        seen.append(records.read(key_of(stub("good"), machine).digest))
        return Outcome("signal", "parity", 11)

    monkeypatch.setattr(warmup, "run_child", child)
    WarmUp(machine, records).run([stub("good")])
    assert seen[0] is not None
    assert (seen[0].state, seen[0].attempts) == ("pending", 1)


@pytest.fixture
def told(machine: Machine, records: Records, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, list[Any]]]:
    """``told(**options)``: what a warm-up with a child that always succeeds did, and what it asked of the child."""

    def run(on: Machine = machine, **options: Any) -> tuple[str, list[Any]]:
        asked: list[Any] = []

        def child(request: Any, *rest: Any, **named: Any) -> Outcome:
            asked.append(request["quick"])
            return Outcome("result", "cost", 0, {"stage": "cost", "reason": None, "detail": ""})

        monkeypatch.setattr(warmup, "run_child", child)
        (line,) = WarmUp(on, records, **options).run([stub("good")])
        return line.did, asked

    return run


def test_a_proof_is_skipped_only_while_nothing_changed(
    told: Callable[..., tuple[str, list[Any]]], machine: Machine, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert told() == ("proven", [False])
    assert told() == ("verified", [True])
    assert told(now=lambda: time.time() + 13 * 86400) == ("verified", [True])
    assert told(replace(machine, driver="580.143")) == ("proven", [False])
    assert told(again=True) == ("proven", [False])
    assert told(now=lambda: time.time() + 15 * 86400) == ("proven", [False])
    assert told(now=lambda: time.time() - 3600) == ("proven", [False])
    records.write(crashed("good", machine, 1))
    assert told() == ("proven", [False])
    path = records.path(key_of(stub("good"), machine).digest)
    path.write_bytes(path.read_bytes()[:50])
    assert told() == ("proven", [False])


def test_an_xid_since_the_proof_makes_a_new_one(
    told: Callable[..., tuple[str, list[Any]]], machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gb10 = replace(machine, capability=(12, 1))
    assert told(gb10)[0] == "proven"
    monkeypatch.setattr(machines, "kernel_log_since", lambda seconds: [])
    assert told(gb10)[0] == "verified"
    monkeypatch.setattr(machines, "kernel_log_since", lambda seconds: ["NVRM: Xid (PCI:000f:01:00): 31"])
    assert told(gb10)[0] == "proven"


def test_a_damaged_record_is_named_and_the_variant_proven(
    warm_up: WarmUpRun, records: Records, machine: Machine
) -> None:
    records.path(key_of(stub("segfault"), machine).digest).write_text('{"state": "ok"}')
    (line,) = warm_up("segfault")
    assert (line.did, line.record.state) == ("proven", "failed")
    assert "damaged" in line.notes[0]


def test_a_proof_that_no_longer_holds_is_replaced(warm_up: WarmUpRun, records: Records, machine: Machine) -> None:
    records.write(replace(crashed("segfault", machine, 0), state="ok", reason=None))
    (line,) = warm_up("segfault")
    assert (line.did, line.record.state, line.record.reason) == ("verified", "failed", "crash_signal")
    found = records.read(line.record.key)
    assert found is not None
    assert found.state == "failed"


def test_the_record_is_pending_before_the_child_starts_and_until_it_has_ended(
    records: Records, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = key_of(stub("good"), machine).digest
    seen: list[tuple[str, str]] = []

    def child(request: Any, folder: Path, *, entered: Callable[[str], None], **named: Any) -> Outcome:
        for stage in ("load", "parity", "cost"):
            entered(stage)
            found = records.read(key)
            assert found is not None
            assert found.boot == boot_id()
            seen.append((found.state, found.stage))
        return Outcome("result", "cost", 0, {"stage": "cost", "reason": None, "detail": ""})

    monkeypatch.setattr(warmup, "run_child", child)
    (line,) = WarmUp(machine, records).run([stub("good")])
    assert seen == [("pending", "load"), ("pending", "parity"), ("pending", "cost")]
    assert line.record.state == "ok"


def test_two_warm_ups_at_once_are_refused(warm_up: WarmUpRun, records: Records) -> None:
    import filelock

    with filelock.FileLock(records.folder / "lock"), pytest.raises(BusyError, match="another warm-up"):
        warm_up("good")


def test_too_little_memory_for_a_gpu_is_refused_before_anything(
    warm_up: WarmUpRun, records: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "memory_total", lambda: 128 * 2**30)
    monkeypatch.setattr(machines, "memory_available", lambda: 23 * 2**30)
    with pytest.raises(FailedError, match=r"23\.0 GiB of memory are available"):
        warm_up(stub("good", device="cuda"))
    assert list(records.all()) == []


def test_what_comes_after_the_total_time_is_not_tried(warm_up: WarmUpRun, records: Records) -> None:
    (line,) = warm_up("good", limits=replace(QUICK, total=-1.0))
    assert (line.did, line.record.state, line.record.reason) == ("not tried", "failed", "compile_timeout")
    assert list(records.all()) == []


ENDS = [
    (Outcome("signal", "parity", 11), [], "crash_signal", "SIGSEGV"),
    (Outcome("signal", "compile", 9), ["Out of memory: Killed process 7 (ptxas)"], "compile_oom", "out of memory"),
    (Outcome("signal", "parity", 9), ["Out of memory: Killed process 7"], "crash_signal", "out of memory"),
    (Outcome("signal", "compile", 9), [], "crash_signal", "killed by SIGKILL"),
    (Outcome("signal", "compile", 9), None, "crash_signal", "not known"),
    (Outcome("timeout", "compile", 300), [], "compile_timeout", "300 s"),
    (Outcome("timeout", "parity", 240), [], "hang_low_power", "240 s"),
    (Outcome("exit", "load", 1, last_words="Traceback\nImportError: x"), [], "load_error", "ImportError: x"),
]


@pytest.mark.parametrize(("outcome", "log", "reason", "said"), ENDS, ids=range(len(ENDS)))
def test_the_end_of_a_child_has_its_reason(
    outcome: Outcome, log: list[str] | None, reason: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "kernel_log_since", lambda seconds: log)
    found = finding_of(outcome)
    assert (found["reason"], found["stage"]) == (reason, outcome.stage)
    assert said in found["detail"]
    if log == []:
        assert "out of memory" not in found["detail"]
