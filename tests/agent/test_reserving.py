"""Reservations: whole or not at all, and never over a run that started."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from .conftest import AgentHost, Refusal, identity_of


def _reserve(host: AgentHost, run: str, identity: str, /, **launch: Any) -> dict[str, Any]:
    described = {**host.launch_of(run, ["/bin/true"]), **launch}
    return host.call("reserve", run=run, identity=identity, launch=described)


def test_a_reservation_appears_whole(host: AgentHost) -> None:
    run, identity = identity_of("data")
    answer = _reserve(host, run, identity)
    paths = host.paths(run)
    assert answer["created"] is True
    assert answer["state"]["state"] == "reserved"
    assert paths.identity.read_text() == identity
    assert json.loads(paths.launch.read_text())["argv"] == ["/bin/true"]
    assert sorted(os.listdir(paths.dir)) == ["beat.rec", "exit.rec", "identity.json", "launch.json", "lock", "out"]
    assert paths.dir.stat().st_mode & 0o777 == 0o700


def test_the_same_reservation_again_changes_nothing(host: AgentHost) -> None:
    run, identity = identity_of("data")
    _reserve(host, run, identity)
    inode = host.paths(run).launch.stat().st_ino
    assert _reserve(host, run, identity)["created"] is False
    assert host.paths(run).launch.stat().st_ino == inode


def test_a_run_that_has_not_started_takes_a_new_launch_description(host: AgentHost) -> None:
    run, identity = identity_of("data")
    _reserve(host, run, identity)
    _reserve(host, run, identity, argv=["/bin/false"])
    assert json.loads(host.paths(run).launch.read_text())["argv"] == ["/bin/false"]


def test_a_run_that_started_keeps_the_launch_description_it_ran_with(host: AgentHost) -> None:
    run, identity = identity_of("data")
    _reserve(host, run, identity)
    host.call("launch", chain=[run])
    host.wait(run, "finished")
    _reserve(host, run, identity, argv=["/bin/false"])
    assert json.loads(host.paths(run).launch.read_text())["argv"] == ["/bin/true"]


def test_an_identity_that_does_not_hash_to_the_run_id_is_refused(host: AgentHost) -> None:
    run, identity = identity_of("data")
    with pytest.raises(Refusal, match="another run's id"):
        _reserve(host, run, identity + " ")
    other, of_another_kind = identity_of("teacher")
    renamed = other.replace("teacher", "data")
    with pytest.raises(Refusal, match="kind='data'"):
        _reserve(host, renamed, of_another_kind)
    assert not host.dir.exists()


@pytest.mark.parametrize(
    ("launch", "told"),
    [
        ({"argv": []}, "argv="),
        ({"argv": "true"}, "argv='true'"),
        ({"argv": [""]}, "argv="),
        ({"argv": ["/bin/true", 3]}, "argv="),
        ({"argv": ["/bin/true", "a\0b"]}, "NUL"),
        ({"argv": ["/bin/true", "x" * 200_000]}, "longer than"),
        ({"env": {"A": "a\0b"}}, "NUL"),
        ({"env": {"A=B": "c"}}, "'A=B'"),
        ({"env": {"A": 1}}, "env="),
        ({"lease": ["gpu"]}, "lease="),
        ({"run": "data-" + "0" * 20}, "names run="),
    ],
)
def test_a_launch_that_could_not_be_executed_as_written_is_refused(
    host: AgentHost, launch: dict[str, Any], told: str
) -> None:
    run, identity = identity_of("data")
    with pytest.raises(Refusal, match=told) as refusal:
        _reserve(host, run, identity, **launch)
    assert refusal.value.code == 2
    assert not host.dir.exists()


def test_what_a_dying_agent_left_half_made_is_swept_by_the_next(host: AgentHost) -> None:
    _reserve(host, *identity_of("data"))
    (host.root.runs / ".reserving-data-x").mkdir()
    (host.root.runs / ".removing-data-x").mkdir()
    _reserve(host, *identity_of("data"))
    assert not [name for name in os.listdir(host.root.runs) if name.startswith(".")]


def test_a_root_that_others_may_write_into_is_refused(host: AgentHost) -> None:
    host.dir.mkdir()
    host.dir.chmod(0o777)
    with pytest.raises(Refusal, match="0777") as refusal:
        _reserve(host, *identity_of("data"))
    assert refusal.value.next is not None
    assert "chmod" in refusal.value.next
    assert os.listdir(host.dir) == []


def test_a_folder_of_the_root_that_others_may_write_into_is_refused(host: AgentHost, tmp_path: Path) -> None:
    host.call("install")
    host.root.locks.rmdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere").chmod(0o770)
    host.root.locks.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(Refusal, match="0770") as refusal:
        _reserve(host, *identity_of("data"))
    assert refusal.value.next == f"on the host: chmod 700 {host.root.locks}"
    assert os.listdir(host.root.runs) == []


def test_a_root_that_cannot_be_made_is_refused(host: AgentHost, tmp_path: Path) -> None:
    host.dir.write_text("a file")
    with pytest.raises(Refusal, match="state root"):
        _reserve(host, *identity_of("data"))


def test_many_racing_reservations_make_one_run(host: AgentHost) -> None:
    run, identity = identity_of("data")
    args = {"run": run, "identity": identity, "launch": host.launch_of(run, ["/bin/true"])}
    answers = [host.finish(process) for process in [host.start("reserve", args) for _ in range(10)]]
    assert sum(answer.document["result"]["created"] for answer in answers) == 1
    assert os.listdir(host.root.runs) == [run]
