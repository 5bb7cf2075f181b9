"""One run over two hosts: planned, launched and followed as one, and what becomes of it when one of them is lost."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

import dispatch.apply
from dispatch.building.build import BuildNames
from dispatch.planning.ask import asked
from latentforge.spec.hosts import PORTS

Make = Callable[..., Any]
pytestmark = [pytest.mark.sshd, pytest.mark.usefixtures("can_wire")]
CHECKOUT = Path(__file__).resolve().parents[3]
SPREAD = ("--set", "distill.distributed=ddp")


class Pair:
    """The two hosts with the code's build on each, jobs that train nothing, and the user's command."""

    def __init__(self, hosts: Any, laptop: Any, checkout: Path) -> None:
        self.hosts, self.laptop, self.checkout = hosts, laptop, checkout
        self.following: dict[str, Any] = {}
        """How the runs of the second host behave."""

    def go(self, *words: str, host: str = "a,b", spread: bool = True, **env: str) -> Any:
        given = [*(SPREAD if spread else ()), *words, "--host", host]
        return self.laptop.cli("go", "tiny", *given, cwd=self.checkout, **env)

    def launch(self, number: int, kind: str) -> list[dict[str, Any]]:
        """The launch records of a host's runs of a kind, in the order in which they were reserved."""
        found = sorted(
            self.hosts.roots[number].glob(f"runs/{kind}-*/launch.json"), key=lambda path: path.stat().st_mtime
        )
        return [json.loads(path.read_text()) for path in found]


@pytest.fixture
def pair(
    two_hosts: Any, jobs: Any, ask: Make, built: Make, laptop: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> Pair:
    made, of_leader = Pair(two_hosts, laptop, checkout), dispatch.apply.job

    def job(one: Any, facts: Any, plan: Any) -> Any:
        argv, env = of_leader(one, facts, plan)
        return ([*argv[:-1], json.dumps(made.following)] if one.kind.startswith("follow") else argv), env

    monkeypatch.setattr("dispatch.apply.job", job)
    for host in two_hosts.hosts:
        built(host, ask(host))
    return made


def test_two_hosts_are_planned_launched_and_followed_as_one(pair: Pair, jobs: Any, snapshot: Make) -> None:
    before = snapshot(*pair.hosts.roots, pair.laptop.home)
    first, second = (pair.go(DRY_RUN="1") for _ in range(2))
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert snapshot(*pair.hosts.roots, pair.laptop.home) == before, "a preview changed a file"
    assert "keep    a cable-a 198.51.100.1, b cable-b 198.51.100.2; silence of 6 s ends a run" in first.stdout
    steps = [line.split("  ")[1] for line in first.stdout.splitlines()[3:] if line.startswith("  ")][:17]
    assert steps[4:] == [
        *("warmup", "link", "b: trust", "b: preflight", "b: code", "b: build", "b: warmup"),
        *("data", "teacher", "score", "distill", "b: follow distill", "follow"),
    ]

    went = pair.go("--json")
    assert went.returncode == 0, went.stderr
    told, (leads,), (follows,) = json.loads(went.stdout), pair.launch(0, "distill"), pair.launch(1, "follow")
    assert told["code"] == 0
    assert told["beside"]["host"] == "b"
    assert [(end["kind"], end["ended"]) for end in told["ends"]][-2:] == [("distill", "pass"), ("b: follow", "pass")]
    lines = went.stderr.splitlines()
    assert {line[:4] for line in lines if " step 1/" in line} == {"a | ", "b | "}, "both logs, each line with its host"
    port = leads["world"].pop("port")
    assert port in PORTS
    meeting = {"hosts": ["a", "b"], "address": "198.51.100.1", "hca": None, "deadline_seconds": 6.0}
    assert leads["world"] == {**meeting, "index": 0, "interface": "cable-a", "wait_seconds": 300.0}
    here = {"index": 1, "port": port, "interface": "cable-b", "wait_seconds": 86400.0}
    assert follows["world"] == {**meeting, **here}
    assert (follows["lease"], follows["resolved"]) == (["device"], {})
    assert "world" not in pair.launch(0, "score")[0]

    again = pair.go()
    assert (again.returncode, "no changes. distill-" in again.stdout) == (0, True), again.stdout
    assert len(jobs.starts()) == 4, "a second go started something"


def test_a_second_host_whose_leader_never_comes_is_sent_home_and_comes_back_with_the_next_attempt(
    pair: Pair, jobs: Any, eventually: Make
) -> None:
    pair.following = {"wait_at": 1, "gate": str(jobs.gate), "steps": 3}
    jobs.others = {"exit": 1, "reason": "planted"}
    failed = pair.go()
    assert failed.returncode == 1, failed.stdout + failed.stderr
    assert "b: follow     cancelled" in failed.stdout
    states = json.loads(pair.laptop.cli("status", "--each", "b", "--json").stdout)["hosts"]["b"]["value"]
    assert [one["outcome"] for one in states.values()] == ["cancelled"]

    # Left alone by --detach, taken up by watch, ended by cancel: each time both of them.
    jobs.others = {"steps": 3}
    jobs.how = {"wait_at": 2, "gate": str(jobs.gate)}
    left = pair.go("--attempt", "next", "--detach")
    assert left.returncode == 0, left.stdout + left.stderr
    eventually(lambda: any(one.startswith("distill-") for one in jobs.starts()), "the student's run starts", 60.0)
    (leads,), follows = pair.launch(0, "distill"), pair.launch(1, "follow")[-1]
    run = leads["run"]
    assert len(pair.launch(1, "follow")) == 2, "a cancelled one is followed by another"
    other = pair.go(host="a", spread=True, DRY_RUN="1")
    assert "it goes on" in other.stdout
    cancelled = pair.laptop.cli("cancel", run)
    assert cancelled.returncode == 0, cancelled.stderr
    assert [line.split()[0] for line in cancelled.stdout.splitlines()] == [run, follows["run"]]

    # Over one host alone it goes on nowhere else, and that is said.
    alone = pair.go("--attempt", "next", "--detach", host="a")
    assert alone.returncode == 0, alone.stderr
    refused = pair.go()
    assert refused.returncode == 2
    assert "goes on on a, not over a and b" in refused.stderr
    jobs.open()
    run = pair.launch(0, "distill")[-1]["run"]
    assert pair.laptop.cli("watch", run).returncode == 0

    pair.following = {"exit": 5, "reason": "planted"}
    lost = pair.go("--attempt", "next")
    assert lost.returncode == 5, "the leader passed, the other host did not"
    assert "b: follow     crashed" in lost.stdout


def test_what_cannot_be_one_run_over_two_hosts_is_refused_by_host_with_the_command_that_helps(pair: Pair) -> None:
    def refused(done: Any, code: int, said: str, following: str) -> None:
        assert done.returncode == code, done.stdout + done.stderr
        assert said in done.stderr, done.stderr
        assert following in done.stderr.partition("next: ")[2], done.stderr

    refused(pair.go(host="a,a"), 2, "names a twice", "--host a")
    refused(pair.go(host="a,b,c"), 2, "names 3 hosts, and a run is spread over two at most", "--host a,b")
    refused(pair.go(host="a,local"), 2, "local cannot be one of two hosts", "enrol NAME")
    refused(pair.go(host="a,"), 2, "holds an empty name", "--host A,B")
    refused(pair.go(spread=False), 2, "no stage of tiny is spread over processes", "--set distill.distributed=fsdp2")
    many = pair.go("--set", "distill.processes=9")
    refused(many, 2, "2 hosts x distill.processes = 9 with batch_size = 16", "distill.batch_size = 18")

    file = pair.laptop.places.hosts_file
    whole = file.read_text()

    def with_b(**changes: Any) -> Any:
        """A preview with other values in b's table; None takes one away."""
        head, table = whole.split("[hosts.b]")
        for name, value in changes.items():
            lines = [line for line in table.splitlines() if not line.startswith(f"{name} =")]
            table = "\n".join([*lines[:1], *([] if value is None else [f"{name} = {json.dumps(value)}"]), *lines[1:]])
        file.write_text(f"{head}[hosts.b]{table}\n")
        assert tomllib.loads(file.read_text())
        return pair.go(DRY_RUN="1")

    refused(with_b(link=None), 2, "b has no link", "latentforge dispatch enrol b --link INTERFACE")
    refused(with_b(link=None, hca="mlx5_0"), 2, "hca names the cards of a link, and there is no link", "edit ")
    gone = with_b(link="enp9s0")
    assert gone.returncode == 1
    assert "b has no interface 'enp9s0' (there are: lo, " in gone.stdout
    other = with_b(lock="vllm-cpu")
    assert "a and b have other lock files, cpu " in other.stdout, other.stdout + other.stderr
    file.write_text(whole)
    pair.hosts._far(1, "ip", "link", "set", "cable-b", "down")
    down = pair.go(DRY_RUN="1")
    assert (down.returncode, "cable-b of b is down" in down.stdout) == (1, True), down.stdout
    started = pair.go()
    assert started.returncode == 1
    assert "ip link set cable-b up" in started.stderr


REAL = (
    *("teacher.steps=20", "distill.steps=40", "distill.checkpoint_every=5", "distill.distributed=ddp"),
    'distill.require=["F-DISTILL-SMOKE-001"]',
)


class Line:
    """The user's commands over two hosts that really train, in processes of their own, with what they say in a file."""

    def __init__(self, hosts: Any, laptop: Any, built: Make, eventually: Make, folder: Path) -> None:
        self.hosts, self.eventually, self.copies = hosts, eventually, folder / "copies"
        self.env = {**laptop.env, "EVIDENCE_DIR": str(self.copies), "PYTHONUNBUFFERED": "1"}
        self.out = open(folder / "said", "w+")  # noqa: SIM115  closed by the fixture
        for host in hosts.hosts:  # this interpreter and the code under test, one thread a process
            request = asked("tiny", host, env={}, folder=CHECKOUT)
            built(host, request)
            python = Path(host.root) / "venvs" / BuildNames.of(request).venv / "bin" / "python"
            python.parent.mkdir()
            python.write_text(f'#!/bin/sh\nOMP_NUM_THREADS=1 exec {sys.executable} "$@"\n')
            python.chmod(0o755)

    def command(self, *words: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-P", "-m", "latentforge", "dispatch", *words]
        # A shell's background ignores Ctrl-C, and with it all that is started there.
        noticing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        into: dict[str, Any] = {"stdout": self.out, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(argv, cwd=CHECKOUT, env=self.env, preexec_fn=noticing, **into)

    def go(self, *words: str, over: str = "a,b") -> subprocess.Popen[str]:
        flags = [word for value in REAL for word in ("--set", value)]
        return self.command("go", "tiny", *flags, *words, "--host", over)

    def said(self, command: subprocess.Popen[str], code: int, seconds: float = 400.0) -> str:
        """What a command said to its end, which has this code."""
        try:
            ended = command.wait(seconds)
        finally:
            command.kill()
            self.out.seek(0)
            text = self.out.read()
            self.out.seek(0)
            self.out.truncate()
        assert ended == code, text
        return text

    def reaches(self, pattern: str, command: subprocess.Popen[str]) -> None:
        """Wait for a file of one of the leader's runs, which comes before the command ends."""
        there = f"runs/{pattern}"
        self.eventually(lambda: [*self.hosts.roots[0].glob(there)] or command.poll() is not None, pattern, 400.0)
        if command.poll() is not None:
            raise AssertionError(self.said(command, -1))


@pytest.fixture
def line(two_hosts: Any, laptop: Any, built: Make, eventually: Make, tmp_path: Path) -> Iterator[Line]:
    made = Line(two_hosts, laptop, built, eventually, tmp_path)
    two_hosts.slow(8)
    yield made
    made.out.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.fault(row=46)
def test_a_second_host_that_loses_its_power_ends_the_run_within_the_deadline_and_the_next_attempt_is_as_on_one_host(
    line: Line, two_hosts: Any
) -> None:
    left = line.go()
    line.reaches("teacher-*/events.jsonl", left)
    left.send_signal(signal.SIGINT)
    assert "detached; the run goes on.   back:  latentforge dispatch watch distill-" in line.said(left, 130)
    watch = line.command("watch", "distill-")
    line.reaches("distill-*/out/checkpoints/step-000010", watch)
    assert two_hosts.die(1) >= 4, "sshd, supervisor, run and its process"
    cut = time.monotonic()
    lost = line.said(watch, 5)
    assert time.monotonic() - cut < 60
    assert re.search(r"^a \| error: host b was not heard for [67][.0-9]* s;", lost, re.M), lost
    assert [*two_hosts.roots[0].glob("runs/distill-*/artifacts.json")], "the leader's run ended in order"

    two_hosts.boot(1)
    again = line.said(line.go("--attempt", "next"), 0)
    assert "student resumes from step 1" in again, "of the tenth step, or one that was whole since"
    assert "b: follow     pass" in again
    one = line.said(line.go("--set", "distill.processes=2", over="a"), 0)
    assert "2 processes: " in one

    def student(of: str) -> dict[str, Any]:
        run = re.findall(r"^evidence: .*(distill-\w+)/manifest.json  verified", of, re.M)[-1]
        return load_file(line.copies / run / "out" / "student" / "model.safetensors")

    found, wanted = student(again), student(one)
    assert found.keys() == wanted.keys()
    assert max(float(abs(found[name] - wanted[name]).max()) for name in wanted) <= 1e-6


@pytest.mark.soak
@pytest.mark.timeout(900)
@pytest.mark.fault(row=46)
@pytest.mark.parametrize("what", ["the cable", "the leader's power"])
def test_whatever_of_two_hosts_is_lost_the_other_one_ends_in_order_and_the_command_soon_after_it(
    line: Line, two_hosts: Any, what: str
) -> None:
    go = line.go()
    line.reaches("distill-*/out/checkpoints/step-000005", go)
    if what == "the cable":
        two_hosts.cut_cable()
    else:
        two_hosts.die(0)
    cut = time.monotonic()
    said = line.said(go, 5 if what == "the cable" else 3)
    assert time.monotonic() - cut < 120
    assert re.search(r"^b \| error: host a was not heard for [67][.0-9]* s;", said, re.M), said
    assert [*two_hosts.roots[1].glob("runs/follow-*/artifacts.json")], "the second host's run ended in order"
    if what == "the cable":
        assert re.search(r"^a \| error: host b was not heard for [67][.0-9]* s;", said, re.M), said
        assert "b: follow     crashed" in said
    else:
        assert "a stayed unreachable for" in said
        two_hosts.boot(0)
