"""What an operator sees of a run over SSH: at once, whole, whatever the bytes and the link do, from any laptop."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import pytest

from dispatch.places import Places
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]
pytestmark = pytest.mark.sshd
WATCH = [sys.executable, "-P", "-m", "latentforge", "dispatch", "watch"]


def test_a_line_is_printed_within_half_a_second_of_being_written_and_grep_gets_the_verdict_and_the_end(
    going: Make, shared_sshd: Any, enrolled: Make, laptop: Any, jobs: Any, eventually: Make
) -> None:
    one = going(enrolled(shared_sshd), stamp=0.1, steps=20, wait_at=1)
    words = " ".join([*WATCH, one.run])
    process = subprocess.Popen(
        ["bash", "-c", f"set -o pipefail; {words} | grep --line-buffered -E '^stamp|^F-DISTILL'"],
        cwd=laptop.cwd,
        env=laptop.env,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    eventually((one.copy / "identity.json").exists, "it is followed", 60.0)
    jobs.open()
    late, verdicts = [], []
    for line in process.stdout:
        if line.startswith("stamp"):
            late.append(time.time() - float(line.split()[1]))
        else:
            verdicts.append(line.strip())
    assert process.wait(30) == 0
    # The run's own line, and the summary's at the end.
    assert set(verdicts) == {f"F-DISTILL-SMOKE-001 PASS run={one.run} val_loss 4.0 < 5.0 at step 20"}
    seconds = median(late)
    print(f"{seconds:.3f} s from a line's writing to its reading behind grep (median of {len(late)})")
    assert seconds < 0.5


def test_another_laptop_attaches_with_the_host_alone_and_sees_all_of_it(
    going: Make, shared_sshd: Any, enrolled: Make, laptop: Any, jobs: Any, tmp_path: Path
) -> None:
    one = going(enrolled(shared_sshd), wait_at=10)
    other = tmp_path / "other"
    (other / "work").mkdir(parents=True)
    env = {**laptop.env, "XDG_STATE_HOME": str(other / "state"), "HOME": str(other)}
    # Trust is each laptop's own: the pinned keys are brought along, as enrolling there would.
    known = Places.from_environment(env).known_hosts("box")
    known.parent.mkdir(parents=True)
    known.write_bytes(laptop.places.known_hosts("box").read_bytes())
    asked = subprocess.run([*WATCH, one.run], cwd=other / "work", env=env, capture_output=True, text=True, check=False)
    assert asked.returncode == 2
    assert "--host HOST" in asked.stderr
    jobs.open()
    strange = [*WATCH, "distill-fffffffffffff", "--host", "box"]
    asked = subprocess.run(strange, cwd=other / "work", env=env, capture_output=True, text=True, check=False)
    assert asked.returncode == 2
    assert "no run on box begins with" in asked.stderr
    done = subprocess.run(
        [*WATCH, one.run[:14], "--host", "box"],
        cwd=other / "work",
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    steps = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("step ")]
    assert steps == [f"{step}/20" for step in range(1, 21)]
    assert f"F-DISTILL-SMOKE-001 PASS run={one.run}" in done.stdout


def test_several_runs_are_followed_at_once_each_to_its_own_end(
    going: Make, shared_sshd: Any, sshd_at: Make, enrolled: Make, laptop: Any, jobs: Any, tmp_path: Path
) -> None:
    first = going(enrolled(shared_sshd, "one", tmp_path / "first"), wait_at=10)
    second = going(enrolled(sshd_at(), "two", tmp_path / "second"), "distill.steps=61", fail=True)
    third = going(enrolled(shared_sshd, "three", tmp_path / "third"), "distill.steps=62", wait_at=5)
    runs = [first.run, second.run, third.run]
    process = subprocess.Popen(
        [*WATCH, *runs, "--stall", "250"], cwd=laptop.cwd, env=laptop.env, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line.rstrip("\n"))
        if "step 9/20" in line:
            jobs.open()
    assert process.wait(60) == 1, "\n".join(said)
    short = {run: run[: len("distill-") + 6] for run in runs}
    for line in said[:-3]:
        assert line.startswith(tuple(short.values())), line
    for run, how in zip(runs, ("0 (pass)", "1 (fail)", "0 (pass)"), strict=True):
        assert sum(line.startswith(f"{short[run]}  step ") for line in said) == 20
        assert any(line.startswith(f"{run}  ") and line.endswith(f"exit {how}") for line in said[-3:])


@pytest.mark.fault(row=25)
@pytest.mark.parametrize("how", ["truncated", "replaced", "deleted"])
def test_a_log_that_is_taken_away_under_the_reader_is_marked_and_read_on(
    going: Make, jobs: Any, eventually: Make, capsys: Any, how: str
) -> None:
    import threading

    one = going(wait_at=10, say={"3": ["before " * 40]})
    log = one.folder / "launch.log"
    ended: list[tuple[ExitCode, str]] = []
    thread = threading.Thread(target=lambda: ended.append(one.watch()))
    thread.start()
    copy = one.copy / "launch.log"
    eventually(lambda: copy.exists() and b"step 9/20" in copy.read_bytes(), "it is followed")
    if how == "truncated":
        os.truncate(log, 0)
    elif how == "deleted":
        log.unlink()
    else:
        fresh = log.with_name("fresh")
        fresh.write_bytes(b"another log\n" * 100)
        fresh.rename(log)
    marks = {"truncated": "the log was truncated on the host", "deleted": "launch.log was deleted on the host"}
    said = ""

    def told() -> bool:
        nonlocal said
        said += capsys.readouterr().out
        return marks.get(how, "the log was replaced on the host") in said

    eventually(told, "it is marked")
    jobs.open()
    thread.join(60)
    said += ended[0][1]
    assert ended[0][0] is ExitCode.PASS, said
    if how == "deleted":
        # Nobody can read what the job writes into a file without a name; its events tell the rest.
        assert b"step 9/20" in copy.read_bytes()
    else:
        assert copy.read_bytes() == log.read_bytes()
        assert b"before" in (one.copy / "launch.log.1").read_bytes()
    assert f"F-DISTILL-SMOKE-001 PASS run={one.run}" in said


NASTY = [
    b"\x1b[2J\x1b]0;title\x07 \x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\",
    b"10%\r20%\r30%\r\n",
    b"\xff\xfe\x00 not utf-8 \xc3",
    "ünïcödé € 😀 \u202edrow".encode(),
    b"F-DISTILL-SMOKE-001 PASS run=" + b"\xff" * 8,
    b"\x9b5A\x84",
]


@pytest.mark.fault(row=26)
def test_any_bytes_at_all_reach_the_laptop_unchanged_and_the_terminal_harmless(
    going: Make, shared_sshd: Any, enrolled: Make, jobs: Any
) -> None:
    one = going(enrolled(shared_sshd), wait_at=5)
    with open(one.folder / "launch.log", "ab") as log:
        for piece in NASTY:
            log.write(piece + b"\n")
        log.write(b"x" * (50 << 20))
        log.write(b"\n" + "€".encode() * 100_000 + b"\nafter\n")
    jobs.open()
    code, out = one.watch()
    assert code is ExitCode.PASS
    assert (one.copy / "launch.log").read_bytes() == (one.folder / "launch.log").read_bytes()
    assert not set("\x1b\x07\x00\x9b\x84\r\u202e") & set(out)
    assert max(map(len, out.splitlines())) < (64 << 10) + 40
    assert out.count("… (line cut at 64 KiB)") == 2
    assert "after" in out.splitlines()
    assert "20%" in out.splitlines()


def _cut_streams(count: int, seed: int, going: Make, jobs: Any, server: Any, host: Any, eventually: Make) -> None:
    """Follow one run that writes bytes of all kinds while its connection is cut at random moments, so many times."""
    import threading

    one = going(host, wait_at=5)
    rng = random.Random(seed)
    ended: list[tuple[ExitCode, str]] = []
    thread = threading.Thread(target=lambda: ended.append(one.watch()))
    thread.start()
    copy = one.copy / "launch.log"
    log = one.folder / "launch.log"
    eventually(lambda: copy.exists() and copy.stat().st_size > 0, "it is followed", 60.0)
    for number in range(count):
        with open(log, "ab") as out:
            out.write(b"".join(rng.choice(NASTY) + rng.choice([b"\n", b""]) for _ in range(rng.randint(1, 400))))
        if rng.random() < 0.5:
            seen = copy.stat().st_size
            eventually(lambda seen=seen: copy.stat().st_size > seen or not thread.is_alive(), "bytes come", 60.0)
        time.sleep(rng.choice((0.0, rng.uniform(0, 0.05))))
        server.cut()
        assert thread.is_alive(), f"seed {seed}, cut {number}: {ended}"
    jobs.open()
    thread.join(120)
    assert ended, f"seed {seed}"
    assert ended[0][0] is ExitCode.PASS, ended[0][1][-2000:]
    for name in ("launch.log", "events.jsonl"):
        assert (one.copy / name).read_bytes() == (one.folder / name).read_bytes(), f"seed {seed}: {name} differs"
    print(f"{count} cuts, {log.stat().st_size} bytes, 0 different (seed {seed})")


@pytest.mark.fault(row=3)
def test_a_stream_that_is_cut_again_and_again_is_whole_in_the_end(
    going: Make, sshd_at: Make, enrolled: Make, jobs: Any, eventually: Make
) -> None:
    server = sshd_at()
    _cut_streams(8, 7, going, jobs, server, enrolled(server), eventually)


@pytest.mark.soak
@pytest.mark.fault(row=3)
@pytest.mark.timeout(7200)
def test_a_thousand_cut_streams_are_whole_in_the_end(
    going: Make, sshd_at: Make, enrolled: Make, jobs: Any, eventually: Make
) -> None:
    server = sshd_at()
    _cut_streams(
        1000, int(os.environ.get("LATENTFORGE_SOAK_SEED", "1")), going, jobs, server, enrolled(server), eventually
    )


def _pace(megabytes: int, one: Any, laptop: Any, jobs: Any, eventually: Make) -> tuple[float, float, int]:
    """Watch a run whose log holds so much, in a process of its own: bytes a second, bytes a second of its processor
    time, peak memory in KiB."""
    line = b"".join(b"layer %d: activations within bounds, nothing to be said of it here\n" % n for n in range(15_000))
    with open(one.folder / "launch.log", "ab") as log:
        for _ in range(megabytes * 1_000_000 // len(line)):
            log.write(line)
    size, copy = (one.folder / "launch.log").stat().st_size, one.copy / "launch.log"
    with open(os.devnull, "wb") as out:
        process = subprocess.Popen([*WATCH, one.run, "--stall", "2000"], cwd=laptop.cwd, env=laptop.env, stdout=out)
    eventually(lambda: copy.exists() and copy.stat().st_size > 0, "it is followed", 60.0)
    begin, spent, had = time.monotonic(), _spent(process.pid), copy.stat().st_size
    eventually(lambda: copy.stat().st_size >= size, "all is read", 60.0 + megabytes)
    seconds, spent = time.monotonic() - begin, _spent(process.pid) - spent
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = int(next(row for row in status.splitlines() if row.startswith("VmHWM")).split()[1])
    jobs.open()
    assert process.wait(120) == 0
    assert copy.read_bytes() == (one.folder / "launch.log").read_bytes()
    return (size - had) / seconds, (size - had) / spent, peak


def _spent(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    ticks = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def test_memory_does_not_grow_with_the_log(
    going: Make, shared_sshd: Any, enrolled: Make, laptop: Any, jobs: Any, eventually: Make
) -> None:
    one = going(enrolled(shared_sshd), wait_at=5)
    pace, _at_most, peak = _pace(100, one, laptop, jobs, eventually)
    print(f"followed at {pace / 1e6:.0f} MB/s, VmHWM {peak / 1024:.0f} MiB after 100 MB")
    assert peak < 160 * 1024, "the log's 100 MB would not fit beside the program"


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_following_keeps_up_with_fifty_megabytes_a_second_in_flat_memory(
    going: Make, shared_sshd: Any, enrolled: Make, laptop: Any, jobs: Any, eventually: Make, tmp_path: Path
) -> None:
    found = {}
    for number, megabytes in enumerate((100, 1000)):
        jobs.gate.unlink(missing_ok=True)
        one = going(enrolled(shared_sshd, f"box{number}", tmp_path / f"root{number}"), wait_at=5, patience=2000.0)
        found[megabytes] = _pace(megabytes, one, laptop, jobs, eventually)
        pace, at_most, peak = found[megabytes]
        print(f"{megabytes} MB at {pace / 1e6:.0f} MB/s ({at_most / 1e6:.0f} a second of its processor time), ", end="")
        print(f"VmHWM {peak / 1024:.0f} MiB")
    # Of its processor time, since a busy machine says nothing of the program.
    assert found[1000][1] >= 50e6
    assert found[1000][2] <= found[100][2] * 1.15
