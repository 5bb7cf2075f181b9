"""One job under its supervisor: how it starts, how its end is told, and what is cleaned up after it."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from dispatch.agent import ending, exitrec, journal, memory_evidence
from dispatch.agent.memory_evidence import Counters
from dispatch.hosts.facts import RunState

from .conftest import MARK, AgentHost, wait_for


@pytest.mark.parametrize(
    ("program", "code", "number", "outcome", "kind", "status"),
    [
        ("raise SystemExit(0)", 0, None, "pass", "exited", 0),
        ("raise SystemExit(1)", 1, None, "fail", "exited", 1),
        ("raise SystemExit(2)", 2, None, "refused", "exited", 2),
        ("raise SystemExit(3)", 3, None, "unknown", "exited", 3),
        ("raise SystemExit(7)", 7, None, "crashed", "exited", 5),
        ("raise SystemExit(137)", 137, None, "crashed", "exited", 5),
        ("import os; os.kill(os.getpid(), 9)", None, signal.SIGKILL, "killed", "killed-unknown", 5),
        ("import os; os.kill(os.getpid(), 11)", None, signal.SIGSEGV, "killed", "signal", 5),
        ("import os; os.kill(os.getpid(), 15)", None, signal.SIGTERM, "unknown", "stopped", 3),
        ("import os; os.kill(os.getpid(), 1)", None, signal.SIGHUP, "unknown", "stopped", 3),
    ],
)
def test_each_way_to_end_is_told_from_the_others(
    host: AgentHost, program: str, code: int | None, number: int | None, outcome: str, kind: str, status: int
) -> None:
    state = host.ran(program)
    assert (state["code"], state["signal"], state["outcome"], state["exit"]) == (code, number, outcome, status)
    assert state["class"] == RunState.model_validate(state).class_ == kind
    record = exitrec.read(host.paths(state["run"]).exit)
    assert record is not None
    assert (record["code"], record["signal"], record["outcome"], record["class"]) == (code, number, outcome, kind)


_WATCHDOG = ("watchdog", "memory watchdog: 1.0 GiB available")


@pytest.mark.parametrize(
    ("code", "number", "known", "end"),
    [
        (None, 9, {}, ("killed", "killed-unknown", None)),
        (None, 9, {"oom": None, "evidence": "host oom_kill +1"}, ("killed", "killed-unknown", None)),
        (None, 9, {"oom": True, "evidence": "oom_kill +1"}, ("killed", "oom", "out of memory: oom_kill +1")),
        (0, None, {"stopped": _WATCHDOG}, ("killed", *_WATCHDOG)),
        (None, 9, {"stopped": _WATCHDOG, "cancelled": True}, ("cancelled", "cancelled", None)),
        (0, None, {"cancelled": True}, ("cancelled", "cancelled", None)),
        (None, None, {"failure": "no such file"}, ("crashed", "not-started", "no such file")),
        (1, None, {"evidence": "e"}, ("fail", "exited", "meanwhile a process was killed for memory: e")),
        (0, None, {"evidence": "host oom_kill +1"}, ("pass", "exited", None)),
    ],
)  # fmt: skip
def test_what_is_known_beside_the_exit_status_decides_the_class(
    code: int | None, number: int | None, known: dict[str, Any], end: tuple[str, str, str | None]
) -> None:
    assert ending.judge(code, number, **known) == end


def test_a_state_keeps_its_class_through_the_laptop() -> None:
    state = RunState.model_validate({"state": "finished", "class": "oom"})
    assert RunState.model_validate(state.model_dump()) == state
    assert state.model_dump()["class"] == "oom"


def test_a_kill_is_not_called_out_of_memory_without_evidence(host: AgentHost) -> None:
    state = host.ran("import os; os.kill(os.getpid(), 9)")
    assert state["oom"] is not True


@pytest.mark.parametrize(
    ("number", "before", "after", "oom"),
    [
        (9, Counters(3, 5), Counters(4, 6), True),
        (9, Counters(None, 5), Counters(None, 6), None),
        (9, Counters(3, 5), Counters(3, 5), False),
        (9, Counters(None, None), Counters(None, None), None),
        (15, Counters(3, 5), Counters(4, 6), None),
        (None, Counters(3, 5), Counters(4, 6), None),
    ],
)
def test_out_of_memory_is_what_the_kernel_counted(
    number: int | None, before: Counters, after: Counters, oom: bool | None
) -> None:
    judged, evidence = memory_evidence.judge(number, before, after)
    assert judged is oom
    assert (evidence is not None) == (before != after)


_KERNEL = [
    (10.0, "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),task=python3,pid=77,uid=1000"),
    (10.0, "Out of memory: Killed process 77 (python3) total-vm:9kB, anon-rss:8kB"),
    (90.0, "Memory cgroup out of memory: Killed process 88 (python3) total-vm:9kB"),
    (95.0, "Out of memory: Kill process 99 (python3) score 5 or sacrifice child"),
]


@pytest.mark.parametrize(
    ("pid", "since", "found"), [(77, 5.0, True), (77, 50.0, False), (88, 50.0, True), (99, 0, True), (7, 0, False)]
)
def test_the_kernels_log_counts_for_the_process_and_the_time_that_it_names(pid: int, since: float, found: bool) -> None:
    line = memory_evidence.kernel_line(pid, since, records=lambda: _KERNEL)
    assert (line is not None) is found
    assert line is None or f"process {pid} " in line


def test_a_line_of_the_kernels_log_is_evidence_where_counters_are_not() -> None:
    before, after = Counters(None, 5), Counters(None, 6)
    oom, evidence = memory_evidence.judge(9, before, after, lambda: "Out of memory: Killed process 77 (python3)")
    assert oom is True
    assert evidence == "host oom_kill +1, kernel: Out of memory: Killed process 77 (python3)"
    assert memory_evidence.judge(15, before, after, lambda: "never asked")[0] is None
    assert memory_evidence.judge(9, Counters(3, 5), Counters(3, 5), lambda: "never asked")[0] is False


_GRANDCHILD = """
import os, signal, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
        for fd in range(3, 64):
            try: os.close(fd)
            except OSError: pass
        os.closerange(3, 64)
        with open("out/grandchild", "w") as file: file.write(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
os.wait()
while not os.path.exists("out/grandchild"): time.sleep(0.01)
raise SystemExit(0)
"""


def test_a_grandchild_in_a_session_of_its_own_does_not_outlive_the_run(host: AgentHost) -> None:
    state = host.ran(_GRANDCHILD)
    pid = int((host.paths(state["run"]).out / "grandchild").read_text())
    assert not Path(f"/proc/{pid}").exists()
    record = exitrec.read(host.paths(state["run"]).exit)
    assert record is not None
    assert (state["outcome"], record["leftovers"], record["survivors"]) == ("pass", 1, [])


def test_what_ends_by_itself_just_after_the_job_is_not_killed(host: AgentHost) -> None:
    tracker = "import os, sys; os.read(int(sys.argv[1]), 1); open('out/tidied', 'w').close()"
    program = (
        "import os, subprocess, sys\n"
        "read, write = os.pipe()\n"
        f"subprocess.Popen([sys.executable, '-S', '-c', {tracker!r}, str(read)], pass_fds=[read])\n"
    )
    state = host.ran(program)
    record = exitrec.read(host.paths(state["run"]).exit)
    assert record is not None
    assert record["leftovers"] == 0
    assert (host.paths(state["run"]).out / "tidied").exists()


_HOSTILE = [
    "",
    "-rf",
    "--",
    "a b",
    "'",
    '"',
    "\\",
    "$(touch canary)",
    "`touch canary`",
    "; touch canary #",
    "${HOME}",
    "$HOME",
    "%n%s",
    "*",
    "~",
    "!!",
    "a\nb\r\tc",
    "|&><",
    "\x1b]0;title\x07",
    "日本 \U0001f642 é",
    "\x7f\x01",
    "x" * 100_000,
]


def test_hostile_words_reach_the_job_as_they_are(host: AgentHost) -> None:
    program = "import json, os, sys\njson.dump([sys.argv[1:], dict(os.environ)], open('out/seen.json', 'w'))\n"
    environment = {f"HOSTILE_{number}": word for number, word in enumerate(_HOSTILE)}
    environment["a-b.c d$(touch canary)"] = "odd name"
    run = host.reserve([sys.executable, "-I", "-c", program, *_HOSTILE], env=environment)
    host.call("launch", chain=[run])
    assert host.wait(run, "finished")["outcome"] == "pass"
    argv, seen = json.loads((host.paths(run).out / "seen.json").read_text())
    assert argv == _HOSTILE
    assert {name: seen.get(name) for name in environment} == environment
    assert not list(host.dir.rglob("canary"))


def test_a_job_sees_its_described_environment_and_little_of_the_hosts(host: AgentHost) -> None:
    host.environment = {
        **{name: host.environment[name] for name in ("PATH", "HOME", "LANG", "USER", MARK) if name in host.environment},
        "SECRET_OF_THE_SESSION": "x",
        "PIP_CERT": "/etc/authority.pem",
        "https_proxy": "http://127.0.0.1:3128",
        "LATENTFORGE_CUDA": "OFF",
    }
    program = "import json, os; json.dump(dict(os.environ), open('out/seen.json', 'w'))"
    run = host.python(program, env={"PATH": "/nowhere", "STEPS": "5"})
    host.call("launch", chain=[run])
    host.wait(run, "finished")
    seen = json.loads((host.paths(run).out / "seen.json").read_text())
    assert (seen["PATH"], seen["STEPS"], seen[MARK]) == ("/nowhere", "5", host.mark)
    assert (seen["PIP_CERT"], seen["https_proxy"]) == ("/etc/authority.pem", "http://127.0.0.1:3128")
    assert (seen["LATENTFORGE_STATE"], seen["LATENTFORGE_CUDA"]) == (str(host.dir), "OFF")
    told = {"PATH", "STEPS", MARK, "LATENTFORGE_STATE", "LATENTFORGE_CUDA"}
    told.add("LATENTFORGE_MARK")  # by which a cancel finds it, whoever is its parent by then
    assert set(seen) - told <= {"HOME", "LANG", "USER", "LOGNAME", "LC_CTYPE", "PIP_CERT", "https_proxy"}


def test_a_job_starts_in_its_run_directory_with_nothing_on_stdin_and_both_outputs_in_the_log(host: AgentHost) -> None:
    program = (
        "import os, sys, signal\n"
        "print(os.getcwd(), sys.stdin.read() == '', os.getsid(0) == os.getpid(), oct(os.umask(0)), flush=True)\n"
        "print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, file=sys.stderr)\n"
    )
    state = host.ran(program)
    assert host.paths(state["run"]).log.read_text() == f"{host.paths(state['run']).dir} True True 0o77\nTrue\n"


def test_a_job_inherits_its_lock_and_lease_and_nothing_else(host: AgentHost) -> None:
    program = (
        "import os\n"
        "names = [f'/proc/self/fd/{fd}' for fd in os.listdir('/proc/self/fd')]\n"
        "print([os.readlink(name) for name in names if os.path.lexists(name)])\n"
    )
    first, second = host.python(program, lease=["device"]), host.python("pass")
    host.call("launch", chain=[first, second])
    host.wait(second, "finished")
    paths = host.paths(first)
    assert set(ast.literal_eval(paths.log.read_text())) == {
        "/dev/null",
        str(paths.log),
        str(paths.lock),
        str(host.root.device_lock),
    }


def test_a_program_that_does_not_exist_ends_the_run_with_its_name(host: AgentHost) -> None:
    run = host.reserve(["/no/such/program", "x"])
    answer = host.call("launch", chain=[run])
    state = host.wait(run, "finished")
    assert answer["started"] is True
    assert (state["outcome"], state["code"], state["exit"]) == ("crashed", None, 5)
    assert "/no/such/program" in state["reason"]


def test_the_launching_session_is_not_held_open_by_the_job(host: AgentHost) -> None:
    run = host.python("import time; time.sleep(600)")
    host.call(
        "launch", chain=[run]
    )  # refused by its deadline unless everyone has closed the request's stdout and stderr
    state = host.wait(run, "running")
    for pid in (state["pid"], state["supervisor_pid"]):
        assert os.getsid(pid) not in (os.getsid(0), 0)
    assert Path(f"/proc/{state['supervisor_pid']}/cwd").readlink() == Path("/")
    host.call("cancel", run=run, grace=1)


def test_the_inventory_names_every_file_that_counts_with_its_digest(host: AgentHost) -> None:
    program = (
        "import os\n"
        "os.makedirs('out/student'); os.makedirs('out/checkpoints/step-1'); os.makedirs('out/deep/checkpoints')\n"
        "open('out/student/model.safetensors', 'wb').write(b'weights' * 1000)\n"
        "open('out/checkpoints/step-1/x', 'w').write('no')\n"
        "open('out/deep/checkpoints/y', 'w').write('yes')\n"
        "open('events.jsonl', 'w').write('{}\\n'); open('effective.json', 'w').write('{}')\n"
        "os.symlink('/etc/hostname', 'out/link'); os.symlink('/etc', 'out/etc'); os.mkfifo('out/fifo')\n"
        "print('done')\n"
    )
    state = host.ran(program)
    paths = host.paths(state["run"])
    collected = host.call("collect", run=state["run"])
    assert [file["path"] for file in collected["files"]] == [
        "effective.json",
        "events.jsonl",
        "identity.json",
        "launch.json",
        "launch.log",
        "out/deep/checkpoints/y",
        "out/student/model.safetensors",
    ]
    for file in collected["files"]:
        data = (paths.dir / file["path"]).read_bytes()
        assert (file["bytes"], file["sha256"]) == (len(data), hashlib.sha256(data).hexdigest())
    assert sorted(file["path"] for file in collected["skipped"]) == ["out/etc", "out/fifo", "out/link"]
    assert collected["exit"]["artifacts"] == hashlib.sha256(paths.artifacts.read_bytes()).hexdigest()
    paths.artifacts.write_text('{"files":[]}')
    with pytest.raises(Exception, match="exit record says"):
        host.call("collect", run=state["run"])


def test_the_journal_tells_the_story_of_a_run_in_order(host: AgentHost) -> None:
    state = host.ran("pass")
    past = journal.read(host.paths(state["run"]))
    assert [event["event"] for event in past.events] == ["launching", "started", "ended"]
    assert past.started is not None
    assert past.started["pid"] == state["pid"]


def test_a_run_whose_inventory_cannot_be_written_is_not_green(host: AgentHost) -> None:
    state = host.ran("import os; os.mkdir('artifacts.json')")
    assert (state["code"], state["outcome"], state["exit"]) == (0, "unknown", 3)
    assert "artifacts.json" in state["reason"]


def test_a_beat_is_recorded_while_a_run_goes_on(host: AgentHost) -> None:
    run = host.python("import time; time.sleep(600)")
    host.call("launch", chain=[run])
    state: dict[str, Any] = wait_for(lambda: (s := host.state(run))["beat_age"] is not None and s)
    assert state["state"] == "running"
    assert 0 <= state["beat_age"] < 10
    host.call("cancel", run=run, grace=0)


_CRASHES = """
import os, sys
made = int(os.environ["LATENTFORGE_RESTARTED"])
with open("out/starts", "a") as file: print(made, os.environ["LATENTFORGE_RESTARTS_LEFT"], file=file)
if made < {times}: {end}
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), 9)", "raise SystemExit(5)"])
def test_a_run_that_crashes_is_begun_again_within_its_budget_under_the_same_id(host: AgentHost, end: str) -> None:
    state = host.ran(_CRASHES.format(times=2, end=end), restarts=3)
    assert (state["outcome"], state["code"]) == ("pass", 0)
    paths = host.paths(state["run"])
    assert [line.split() for line in (paths.dir / "out" / "starts").read_text().splitlines()] == [
        ["0", "3"],
        ["1", "2"],
        ["2", "1"],
    ]
    told = [event for event in journal.read(paths).events if event["event"] == "restarting"]
    assert [(event["restarted"], event["left"]) for event in told] == [(1, 2), (2, 1)]
    record = exitrec.read(paths.exit)
    assert record is not None
    assert record["restarts"] == 2


@pytest.mark.parametrize(
    ("end", "restarts", "starts", "outcome"),
    [
        ("os.kill(os.getpid(), 11)", 2, 3, "killed"),
        ("os.kill(os.getpid(), 15)", 5, 1, "unknown"),  # it was told to stop before it could hear it
        ("raise SystemExit(5)", 0, 1, "crashed"),
        ("raise SystemExit(1)", 5, 1, "fail"),
        ("raise SystemExit(2)", 5, 1, "refused"),
        ("raise SystemExit(3)", 5, 1, "unknown"),
        ("raise SystemExit(6)", 5, 1, "crashed"),
    ],
)
def test_it_is_not_begun_again_beyond_its_budget_nor_after_an_end_that_it_gave_itself(
    host: AgentHost, end: str, restarts: int, starts: int, outcome: str
) -> None:
    program = f"import os\nopen('out/starts', 'a').write('x')\n{end}"
    state = host.ran(program, restarts=restarts)
    assert state["outcome"] == outcome
    assert (host.paths(state["run"]).dir / "out" / "starts").read_text() == starts * "x"


def test_a_run_that_is_cancelled_is_not_begun_again(host: AgentHost) -> None:
    run = host.python("import time\nopen('out/starts', 'a').write('x')\ntime.sleep(60)", restarts=5)
    host.call("launch", chain=[run])
    wait_for(lambda: (host.paths(run).dir / "out" / "starts").is_file())
    host.call("cancel", run=run, grace=0, by="test")
    assert host.wait(run, "finished")["outcome"] == "cancelled"
    assert (host.paths(run).dir / "out" / "starts").read_text() == "x"
