"""Processes killed at every level of a run, under both runners: each end is told, and none turns green."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .conftest import AgentHost, Refusal, checked, wait_for

_WAIT = "import time; open('out/ready', 'w').close(); time.sleep(600)"
_TREE = """
import os, time
for name in ("child", "grandchild"):
    if os.fork() == 0:
        os.setsid()
        with open("out/" + name, "w") as file: file.write(str(os.getpid()))
        time.sleep(600)
while len(os.listdir("out")) < 2: time.sleep(0.005)
open("out/ready", "w").close()
time.sleep(600)
"""


def _ready(host: Any, run: str) -> None:
    wait_for(lambda: (host.paths(run).out / "ready").exists())


def _alive(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


@pytest.mark.fault(row=9)
def test_a_job_killed_outright_is_finished_by_its_signal_within_seconds_and_its_children_are_gone(
    either_host: Any,
) -> None:
    run = either_host.python(_TREE, lease=["device"])
    either_host.call("launch", chain=[run])
    _ready(either_host, run)
    children = [int((either_host.paths(run).out / name).read_text()) for name in ("child", "grandchild")]
    begun = time.monotonic()
    os.kill(either_host.state(run)["pid"], signal.SIGKILL)
    state = either_host.wait(run, "finished", seconds=15)
    assert time.monotonic() - begun < 15
    assert (state["signal"], state["outcome"], state["class"]) == (9, "killed", "killed-unknown")
    assert state["oom"] is not True
    assert not [pid for pid in children if _alive(pid)]


@pytest.mark.fault(row=10)
def test_a_killed_child_leaves_the_end_to_its_parent(either_host: Any) -> None:
    program = (
        "import os, time\n"
        "pid = os.fork()\n"
        "if pid == 0: time.sleep(600)\n"
        "with open('out/ready', 'w') as file: file.write(str(pid))\n"
        "_, status = os.waitpid(pid, 0)\n"
        "raise SystemExit(30 + os.WTERMSIG(status))\n"
    )
    run = either_host.python(program)
    either_host.call("launch", chain=[run])
    child = wait_for(lambda: (p := either_host.paths(run).out / "ready").exists() and p.read_text())
    os.kill(int(child), signal.SIGKILL)
    state = either_host.wait(run, "finished")
    assert (state["code"], state["signal"], state["outcome"], state["class"]) == (39, None, "crashed", "exited")


@pytest.mark.fault(row=11)
def test_a_killed_supervisor_of_a_detached_run_leaves_it_unsupervised_then_lost(host: Any) -> None:
    run = host.python(_TREE)
    host.call("launch", chain=[run])
    _ready(host, run)
    state = host.state(run)
    os.kill(state["supervisor_pid"], signal.SIGKILL)
    orphan = host.wait(run, "unsupervised")
    assert (orphan["outcome"], orphan["exit"]) == (None, None)
    answer = host.call("cancel", run=run, grace=0)
    assert (answer["survivors"], answer["state"]["exit"]) == ([], 5)


@pytest.mark.fault(row=11)
def test_a_killed_supervisor_of_a_unit_takes_the_whole_tree_with_it_and_is_recorded(unit_host: Any) -> None:
    run, behind = unit_host.python(_TREE, lease=["device"]), unit_host.python("pass")
    unit_host.call("launch", chain=[run, behind])
    _ready(unit_host, run)
    state = unit_host.state(run)
    children = [int((unit_host.paths(run).out / name).read_text()) for name in ("child", "grandchild")]
    os.kill(state["supervisor_pid"], signal.SIGKILL)
    ended = unit_host.wait(run, "finished")
    assert (ended["outcome"], ended["class"], ended["exit"]) == ("killed", "killed-unknown", 5)
    assert (ended["code"], ended["signal"]) == (None, None)  # nobody saw the job's own end, and none is invented
    assert "its supervisor ended by signal KILL" in ended["reason"]
    assert not [pid for pid in (state["pid"], *children) if _alive(pid)]
    unit_host.wait(behind, "reserved")
    assert unit_host.call("launch", chain=[behind])["started"] is True
    unit_host.wait(behind, "finished")


@pytest.fixture
def small_memory(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A control group of 160 MiB, of whichever version has the memory controller here."""
    for base, limit in (
        (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
        (Path("/sys/fs/cgroup"), "memory.max"),
    ):
        group = base / f"lf-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(160 << 20))
        except OSError:
            group.rmdir()
            continue
        yield group
        wait_for(lambda group=group: not (group / "cgroup.procs").read_text().strip())
        group.rmdir()
        return
    pytest.skip("no control group whose memory could be limited here")


@pytest.mark.fault(row=12)
def test_a_job_that_the_kernel_kills_for_memory_is_told_from_any_other_kill(host: Any, small_memory: Path) -> None:
    host.prefix = ["sh", "-c", f'echo $$ > {small_memory}/cgroup.procs && exec "$@"', "sh"]
    run = host.python("held = []\nwhile True: held.append(b'x' * (4 << 20))")
    host.call("launch", chain=[run])
    state = host.wait(run, "finished", seconds=60)
    assert (state["signal"], state["outcome"], state["class"], state["oom"]) == (9, "killed", "oom", True)
    assert "oom_kill +1" in state["reason"]
    plain = host.python("import os; os.kill(os.getpid(), 9)")
    host.call("launch", chain=[plain])
    assert host.wait(plain, "finished")["class"] == "killed-unknown"


@pytest.mark.fault(row=12)
def test_a_worker_that_the_kernel_kills_for_memory_is_named_beside_its_parents_code(
    host: Any, small_memory: Path
) -> None:
    host.prefix = ["sh", "-c", f'echo $$ > {small_memory}/cgroup.procs && exec "$@"', "sh"]
    worker = "held = []\nwhile True: held.append(b'x' * (4 << 20))"
    run = host.python(
        f"import subprocess, sys\nsubprocess.run([sys.executable, '-c', {worker!r}]); raise SystemExit(1)"
    )
    host.call("launch", chain=[run])
    state = host.wait(run, "finished", seconds=60)
    assert (state["code"], state["class"]) == (1, "exited")
    assert "killed for memory" in state["reason"]


_REBOOTED = 'mount --bind "$BOOT" /proc/sys/kernel/random/boot_id && exec "$@"'


@pytest.mark.fault(row=13)
def test_a_restart_of_the_host_interrupts_frees_the_lease_and_needs_a_new_attempt(host: Any, tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("another boot id takes root")
    run = host.python(_WAIT, lease=["device"])
    host.call("launch", chain=[run])
    _ready(host, run)
    state = host.state(run)
    for pid in (state["supervisor_pid"], state["pid"]):  # what a power cut does to both
        os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not _alive(state["pid"]))
    (tmp_path / "boot").write_text("11111111-2222-3333-4444-555555555555\n")
    host.environment = {**host.environment, "BOOT": str(tmp_path / "boot")}
    host.prefix = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _REBOOTED, "sh"]
    seen = host.frame("status", {"runs": [run]}).document["result"][run]
    assert (seen["state"], seen["outcome"], seen["exit"]) == ("interrupted", "unknown", 3)
    assert host.frame("launch", {"chain": [run]}).document["result"]["blocked"] == run
    other = host.python("pass", lease=["device"])
    assert host.call("launch", chain=[other])["started"] is True
    wait_for(lambda: host.frame("status", {"runs": [other]}).document["result"][other]["state"] == "finished")


# Both clocks of a process through this shim: the wall clock shifted by the seconds that a file holds.
_SHIM = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>
static long shift(void) {
  static const char *path; long value = 0;
  if (!path && !(path = getenv("LF_TEST_SHIFT"))) return 0;
  FILE *file = fopen(path, "r");
  if (file) { if (fscanf(file, "%ld", &value) != 1) value = 0; fclose(file); }
  return value;
}
int clock_gettime(clockid_t clock, struct timespec *now) {
  static int (*real)(clockid_t, struct timespec *);
  if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
  int done = real(clock, now);
  if (!done && clock == CLOCK_REALTIME) now->tv_sec += shift();
  return done;
}
"""


@pytest.mark.fault(row=35)
@pytest.mark.parametrize("step", [3600, -3600])
def test_a_wall_clock_that_steps_by_an_hour_changes_no_duration_and_no_state(
    host: Any, tmp_path: Path, step: int
) -> None:
    (tmp_path / "shim.c").write_text(_SHIM)
    library, shift = tmp_path / "shim.so", tmp_path / "shift"
    subprocess.run(["g++", "-x", "c", "-shared", "-fPIC", "-o", library, tmp_path / "shim.c", "-ldl"], check=True)
    shift.write_text("0")
    host.environment = {**host.environment, "LD_PRELOAD": str(library), "LF_TEST_SHIFT": str(shift)}
    program = "import os, time; open('out/ready', 'w').close()\nwhile not os.path.exists('out/end'): time.sleep(0.01)"
    run = host.python(program, env={"LD_PRELOAD": str(library), "LF_TEST_SHIFT": str(shift)})
    begun = time.monotonic()
    host.call("launch", chain=[run])
    _ready(host, run)
    shift.write_text(str(step))
    told = host.frame("probe", {}).document["result"]["clock"]["wall"]
    assert abs(told - time.time() - step) < 60  # the step is there
    seen = host.frame("status", {"runs": [run]}).document["result"][run]
    assert seen["state"] == "running"
    assert 0 <= seen["seconds"] <= time.monotonic() - begun
    assert 0 <= seen["beat_age"] < 60
    (host.paths(run).out / "end").touch()
    state = host.wait(run, "finished")
    assert state["outcome"] == "pass"
    assert 0 < state["seconds"] <= time.monotonic() - begun
    assert (state["ended"] - state["started"] > 3000) is (step > 0)  # the stamps are for people, and stepped


@pytest.mark.fault(row=15)
def test_a_full_disk_refuses_a_reservation_then_warns_and_stops_a_run_whose_record_stays_readable(
    small_host: Any,
) -> None:
    floors = {"warn": 18 << 20, "kill": 14 << 20}
    program = (
        "import time\n"
        "open('out/ready', 'w').close()\n"
        "with open('out/log', 'wb', buffering=0) as file:\n"
        "    for _ in range(1000):\n"
        "        file.write(bytes(128 << 10)); time.sleep(0.05)\n"
        "    time.sleep(600)\n"
    )
    filler = small_host.dir / "filler"
    small_host.call("install")
    with pytest.raises(OSError, match="No space"), open(filler, "wb", buffering=0) as file:  # noqa: PT012
        while True:
            file.write(bytes(1 << 20))
    with pytest.raises(Refusal) as refusal:
        small_host.python("pass")
    assert (refusal.value.kind, refusal.value.code) == ("disk-full", 2)
    filler.unlink()
    run = small_host.python(program, disk_floors=floors)
    small_host.call("launch", chain=[run])
    warned = wait_for(lambda: (s := small_host.state(run))["warning"] and s, seconds=60)
    assert "disk is running full" in warned["warning"]
    state = small_host.wait(run, "finished", seconds=60)
    assert (state["outcome"], state["class"], state["exit"]) == ("killed", "watchdog", 5)
    assert "disk watchdog" in state["reason"]
    assert os.statvfs(small_host.dir).f_bavail > 0  # it was stopped before the last byte


@pytest.mark.fault(row=16)
def test_a_file_system_out_of_inodes_refuses_and_stops_like_a_full_one(tmp_path: Path) -> None:
    disk = tmp_path / "inodes"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64m,nr_inodes=160", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small filesystem cannot be mounted here: {mounted.stderr.strip()}")
    try:
        for made in checked(AgentHost(disk)):
            program = (
                "import time\n"
                "for number in range(1000):\n"
                "    try: open(f'out/{number}', 'w').close()\n"
                "    except OSError: break\n"
                "time.sleep(600)\n"
            )
            run, other = made.python(program), made.python("pass")
            made.call("launch", chain=[run])
            state = made.wait(run, "finished", seconds=60)
            assert (state["outcome"], state["class"]) == ("killed", "watchdog")
            assert "inodes" in state["reason"]
            with pytest.raises(Refusal) as refusal:
                made.python("pass")
            assert (refusal.value.kind, refusal.value.code) == ("disk-full", 2)
            assert made.state(other)["state"] == "reserved"
    finally:
        subprocess.run(["umount", str(disk)], check=True)
