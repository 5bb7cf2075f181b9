"""Cancel: whatever shape a run's tree has taken, nothing of it survives, and nobody else is touched."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import wait_for

# A tree by a seed: forks, sessions of their own, double forks, deaf to signals, stopped, with all descriptors closed.
_TREE = """
import os, random, signal, sys, time
draw = random.Random(int(sys.argv[1]))
nodes = int(sys.argv[2])
def note():
    with open(f"out/{os.getpid()}", "w") as file: file.write("x")
def grow(left, seed):
    mine = random.Random(seed)
    for _ in range(mine.randint(1, 3)):
        if left <= 0: return
        share = mine.randint(1, left); left -= share
        manner = mine.choice(["fork", "session", "orphan", "deaf", "stopped", "closed", "named"])
        if os.fork() == 0:
            if manner == "session": os.setsid()
            if manner == "orphan":
                os.setsid()
                if os.fork() != 0: os._exit(0)
            if manner == "deaf":
                for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
            note()
            if manner == "closed": os.closerange(3, 4096)
            if manner == "named":
                with open("/proc/self/comm", "w") as file: file.write("lf-supervisor")
            grow(share - 1, mine.random())
            if manner == "stopped": os.kill(os.getpid(), signal.SIGSTOP)
            time.sleep(600)
            os._exit(0)
note()
grow(nodes, draw.random())
with open("ready", "w") as file: file.write("x")
time.sleep(600)
"""


def _cancel_a_tree(host: Any, seed: int, grace: float) -> int:
    """Launch the tree of a seed, cancel it amid its growth or after it; how many processes had been there."""
    draw = random.Random(seed)
    run = host.reserve([sys.executable, "-I", "-c", _TREE, str(seed), str(draw.randint(1, 12))])
    host.call("launch", chain=[run])
    folder = host.paths(run).dir
    wait_for(lambda: (folder / "ready").exists() or host.state(run)["state"] == "finished", seconds=30)
    answer = host.call("cancel", run=run, grace=grace)
    pids = [int(path.name) for path in (folder / "out").iterdir()]
    assert (answer["survivors"], answer["state"]["state"], answer["state"]["class"]) == ([], "finished", "cancelled")
    left = [pid for pid in pids if _is_of(pid, host.mark)]
    assert not left, (seed, left)
    wait_for(lambda: not host.marked(), describe=lambda: (seed, host.marked()))  # the supervisor itself goes last
    assert host.call("cancel", run=run, grace=0)["did"] == "nothing"
    return len(pids)


def _is_of(pid: int, mark: str) -> bool:
    try:
        return mark.encode() in Path(f"/proc/{pid}/environ").read_bytes()
    except OSError:
        return False


@pytest.mark.fault(row=31)
@pytest.mark.parametrize("seed", range(5))
def test_a_random_tree_leaves_no_survivor(either_host: Any, seed: int) -> None:
    assert _cancel_a_tree(either_host, seed, grace=0.1) >= 1


@pytest.mark.soak
@pytest.mark.fault(row=31)
def test_of_two_hundred_random_trees_none_leaves_a_survivor(either_host: Any) -> None:
    either_host.call("install")
    either_host.installed = True
    begun = time.monotonic()
    sizes = [_cancel_a_tree(either_host, 1000 + seed, grace=random.choice([0, 0.1])) for seed in range(200)]
    print(f"200 trees, {sum(sizes)} processes, 0 survivors: {time.monotonic() - begun:.0f} s")


@pytest.mark.fault(row=31)
def test_a_stopped_tree_is_woken_to_end_in_its_own_way(either_host: Any) -> None:
    program = (
        "import os, signal, sys\n"
        "signal.signal(15, lambda *_: (open('out/tidied', 'w').close(), sys.exit(0)))\n"
        "open('out/ready', 'w').close()\n"
        "while True: signal.pause()"
    )
    run = either_host.python(program)
    either_host.call("launch", chain=[run])
    wait_for(lambda: (either_host.paths(run).out / "ready").exists())
    os.kill(either_host.state(run)["pid"], signal.SIGSTOP)
    answer = either_host.call("cancel", run=run, grace=20)
    assert (answer["forced"], answer["survivors"]) == (False, [])
    assert (either_host.paths(run).out / "tidied").exists()


# In a pid namespace the next pid can be chosen: the newcomer gets the very pid of the run's process that is gone.
_REUSE = """
import json, os, signal, sys, time
from pathlib import Path
from dispatch.agent import cancelling, journal
from dispatch.agent.durable import write_json
from dispatch.agent.paths import Root
from dispatch.agent.processes import boot_id, is_alive, look, send
run = Root(sys.argv[1]).run(sys.argv[2])
first = os.fork()
if first == 0:
    signal.pause()
gone = look(first)
journal.record(run, "launching")
journal.record(run, "started", pid=first, ticks=gone.ticks, argv=["x"])
write_json(run.supervisor, {"pid": first, "ticks": gone.ticks, "boot_id": boot_id(), "chain": [run.id]})
os.kill(first, signal.SIGKILL)
os.waitpid(first, 0)
while True:  # past the tick in which the first was born
    if time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK") > gone.ticks + 3: break
Path("/proc/sys/kernel/ns_last_pid").write_text(str(first - 1))
newcomer = os.fork()
if newcomer == 0:
    os.setsid()
    signal.pause()
assert newcomer == first, (newcomer, first)
held = os.open(run.lock, os.O_RDWR)
import fcntl
fcntl.flock(held, fcntl.LOCK_EX)
os.set_inheritable(held, False)
sent = [send(gone, number) for number in (signal.SIGTERM, signal.SIGKILL)]
fcntl.flock(held, fcntl.LOCK_UN); os.close(held)
answer = cancelling.cancel(run, 0.1, "a test")
time.sleep(0)
print(json.dumps({"sent": sent, "did": answer["did"], "state": answer["state"]["state"],
                  "said_alive": is_alive(gone.pid, gone.ticks), "lives": look(newcomer).alive}))
os.kill(newcomer, signal.SIGKILL)
os.waitpid(newcomer, 0)
"""


@pytest.mark.fault(row=32)
def test_a_newcomer_with_the_pid_of_a_run_is_never_signalled(host: Any) -> None:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("a pid namespace takes root")
    run = host.python("pass")
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", _REUSE]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(host.dir), run], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    import json

    seen = json.loads(done.stdout)
    assert seen == {"sent": [False, False], "did": "nothing", "state": "lost", "said_alive": False, "lives": True}
