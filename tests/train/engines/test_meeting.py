"""The hosts of a run meet, lend each other what is read, and notice in time that one is gone; no process is started."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from latentforge.errors import CrashedError, FailedError, LatentForgeError, RefusedError
from latentforge.events import EventLog
from latentforge.spec.hosts import Hosts, following
from latentforge.spec.identity import RunIdentity
from latentforge.spec.run import LaunchRecord, RunDir
from latentforge.train import checkpoint
from latentforge.train.checkpoint import Position, Retention, newest_checkpoint, save_checkpoint, snapshot
from latentforge.train.engines import rank
from latentforge.train.engines.launching import store_at
from latentforge.train.engines.world import World
from latentforge.train.hosts import wire
from latentforge.train.hosts.meeting import Door, come_to
from latentforge.train.hosts.mirror import Mirror, Reading, lend, read_by
from latentforge.train.hosts.wire import HostLost, Link
from latentforge.train.keeping import Keeper
from latentforge.train.stopping import Interrupted, handled_signals

from ...claims import claims_of, require_claim

DEADLINE = 1.5
LEADER = RunIdentity("distill", {"distill": {"distributed": "ddp", "processes": 1}}, {}, "c" * 64, "l" * 64)


@pytest.fixture(autouse=True)
def _no_lingering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ends are here, and close one after the other."""
    monkeypatch.setattr(wire, "_LINGER_SECONDS", 0.2)


@pytest.fixture
def held() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("falsifier_id", [name for name, _ in claims_of("train.engines.test_meeting")])
def test_the_claim_holds_and_its_control_is_seen_failing(falsifier_id: str) -> None:
    require_claim(falsifier_id)


class Mute(Link):
    """The planted fault: a host that does not beat, so that nothing says that it is there."""

    def _beat(self) -> None:
        """Nothing is told."""


class Deaf(Link):
    """One that beats, and takes nothing of what it is told."""

    def _read(self) -> None:
        """Nothing is read."""


def ends(held: ExitStack, deadline: float = DEADLINE, there: type[Link] = Link) -> tuple[Link, Link]:
    """Both ends of one connection, of which one may be planted."""
    ours, theirs = socket.socketpair()
    found = Link("b", ours, deadline), there("a", theirs, deadline)
    for link in found:
        held.callback(link.close)
    return found


@pytest.mark.fault(row=43)
def test_a_host_that_is_silent_is_lost_within_its_deadline_and_one_that_beats_is_not(
    held: ExitStack,
) -> None:
    here, there = ends(held)
    time.sleep(2 * DEADLINE)
    assert (here.arrived(), there.arrived()) == ([], [])
    there.tell("last", x=1)
    there.tell("part", b"\0" * 7)
    there.close()
    assert [(one.kind, one.fields, len(one.content)) for one in (here.take(), here.take())] == [
        ("last", {"x": 1}, 0),
        ("part", {}, 7),
    ]
    with pytest.raises(HostLost, match="host b closed its connection: its run ended, or was killed"):
        here.take(within=DEADLINE)
    assert not here.silent

    began = time.monotonic()  # its silence counts from when the two met
    here, there = ends(held, there=Mute)
    with pytest.raises(HostLost, match=r"host b was not heard for [0-9.]+ s") as lost:
        here.take()
    assert DEADLINE <= time.monotonic() - began < DEADLINE + 30
    assert here.silent
    assert lost.value.next is not None
    here, there = ends(held, there=Deaf)
    with pytest.raises(HostLost, match=r"host b took nothing for 1\.5 s"):
        list(map(here.tell, ["part"] * 64, [bytes(1 << 20)] * 64))


class Stopping:
    """A connection in the middle of whose every message this process is told to stop."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)

    def sendall(self, content: bytes) -> None:
        self._connection.sendall(content[:7])
        os.kill(os.getpid(), signal.SIGTERM)
        self._connection.sendall(content[7:])


def test_a_stop_in_the_middle_of_a_message_comes_after_it(held: ExitStack) -> None:
    here, there = ends(held, 30.0)
    with handled_signals():
        here._connection, kept = Stopping(here._connection), here._connection  # type: ignore[assignment]
        with pytest.raises(Interrupted, match="interrupted by SIGTERM"):
            here.tell("file", path="x")
        here._connection = kept
    here.tell("end", code=3)
    assert [(one.kind, one.fields) for one in (there.take(), there.take())] == [
        ("file", {"path": "x"}),
        ("end", {"code": 3}),
    ]


def test_processes_meet_at_their_address_alone_and_none_begins_whose_parent_is_gone() -> None:
    store = store_at("127.0.0.1")
    dist.TCPStore("127.0.0.1", store.port, is_master=False).set("there", "1")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", store.port))
    process = [sys.executable, "-m", "latentforge.train.engines.rank", "nothing:at_all", "{}", "1", "1"]
    done = subprocess.run([*process, str(os.getpid() + 1)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGKILL, "", "")


def test_a_process_that_never_comes_is_missed_in_minutes_and_one_that_writes_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    store = store_at("127.0.0.1")
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "RANK": "0", "LOCAL_RANK": "0"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    assert timedelta(minutes=1) < rank._JOINING <= timedelta(minutes=10)
    monkeypatch.setattr(rank, "_JOINING", timedelta(seconds=1))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(dist.DistStoreError, match="timeout"):
        rank.join()
    monkeypatch.setenv("WORLD_SIZE", "1")
    rank.join()
    try:
        assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == timedelta(hours=2)
    finally:
        dist.destroy_process_group()


def test_only_the_disk_that_is_written_to_has_to_have_room(tmp_path: Path) -> None:
    keeper = Keeper.__new__(Keeper)
    keeper.run, keeper.floor, keeper._size = RunDir(tmp_path / LEADER.run_id), 1 << 60, 0
    keeper.run.path.mkdir()
    for number, lacks in ((0, True), (1, False)):
        keeper._world = World(number, 2, 1)
        assert keeper._lacks_room() is lacks


def log_of(folder: Path) -> EventLog:
    return EventLog(folder / "events.jsonl", folder.name, text=io.StringIO())


def world(index: int = 0, **changed: Any) -> Hosts:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    known = {"hosts": ["a", "b"], "index": index, "address": "127.0.0.1", "port": port, "interface": "lo"}
    return Hosts.model_validate({**known, "deadline_seconds": DEADLINE, "wait_seconds": 1.5, **changed})


def at(leader: Hosts, **changed: Any) -> Hosts:
    """The other host's view of it."""
    return leader.model_copy(update={"index": 1, **changed})


@pytest.mark.fault(row=45)
def test_who_comes_is_let_in_once_and_only_with_the_same_run_and_code(held: ExitStack, tmp_path: Path) -> None:
    hosts, log = world(), log_of(tmp_path)
    door = Door(LEADER, hosts)
    held.callback(door.close, 0, "", None)
    began = time.monotonic()
    with pytest.raises(CrashedError, match=rf"host b did not come to 127\.0\.0\.1:{hosts.port} within 1\.5 s"):
        door.gather(log)
    assert time.monotonic() - began < 30
    # A stranger of another run waits in vain, and one that says nothing holds nobody up.
    held.enter_context(socket.create_connection(("127.0.0.1", hosts.port)))
    with pytest.raises(CrashedError, match="leads another run than distill-"):
        come_to(following(LEADER.at_attempt(2), 1), at(hosts), log)
    own = following(LEADER, 1)
    # One that names other hosts is sent away, and ends nothing but itself; what is no message leaves nothing behind.
    with pytest.raises(RefusedError, match="has come to another run's hosts"):
        come_to(own, at(hosts, hosts=["a", "x"]), log)
    for said in (
        b"[" * 100_000,
        json.dumps(["hello", [1, 2]]).encode(),
        json.dumps(["hello", {"follows": 1}]).encode(),
    ):
        stranger = held.enter_context(socket.create_connection(("127.0.0.1", hosts.port)))
        stranger.sendall(wire._HEAD.pack(wire._MAGIC, len(said), 0) + said)
        stranger.settimeout(10)
        with suppress(ConnectionResetError):
            while stranger.recv(1 << 16):  # until the leader closes its end
                pass
    link = come_to(own, at(hosts), log)
    with pytest.raises(CrashedError, match="a process of host b is here already"):
        come_to(own, at(hosts), log)
    link.close()
    # Begun again it is let in again.
    again = come_to(own, at(hosts, wait_seconds=30.0), log)
    held.callback(again.close)
    (came,) = door.gather(log)
    assert (came.index, came.link.peer, came.told["code"], came.told["interface"]) == (1, "b", LEADER.code, "lo")
    assert door.address == ("127.0.0.1", hosts.port)  # and no other one
    # The planted fault: a follower of other code. Both end, and neither waits for the other.
    with pytest.raises(RefusedError, match="host b runs code dddddddddddd…, and a cccccccccccc…") as refused:
        come_to(replace(own, code="d" * 64), at(hosts), log)
    assert refused.value.next is not None
    with pytest.raises(RefusedError, match="host b runs code dddddddddddd…"):
        door.gather(log)
    door.close(2, "it was refused", "next")
    end = again.take(within=10)
    assert (end.kind, end.fields) == ("end", {"code": 2, "reason": "it was refused", "next": "next"})


def test_a_place_that_is_none_is_refused_with_what_there_is(held: ExitStack, tmp_path: Path) -> None:
    hosts = world()
    with pytest.raises(RefusedError, match=r"the link of host a is to be 'nolink0', and it has .*lo"):
        Door(LEADER, hosts.model_copy(update={"interface": "nolink0"}))
    with pytest.raises(FailedError, match=r"192\.0\.2\.7:[0-9]+: no interface of host a has this address now"):
        Door(LEADER, hosts.model_copy(update={"address": "192.0.2.7"}))
    held.callback(Door(LEADER, hosts).close, 0, "", None)
    with pytest.raises(FailedError, match="another process listens there"):
        Door(LEADER, hosts)
    log, nowhere = log_of(tmp_path), at(world())
    with pytest.raises(
        CrashedError, match=r"host a did not let this one in .* within 1\.5 s: it does not listen there"
    ):
        come_to(following(LEADER, 1), nowhere, log)


def leading_run(root: Path) -> RunDir:
    """A run with an input that is a run, one that is a folder elsewhere, and a predecessor without checkpoints."""
    data = RunDir(root / "runs" / ("data-" + "1" * 20))
    (data.out / "deep").mkdir(parents=True)
    (data.out / "train.bin").write_bytes(os.urandom(3 << 20))
    (data.out / "deep" / "index.json").write_text("{}")
    (data.checkpoints / "step-000001").mkdir(parents=True)
    (data.checkpoints / "step-000001" / "big").write_bytes(b"stays")
    data.identity_file.write_text("{}")
    model = root / "models" / "tiny"
    model.mkdir(parents=True)
    (model / "weights").write_bytes(b"w" * 1000)
    resolved = {"data": {"run": data.run}, "teacher": {"path": str(model), "sha256": "e" * 64}}
    before = RunDir.create(root / "runs", LEADER, LaunchRecord(LEADER.run_id, "", {}))
    before.events_file.write_text('{"seq": 0}\n')
    identity = LEADER.at_attempt(2)
    return RunDir.create(
        root / "runs", identity, LaunchRecord(identity.run_id, "", resolved, predecessor=before.run, env={"X": "1"})
    )


def mirrored(held: ExitStack, source: Reading, own: RunDir) -> tuple[Mirror, list[str]]:
    """Mirror over a connection; what moved. What the receiver raises is raised."""
    here, there = ends(held, 30.0)
    reading, mirror = Reading.of_json(source.as_json()), Mirror(own)
    lacking = mirror.lacking(reading, lambda done, total: None)
    mirror.require_room(lacking)
    sender = threading.Thread(target=lend, args=(here, lacking, lambda done, total: None))
    sender.start()
    try:
        mirror.receive(there, lacking, lambda done, total: None)
    finally:
        sender.join()
    return mirror, [one.path for one in lacking]


def test_of_checkpoints_those_are_lent_that_a_resume_looks_at_and_none_is_loaded_to_know_of_it(
    held: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = leading_run(tmp_path / "a")
    before = run.predecessor()
    assert before is not None
    monkeypatch.setattr(checkpoint, "load_file", lambda path: pytest.fail(f"{path} was loaded"))
    steps = {(run, ""): (2, 4, 6, 8), (run, "best"): (2, 4, 6, 8), (before, ""): (2, 4), (before, "twin"): (2, 4)}
    for (of, below), each in steps.items():
        for step in each:
            place = Position("0" * 64, seed=7, batch_size=4)
            taken = snapshot(below or "student", step, [("a", torch.full((64,), float(step)))], [], place)
            save_checkpoint(of.checkpoints / below, taken, start={}, retention=Retention(newest=9))
    torn = run.checkpoints / "step-000008" / "model.safetensors"
    torn.write_bytes(torn.read_bytes()[:-1] + b"~")
    reading = read_by(run)
    lent = {str(Path(one.path).parent) for one in reading.files if "/step-" in one.path}
    # The newest is torn, so the one before it is gone on from; the best of its own step may be measured again.
    wanted = {(run, "step-000008"), (run, "step-000006"), (run, "best/step-000006"), (run, "best/step-000004")}
    wanted |= {(before, "twin/step-000004")}
    assert lent == {f"runs/{of.run}/out/checkpoints/{name}" for of, name in wanted}
    monkeypatch.undo()
    own = following(run.load_identity(), 1)
    mirror, _ = mirrored(held, reading, RunDir.create(tmp_path / "b" / "runs", own, LaunchRecord(own.run_id, "", {})))
    for there in (run, mirror.leader(reading, run.run)):
        found, said = newest_checkpoint(there.checkpoints)
        best, _ = newest_checkpoint(there.checkpoints / "best", until=5)
        assert found is not None
        assert best is not None
        assert (found.step, len(said), best.step) == (6, 1, 4)


@pytest.mark.parametrize("name", ["/etc/passwd", "runs/../../x", "elsewhere/x", "content/x/f.partial-mirror"])
def test_a_file_that_would_lie_outside_of_the_mirror_or_where_another_is_received_is_refused(name: str) -> None:
    told = {"identity": "", "launch": {}, "files": [{"path": name, "bytes": 1, "sha256": "a" * 64, "lies": "/x"}]}
    with pytest.raises(RefusedError, match="lies outside of what a run reads"):
        Reading.of_json(told)


@pytest.mark.fault(row=44)
def test_what_a_run_reads_is_mirrored_by_digest_once_and_no_flipped_byte_is_believed(
    held: ExitStack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, runs = leading_run(tmp_path / "a"), tmp_path / "b" / "runs"
    identity = run.load_identity()
    first = RunDir.create(runs, following(identity, 1), LaunchRecord(following(identity, 1).run_id, "", {}))
    reading = read_by(run)
    # The planted fault: one byte of a file is another one when it is sent.
    shard = run.path.parent / ("data-" + "1" * 20) / "out" / "train.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(FailedError, match=r"out/train\.bin came with sha256 .* on the leader"):
        mirrored(held, reading, first)
    assert not list(first.path.rglob("train.bin*"))
    shard.write_bytes(whole)
    # What came whole before stays, the rest comes.
    mirror, moved = mirrored(held, reading, first)
    assert moved[0].endswith("out/train.bin")
    assert len(moved) < len(reading.files)
    leader = mirror.leader(reading, run.run)
    assert leader.load_identity() == identity
    assert (leader.input_path("data") / "train.bin").read_bytes() == whole
    assert (leader.input_path("data") / "deep" / "index.json").read_text() == "{}"
    assert not (leader.input_path("data") / "checkpoints").exists()
    assert (leader.input_path("teacher") / "weights").read_bytes() == b"w" * 1000
    before = leader.predecessor()
    assert before is not None
    assert before.load_identity() == LEADER
    assert before.events_file.read_bytes() == b'{"seq": 0}\n'
    # Another run of that host links what is there; a file that was changed meanwhile, or is new there, is neither.
    second = RunDir.create(runs, following(identity.at_attempt(3), 1), LaunchRecord("", "", {}))
    (second.path / "mirror" / "runs" / run.run / "out").mkdir(parents=True)
    (second.path / "mirror" / "runs" / run.run / "out" / "stale").write_text("of another start")
    index = first.path / "mirror" / "runs" / ("data-" + "1" * 20) / "out" / "deep" / "index.json"
    index.write_text("[]")
    mirror, moved = mirrored(held, reading, second)
    assert [Path(one).name for one in moved] == ["index.json"]
    assert not list(second.path.rglob("stale"))
    found = [one.path / "mirror" / "runs" / shard.parent.parent.name / "out" / "train.bin" for one in (first, second)]
    assert found[0].samefile(found[1])
    # Where there is no room it is refused before anything is sent; a name that leads out never is taken.
    shutil.rmtree(first.path / "mirror")
    shutil.rmtree(second.path / "mirror")
    room = os.statvfs(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*room[:4], 1, *room[5:])))
    with pytest.raises(RefusedError, match="0 MiB are free for what the run reads: 3 are to be mirrored"):
        mirrored(held, reading, first)
    evil = replace(reading.files[0], path="runs/../../x")
    with pytest.raises(RefusedError, match="lies outside of what a run reads"):
        Reading.of_json(replace(reading, files=[evil]).as_json())
    with pytest.raises(LatentForgeError, match="was altered"):
        mirror.leader(replace(reading, identity=reading.identity.replace("ddp", "zzz")), run.run)
