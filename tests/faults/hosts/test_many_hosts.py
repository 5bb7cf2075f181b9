"""Eight hosts at once, one of them dead and one slow: the others finish, and the results are whole."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.hosts.inventory import Host
from dispatch.lanes.each import HostResult, each, results_json, results_table, worst_code
from dispatch.transport.open import open_transport
from dispatch.transport.retry import call
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]
pytestmark = pytest.mark.sshd


@pytest.mark.fault(row=37)
def test_a_dead_and_a_slow_host_hold_up_none_of_six_others_and_every_result_is_a_value(
    sshd_at: Make, enrolled: Make, laptop: Any, tmp_path: Path
) -> None:
    gate, slow_python = tmp_path / "gate", tmp_path / "slow-python"
    slow_python.write_text(f'#!/bin/sh\nwhile [ ! -e "{gate}" ]; do sleep 0.05; done\nexec "{sys.executable}" "$@"\n')
    slow_python.chmod(0o755)
    servers = [sshd_at() for _ in range(8)]
    hosts = [enrolled(server, f"h{number}", tmp_path / f"h{number}") for number, server in enumerate(servers)]
    hosts[5] = hosts[5].model_copy(update={"python": str(slow_python)})
    servers[2].stop()
    ended: list[str] = []

    def probe(host: Host) -> str:
        transport = open_transport(host, laptop.places, readonly=True)
        try:
            return str(call(transport, "probe", {}).result["root"])
        finally:
            transport.close()

    def tell(result: HostResult[str]) -> None:
        ended.append(result.host)
        if len(ended) == 7:
            gate.touch()  # the slow one answers only after all others have been told

    results = each(hosts, probe, tell=tell)
    assert list(results) == [host.name for host in hosts]
    assert ended[-1] == "h5"
    assert {name: one.value for name, one in results.items() if name != "h2"} == {
        host.name: str(tmp_path / host.name) for host in hosts if host.name != "h2"
    }
    assert results["h2"].error is not None
    assert f"nothing listens on port {servers[2].port}" in str(results["h2"].error)
    assert worst_code(results) is ExitCode.TRANSPORT
    told = results_json(results, str)
    assert told["code"] == 6
    assert [name for name, one in told["hosts"].items() if one["code"] != 0] == ["h2"]
    table = results_table(results, str)
    assert len([line for line in table if line.startswith("h")]) == 8


@pytest.mark.fault(row=37)
def test_the_command_keys_its_results_by_host_and_ends_with_the_worst_code(
    sshd_at: Make, shared_sshd: Any, enrolled: Make, laptop: Any, jobs: Any, ask: Make, session: Make, built: Make
) -> None:
    host = enrolled(shared_sshd, "fine")
    server = sshd_at()
    enrolled(server, "dead")
    server.stop()
    built(host, ask(host))
    assert session(host).go(ask(host)) is ExitCode.PASS
    run = jobs.starts()[-1]
    done = laptop.cli("status", "--each", "fine,dead", "--json")
    told = json.loads(done.stdout)
    assert done.returncode == told["code"] == 6
    assert told["hosts"]["fine"]["value"][run]["outcome"] == "pass"
    assert "nothing listens" in told["hosts"]["dead"]["error"]
    done = laptop.cli("collect", "--each", "dead,fine", EVIDENCE_DIR="copies")
    assert done.returncode == 6
    assert done.stdout.splitlines()[0].startswith("dead  error: ")
    assert run in done.stdout
    assert (laptop.cwd / "copies" / run / "artifacts.json").is_file()
    alone = laptop.cli("status", "--each", "fine")
    assert alone.returncode == 0, alone.stderr


@pytest.mark.fault(row=37)
def test_a_bug_on_one_host_is_told_as_that_and_hides_no_other() -> None:
    def work(host: Host) -> str:
        if host.name == "b":
            raise ZeroDivisionError("planted")
        return "done"

    results = each([Host(name=name) for name in "abc"], work)
    assert [results[name].value for name in "abc"] == ["done", None, "done"]
    assert "unexpected ZeroDivisionError: planted" in str(results["b"].error)
    assert worst_code(results) is ExitCode.CRASHED


@pytest.mark.fault(row=37)
def test_a_build_on_each_host_says_what_it_would_do_and_changes_nothing_in_a_dry_run(
    shared_sshd: Any, enrolled: Make, laptop: Any, tmp_path: Path, checkout: Path
) -> None:
    for name in ("a", "b"):
        enrolled(shared_sshd, name, tmp_path / name)
    done: subprocess.CompletedProcess[str] = laptop.cli("build", "--each", "a,b", "--json", cwd=checkout, DRY_RUN="1")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["hosts"]
    assert {one["value"]["will"] for one in told.values()} == {"run"}
    assert not list((tmp_path / "a").glob("builds/*"))
