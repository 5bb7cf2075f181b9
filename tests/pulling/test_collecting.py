"""Bringing a run home: it goes on where it was cut, sees what was altered on either side, and overwrites nothing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dispatch.agent import journal
from dispatch.collect import CHUNK, collect
from dispatch.hosts.inventory import Host
from dispatch.pulling.tidy import tidying
from dispatch.transport.call import Reply
from dispatch.transport.link import LinkLostError
from dispatch.transport.local import LocalTransport
from latentforge.errors import FailedError, UnknownOutcomeError
from latentforge.evidence.digests import file_sha256

Make = Callable[..., Any]
SIZE = CHUNK * 2 + 1000


class Cuttable(LocalTransport):
    """A link to a host that breaks when it is told to."""

    def __init__(self, root: Path) -> None:
        super().__init__(Host(name="local", root=str(root)))
        self.allowed: int | None = None
        self.came: list[tuple[str, int]] = []

    def call(self, verb: str, args: dict[str, Any], payload: bytes = b"", **more: Any) -> Reply:
        if verb == "fetch":
            if self.allowed is not None and self.allowed <= 0:
                raise LinkLostError("local: the connection broke (cut by the test)")
            self.allowed = None if self.allowed is None else self.allowed - 1
            reply = super().call(verb, args, payload, **more)
            self.came.append((str(args["path"]), int(args.get("offset", 0))))
            return reply
        return super().call(verb, args, payload, **more)


@pytest.fixture
def finished(host: Any) -> str:
    """A run that left some files, a large one among them."""
    program = f"open('out/weights', 'wb').write(bytes(range(250)) * ({SIZE} // 250)); print('step 1')"
    return str(host.ran(program, kind="distill")["run"])


@pytest.fixture
def link(host: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuttable]:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    made = Cuttable(host.dir)
    yield made
    made.close()


def test_a_cut_collection_goes_on_at_the_byte_where_it_was(
    host: Any, finished: str, link: Cuttable, laptop: Any
) -> None:
    """D38: what is cited is listed with its digest, and comes home or is missed."""
    link.allowed = 5  # three small files, and two pieces of the weights
    with pytest.raises((LinkLostError, UnknownOutcomeError)):
        collect(link, finished, laptop.places)
    folder = laptop.places.run(finished)
    assert not (folder / "out" / "weights").exists(), "no half file under its name"
    assert not (folder / "exit.json").exists()
    before, link.allowed = list(link.came), None
    link.came.clear()
    done = collect(link, finished, laptop.places)
    assert not {one for one in link.came if one in before}, "no piece came twice"
    assert ("out/weights", 0) in before
    assert min(offset for path, offset in link.came if path == "out/weights") == 2 * CHUNK
    listed = json.loads((folder / "artifacts.json").read_bytes())["files"]
    assert {file["path"] for file in listed} >= {"out/weights", "launch.log", "identity.json", "launch.json"}
    assert all(file_sha256(folder / file["path"]) == file["sha256"] for file in listed)
    assert not list(folder.rglob(".*.part"))
    link.came.clear()
    assert collect(link, finished, laptop.places).fetched == 0
    assert link.came == []
    assert done.files == len(listed)


@pytest.mark.parametrize("name", ["out/weights", "launch.log"])
def test_a_file_that_was_altered_on_the_host_after_the_run_is_not_believed(
    host: Any, finished: str, link: Cuttable, laptop: Any, name: str
) -> None:
    path = host.paths(finished).dir / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FailedError, match=f"{name} of {finished} has sha256 .* it was changed on local"):
        collect(link, finished, laptop.places)
    folder = laptop.places.run(finished)
    assert not (folder / name).exists()
    assert not (folder / "exit.json").exists(), "a copy that is not whole has no end"
    assert not list(folder.rglob(".*.part"))


def test_an_inventory_that_was_altered_on_the_host_is_not_believed(
    host: Any, finished: str, link: Cuttable, laptop: Any
) -> None:
    listed = json.loads(host.paths(finished).artifacts.read_bytes())
    listed["files"] = [one for one in listed["files"] if one["path"] != "launch.log"]
    host.paths(finished).artifacts.write_text(json.dumps(listed))
    with pytest.raises(Exception, match="its exit record says"):
        collect(link, finished, laptop.places)


@pytest.mark.parametrize("name", ["out/weights", "exit.json", "artifacts.json"])
def test_evidence_that_was_altered_here_is_told_and_never_overwritten(
    host: Any, finished: str, link: Cuttable, laptop: Any, name: str
) -> None:
    """D39: an evidence folder that a later attempt wrote over."""
    collect(link, finished, laptop.places)
    path = laptop.places.run(finished) / name
    path.write_bytes(b"mine")
    with pytest.raises(FailedError, match="was changed here after it was collected, and is not overwritten"):
        collect(link, finished, laptop.places)
    assert path.read_bytes() == b"mine"


def test_a_later_attempt_is_collected_into_a_folder_of_its_own(
    host: Any, finished: str, link: Cuttable, laptop: Any, snapshot: Make
) -> None:
    """D39: each attempt has an id, each id a folder."""
    collect(link, finished, laptop.places)
    before = snapshot(laptop.places.run(finished).absolute())
    again = host.ran("open('out/weights', 'wb').write(b'other')", kind="distill", predecessor=finished)["run"]
    collect(link, again, laptop.places)
    assert laptop.places.run(again) != laptop.places.run(finished)
    assert snapshot(laptop.places.run(finished).absolute()) == before


def test_a_name_of_the_hosts_that_leads_out_of_the_folder_is_refused(
    host: Any, finished: str, link: Cuttable, laptop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = link.call

    def lying(verb: str, args: dict[str, Any], payload: bytes = b"", **more: Any) -> Reply:
        reply = whole(verb, args, payload, **more)
        if verb == "collect":
            reply.result["files"][0]["path"] = "../../outside"
        return reply

    monkeypatch.setattr(link, "call", lying)
    with pytest.raises(FailedError, match="outside the run's folder"):
        collect(link, finished, laptop.places)
    assert not os.path.lexists(laptop.cwd / "outside")


def test_files_that_are_in_no_inventory_are_left_alone_and_a_product_may_be_called_like_a_part(
    host: Any, link: Cuttable, laptop: Any
) -> None:
    long = "n" * 255
    program = f"open('out/.model.part', 'w').write('mine'); open('out/{long}', 'w').write('long')"
    run = host.ran(program, kind="distill")["run"]
    folder = laptop.places.run(run)
    (folder / "out").mkdir(parents=True)
    (folder / "out" / ".notes.part").write_text("a user's own")
    (folder / "out" / f".lf-{'0' * 32}.part").write_text("of bytes that the host had once")
    done = collect(link, run, laptop.places)
    assert (folder / "out" / ".model.part").read_text() == "mine"
    assert (folder / "out" / long).read_text() == "long"
    assert (folder / "out" / ".notes.part").read_text() == "a user's own"
    assert not list(folder.rglob(".lf-*"))
    assert done.left == ()


def test_a_beginning_that_was_damaged_here_is_fetched_again_by_the_same_command(
    finished: str, link: Cuttable, laptop: Any
) -> None:
    link.allowed = 5
    with pytest.raises((LinkLostError, UnknownOutcomeError)):
        collect(link, finished, laptop.places)
    link.allowed = None
    (part,) = laptop.places.run(finished).rglob(".lf-*.part")
    with open(part, "r+b") as stream:
        stream.write(b"other bytes")
    collect(link, finished, laptop.places)
    assert (laptop.places.run(finished) / "exit.json").is_file()


def test_what_cannot_be_copied_is_told_with_its_reason(host: Any, link: Cuttable, laptop: Any) -> None:
    run = host.ran("import os; os.symlink('w', 'out/latest')", kind="distill")["run"]
    done = collect(link, run, laptop.places)
    assert done.told == "; 1 stay on the host: out/latest (a symbolic link)"


@pytest.mark.parametrize(
    ("state", "told"), [("absent", "never was, or was cleaned up"), ("lost", "nothing vouches for what it left")]
)
def test_a_run_that_has_nothing_to_collect_says_why(
    host: Any, link: Cuttable, laptop: Any, state: str, told: str
) -> None:
    run = host.python("pass")
    if state == "absent":
        shutil.rmtree(host.paths(run).dir)
    else:
        journal.record(host.paths(run), "started", pid=1, ticks=0, argv=["x"])
    with pytest.raises(Exception, match=told):
        collect(link, run, laptop.places)


def test_gc_reads_a_copy_again_before_the_hosts_own_goes(host: Any, finished: str, link: Cuttable, laptop: Any) -> None:
    collect(link, finished, laptop.places)
    copy = laptop.places.run(finished) / "out" / "weights"
    content = copy.read_bytes()
    work = tidying(laptop.places, keep=0, uncollected=False, apply=True, again=lambda _: "")
    copy.write_bytes(b"x" + content[1:])  # as long as it was
    spoilt = work(link.host)
    assert [one["name"] for one in spoilt.skipped] == [finished]
    assert "is not what was collected" in spoilt.lines()
    assert host.state(finished)["state"] == "finished"
    copy.write_bytes(content)
    assert finished in [one["name"] for one in work(link.host).removed]
    assert host.state(finished)["state"] == "absent"
