"""A folder of the laptop over a real SSH server: by rsync where both ends have it, else in pieces; the same model."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dispatch.hosts.inventory import Host, Inventory
from dispatch.pulling import folder as sending
from dispatch.pulling.command import Wanted, pull_here
from dispatch.pulling.listing import Listing
from dispatch.pulling.refs import parse_ref
from latentforge.evidence.digests import tree_sha256
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]
pytestmark = pytest.mark.sshd


@pytest.fixture
def weights(laptop: Any, model: Make) -> Path:
    folder = laptop.cwd / "weights"
    for name, content in model().items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return Path(folder)


def pulled(laptop: Any, host: Any, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    wanted = Wanted.of("./weights", "mine")
    code = pull_here(host, wanted, laptop.places, os.environ, dry_run=False, as_json=True)
    assert code is ExitCode.PASS
    told = capsys.readouterr()
    return json.loads(told.out), told.err


def test_a_folder_goes_by_rsync_and_is_read_again_on_the_host(
    shared_sshd: Any,
    enrolled: Make,
    laptop: Any,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if shutil.which("rsync") is None:
        pytest.skip("no rsync on this machine")
    monkeypatch.setattr("dispatch.pulling.pull.MARGIN", 1 << 20)
    host = enrolled(shared_sshd)
    done, told = pulled(laptop, host, capsys)
    assert "sent 6 files by rsync" in told
    assert tree_sha256(done["path"]) == done["sha256"] == tree_sha256(weights)
    place = Path(done["path"]).parent
    assert sorted(path.name for path in place.iterdir()) == [".complete.json", "files"]
    assert done["moved"] == 0, "its pull found every file in place, and read it"


def test_rsync_that_does_not_trust_the_host_sends_nothing_and_pieces_go_over_the_pinned_key(
    shared_sshd: Any,
    enrolled: Make,
    laptop: Any,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if shutil.which("rsync") is None:
        pytest.skip("no rsync on this machine")
    monkeypatch.setattr("dispatch.pulling.pull.MARGIN", 1 << 20)
    host = enrolled(shared_sshd)
    whole = sending._ssh
    empty = laptop.home / "no_keys"
    empty.write_text("")

    def distrusting(one: Any, places: Any) -> list[str]:
        return [f"UserKnownHostsFile={empty}" if w.startswith("UserKnownHostsFile=") else w for w in whole(one, places)]

    monkeypatch.setattr(sending, "_ssh", distrusting)
    done, told = pulled(laptop, host, capsys)
    # 255 is ssh's status; where rsync saw the closed pipe before ssh's end, it is rsync's own 12.
    assert re.search(r"rsync did not come to its end \(status (255|12): No \w+ host key is known for box", told), told
    assert "sending model.safetensors, 0.3 MB in 1 pieces" in told
    assert tree_sha256(done["path"]) == done["sha256"] == tree_sha256(weights)


def test_without_rsync_only_the_pieces_that_are_missing_are_sent(
    shared_sshd: Any,
    enrolled: Make,
    laptop: Any,
    weights: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dispatch.pulling.pull.MARGIN", 1 << 20)
    monkeypatch.setattr(sending, "PIECE", 100_000)
    monkeypatch.setattr(sending.shutil, "which", lambda _: None)
    sent: list[str] = []
    whole = sending.send

    def cut_at_third(transport: Any, sha256: str, content: bytes) -> int:
        if len(sent) == 3:
            raise KeyboardInterrupt
        sent.append(sha256)
        return whole(transport, sha256, content)

    host = enrolled(shared_sshd)
    monkeypatch.setattr(sending, "send", cut_at_third)
    wanted = Wanted.of("./weights", "mine")
    code = pull_here(host, wanted, laptop.places, os.environ, dry_run=False, as_json=False)
    assert code is ExitCode.DETACHED
    assert "stopped before the pull was launched" in capsys.readouterr().out
    again: list[str] = []

    def counted(transport: Any, sha256: str, content: bytes) -> int:
        again.append(sha256)
        return whole(transport, sha256, content)

    monkeypatch.setattr(sending, "send", counted)
    done, _told = pulled(laptop, host, capsys)
    assert tree_sha256(done["path"]) == done["sha256"] == tree_sha256(weights)
    assert not set(sent) & set(again), "what had arrived did not go again"
    cas = Path(str(Inventory.load(laptop.places).get("box").root)) / "cas"
    assert len(list(cas.iterdir())) == 2, "the program and the list; the pieces are gone again"


@pytest.mark.parametrize("name", ["-e evil", "box:models"])
def test_a_folder_whose_name_reads_as_an_option_or_a_host_goes_to_rsync_as_a_path(
    laptop: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    ran: list[list[str]] = []

    def run(argv: list[str], **_: Any) -> Any:
        ran.append(argv)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(sending.subprocess, "run", run)
    source, ref = sending.LocalFolder(Path(f"./{name}"), "m"), parse_ref(f"m@{'0' * 40}")
    facts: Any = SimpleNamespace(root="/state")
    host = Host(name="box", address="box.lan")
    assert sending._rsync("rsync", source, Listing(ref, ()), [], facts, host, laptop.places) is None
    assert ran[0][-2] == f"{laptop.cwd}/{name}/"
