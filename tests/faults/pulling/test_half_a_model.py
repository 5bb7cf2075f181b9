"""Row 17: a model that was truncated, altered, added to, or whose pull was killed, is not whole, and mends cheaply."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.agent.paths import Root
from dispatch.agent.pulling import look

pytestmark = pytest.mark.fault(row=17)

Make = Callable[..., Any]
CHECKOUT = Path(__file__).resolve().parents[3]


def seen(place: Path) -> dict[str, Any]:
    os.chmod(place.parent.parent, 0o700)
    return look(Root(str(place.parent.parent)), place.name)


def writable(path: Path) -> Path:
    os.chmod(path, 0o600)
    return path


def truncate(files: Path) -> None:
    os.truncate(writable(files / "model.safetensors"), 1000)


def flip(files: Path) -> None:
    path = writable(files / "model.safetensors")
    found = path.stat()
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))  # as if it had never been touched


def lose(files: Path) -> None:
    (files / "model.safetensors").unlink()


def swap_for_a_link(files: Path) -> None:
    shutil.copy(files / "model.safetensors", files.parent / "elsewhere")
    (files / "model.safetensors").unlink()
    (files / "model.safetensors").symlink_to(files.parent / "elsewhere")


@pytest.mark.parametrize("harm", [truncate, flip, lose, swap_for_a_link])
def test_a_file_that_is_not_what_it_was_makes_the_model_incomplete_and_is_alone_fetched_again(
    hub: Any, on_host: Make, contents: Make, pulled_files: Make, harm: Callable[[Path], None]
) -> None:
    _, place = on_host()
    harm(place / "files")
    found = seen(place)
    assert not found["complete"]
    assert "model.safetensors was changed since it was verified, or is gone" in found["why"]
    hub.asked.clear()
    assert on_host()[0] == 0
    assert {one["path"] for one in hub.asked if one["path"].startswith("/cdn/")} == {"/cdn/model.safetensors"}
    assert contents(place / "files") == pulled_files(hub.files)
    assert seen(place)["complete"]


def test_an_extra_file_makes_the_model_incomplete_and_is_set_aside_not_deleted(
    hub: Any, on_host: Make, contents: Make, pulled_files: Make
) -> None:
    _, place = on_host()
    (place / "files" / "extra" / "adapter.json").write_text("mine")
    found = seen(place)
    assert not found["complete"]
    assert found["why"] == "extra/adapter.json is not part of it"
    hub.asked.clear()
    assert on_host()[0] == 0
    assert hub.asked == []
    assert contents(place / "files") == pulled_files(hub.files)
    assert [path.read_text() for path in (place / "aside").iterdir()] == ["mine"]
    assert seen(place)["complete"]


def test_a_stranger_whose_name_is_no_text_is_told_and_set_aside_too(hub: Any, on_host: Make) -> None:
    _, place = on_host()
    (place / "files" / os.fsdecode(b"w\xff")).write_text("mine")
    found = seen(place)
    assert found["why"] == "w\\udcff is not part of it"
    assert str(found).encode(), "it can be sent and printed"
    assert on_host()[0] == 0
    assert [path.read_text() for path in (place / "aside").iterdir()] == ["mine"]
    assert seen(place)["complete"]


def test_a_file_that_was_touched_but_not_changed_is_read_again_and_not_moved(hub: Any, on_host: Make) -> None:
    _, place = on_host()
    os.utime(place / "files" / "model.safetensors")
    assert not seen(place)["complete"]
    hub.asked.clear()
    assert on_host()[0] == 0
    assert hub.asked == []
    assert seen(place)["complete"]


def test_a_pull_that_is_killed_leaves_nothing_that_counts_and_the_next_one_moves_the_rest(
    hub: Any, on_host: Make, fault: Make, contents: Make, pulled_files: Make, tmp_path: Path
) -> None:
    size = len(hub.files["model.safetensors"])
    hub.faults += [fault(r"/cdn/model\.safetensors", cut=200_000), fault(r"/cdn/model\.safetensors", stall=True)]
    pid = os.fork()
    if pid == 0:
        try:
            sys.stdout = open(tmp_path / "killed.log", "w", buffering=1)  # noqa: SIM115
            on_host()
        finally:
            os._exit(9)
    while sum(one["path"].endswith("model.safetensors") for one in hub.asked if one["path"].startswith("/cdn/")) < 2:
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), (tmp_path / "killed.log").read_text()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    place = next((tmp_path / "models").glob("acme*"))
    assert not (place / "files").exists()
    assert not seen(place)["complete"]
    hub.asked.clear()
    assert on_host()[0] == 0
    assert [one["headers"].get("Range") for one in hub.asked_for("model.safetensors")] == ["bytes=200000-"]
    rest = size - 200_000 + len(hub.files["tokenizer.json"])
    assert hub.sent == rest, "what was verified or had come did not come again"
    assert contents(place / "files") == pulled_files(hub.files)


def test_two_pulls_of_one_model_move_it_once(hub: Any, on_host: Make, tmp_path: Path, contents: Make) -> None:
    pids = []
    for number in range(2):
        pid = os.fork()
        if pid == 0:
            code = 9
            try:
                sys.stdout = open(tmp_path / f"{number}.log", "w", buffering=1)  # noqa: SIM115
                code = on_host()[0]
            finally:
                os._exit(code)
        pids.append(pid)
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [0, 0]
    assert len(hub.asked_for("model.safetensors")) == 1


def test_the_hosts_program_is_one_file_that_python_runs_alone(hub: Any, on_host: Make, tmp_path: Path) -> None:
    from dispatch.pulling.program import pull_program

    (tmp_path / "program").write_bytes(pull_program()[0])
    ended = subprocess.run(
        [sys.executable, "-I", "-B", str(tmp_path / "program"), "{}"], capture_output=True, text=True, check=False
    )
    assert "KeyError: 'models'" in ended.stderr, "it came as far as reading its request"
    assert str(CHECKOUT) not in ended.stderr
