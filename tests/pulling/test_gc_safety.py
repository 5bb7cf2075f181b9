"""What gc leaves alone where something is wrong: damaged records, foreign folders, a wrong root, other users."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.agent import gc, journal
from dispatch.agent.paths import Root
from dispatch.agent.processes import look

Make = Callable[..., Any]
BUILD, MODEL = f"{'a' * 16}-{'0' * 8}", f"acme--used@{'c' * 40}"


def place(host: Any) -> dict[str, str]:
    """A build, its environment, a model and an object, as they lie on a host; where each is."""
    root = host.root
    host.call("install")
    for folder in (root.builds / BUILD, root.venvs / BUILD[:16], root.models / MODEL / "files"):
        folder.mkdir(parents=True)
        (folder / ".complete.json").write_text("{}")
    (root.cas / ("e" * 64)).write_bytes(b"a bundle")
    return {
        "builds": str(root.builds / BUILD / "site"),
        "venvs": str(root.venvs / BUILD[:16] / "bin"),
        "models": str(root.models / MODEL / "files"),
        "cas": str(root.cas / ("e" * 64)),
    }


def rooms(found: dict[str, Any]) -> set[str]:
    return {item["room"] for item in found["items"]}


def test_a_run_that_did_not_pass_stays_with_its_checkpoints_until_a_later_one_passed(
    host: Any, ended: Make, tidy: Any
) -> None:
    program = "import os; os.makedirs('out/checkpoints/step-90'); raise SystemExit(5)"
    crashed = ended(host, program, kin="x")
    tidy.collect(crashed)
    assert tidy.goes() == set(), "its checkpoints are in no inventory, and --attempt next resumes from them"
    assert tidy.why(crashed) == "it did not pass, and no later run of its kind and meaning did"
    other = ended(host, kin="y")
    tidy.collect(other)
    assert tidy.goes() == set()
    later = ended(host, kin="x")
    tidy.collect(later)
    assert tidy.goes() == {crashed}
    assert tidy.goes(keep=0) == {crashed, other, later}


@pytest.mark.parametrize("damage", ["cut", "gone", "another type"])
def test_while_the_launch_of_a_live_run_cannot_be_read_nothing_goes_that_it_might_need(
    host: Any, ended: Make, tidy: Any, running: Make, damage: str
) -> None:
    where = place(host)
    data = ended(host)
    tidy.collect(data)
    live = running(
        kin="x", resolved={"data": {"run": data}}, env={f"NEEDS_{room}": path for room, path in where.items()}
    )
    assert rooms(tidy.look(keep=0)) == set()
    record = host.paths(live).launch
    whole = record.read_bytes()
    record.unlink() if damage == "gone" else record.write_bytes({"cut": whole[:40], "another type": b"[]\n"}[damage])
    try:
        for wide in ({}, {"keep": 0}, {"keep": 0, "uncollected": True}):
            assert rooms(tidy.look(**wide)) == set()
        assert tidy.why(BUILD, keep=0) == f"{live}, which stays, might name it: its launch.json cannot be read"
    finally:
        record.write_bytes(whole)


def test_a_run_without_identity_is_no_rubbish_while_a_process_of_it_lives(host: Any, tidy: Any, running: Make) -> None:
    live = running(env={"SITE": place(host)["builds"]})
    identity = host.paths(live).identity
    content = identity.read_bytes()
    identity.unlink()
    assert tidy.goes(keep=0, uncollected=True) == set()
    assert tidy.goes("builds", keep=0, uncollected=True) == set()
    assert tidy.why(live, keep=0, uncollected=True) == "a process holds its lock"
    (host.paths(live).lock).rename(host.dir.parent / "lock")
    assert " is alive" in tidy.why(live, keep=0, uncollected=True)
    (host.dir.parent / "lock").rename(host.paths(live).lock)
    identity.write_bytes(content)


def test_a_pid_that_was_reused_keeps_no_run(host: Any, tidy: Any) -> None:
    """The pid of a lost run is a living process's now: its start ticks tell the two apart."""
    run = host.python("pass")
    mine = look(os.getpid())
    assert mine is not None
    journal.record(host.paths(run), "started", pid=mine.pid, ticks=mine.ticks - 1, argv=["x"])
    assert host.state(run)["state"] == "lost"
    assert tidy.goes(keep=0, uncollected=True) == {run}
    journal.record(host.paths(run), "started", pid=mine.pid, ticks=mine.ticks, argv=["x"])
    assert tidy.why(run, keep=0, uncollected=True) == f"its process {mine.pid} is alive"


def test_records_that_make_no_sense_keep_their_own_run_and_break_nothing(host: Any, ended: Make, tidy: Any) -> None:
    sound, odd = ended(host, kin="a"), host.python("pass", kin="b")
    tidy.collect(sound)
    with open(host.paths(odd).journal, "a") as lines:
        lines.write('{"event": "started"}\n')
    build = host.root.builds / BUILD
    build.mkdir()
    (build / ".complete.json").write_text('{"made": "yesterday", "venv": 5}')
    assert tidy.goes(keep=0, uncollected=True) == {sound}
    assert tidy.why(odd, keep=0, uncollected=True).startswith("its records cannot be read")
    assert tidy.goes("builds", keep=0) == {BUILD}


def test_a_root_set_to_a_folder_of_the_users_own_costs_none_of_what_is_his(host: Any, tidy: Any) -> None:
    """GX10_REPO_PATH=$HOME: environments, builds and models of the user's lie where ours would."""
    host.call("install")
    his = ("venvs/torch-nightly", "venvs/env", "builds/llvm-18", "models/llama-70b", "runs/2024-10-01", "cas/notes")
    for name in his:
        (host.dir / name).mkdir(parents=True)
    assert tidy.apply(keep=0, uncollected=True)["removed"] == []
    assert all((host.dir / name).is_dir() for name in his)


@pytest.mark.parametrize("what", ["/", "home"])
def test_the_root_of_the_machine_and_a_home_folder_are_refused_as_state_roots(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    home = tmp_path / "home"
    home.mkdir(mode=0o700)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: pytest.fail(f"{path} would be made"))
    root = Root("/" if what == "/" else "~")
    with pytest.raises(Exception, match=f"state root {root.dir} is .* itself") as refused:
        root.create()
    assert "GX10_REPO_PATH" in str(getattr(refused.value, "next", ""))
    assert list(home.iterdir()) == []


def test_what_belongs_to_another_user_stays(host: Any, ended: Make, tidy: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ended(host)
    tidy.collect(run)
    place(host)
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    assert tidy.look(keep=0)["items"] == []
    assert tidy.why(run, keep=0) == f"it belongs to uid {os.getuid()}"


def test_what_cannot_be_moved_or_deleted_is_told_and_the_rest_still_goes(
    host: Any, ended: Make, tidy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, foreign, free = (ended(host, "import os; os.mkdir('out/a')") for _ in range(3))
    tidy.collect(stuck, foreign, free)
    rename, chmod = os.rename, os.chmod

    def renames(old: Any, new: Any) -> None:
        if stuck in str(old):
            raise PermissionError(1, "Operation not permitted")
        rename(old, new)

    def chmods(path: Any, mode: int) -> None:
        if foreign in str(path):
            raise PermissionError(1, "Operation not permitted")
        chmod(path, mode)

    monkeypatch.setattr(os, "rename", renames)
    monkeypatch.setattr(os, "chmod", chmods)
    done = tidy.apply([{"room": "runs", "name": name} for name in (stuck, foreign, free)], keep=0)
    assert {one["name"]: one["why"] for one in done["skipped"]} == {
        stuck: "it cannot be moved: Operation not permitted"
    }
    assert {one["name"] for one in done["removed"]} == {foreign, free}
    assert host.state(stuck)["state"] == "finished"


def test_a_link_in_the_place_of_a_run_is_removed_and_not_followed(host: Any, tmp_path: Path) -> None:
    host.call("install")
    precious = tmp_path / "precious"
    (precious / "inside").mkdir(parents=True)
    (precious / "inside").chmod(0o500)
    grave = host.root.runs / ".removing-link"
    grave.symlink_to(precious)
    assert gc._delete(grave)
    assert stat.S_IMODE((precious / "inside").stat().st_mode) == 0o500
    shutil.rmtree(precious)


def test_what_a_crash_left_of_a_removal_or_a_build_goes_at_the_next_gc(host: Any, tidy: Any) -> None:
    host.call("install")
    left = [f"{room}/.removing-{'f' * 64}-00" for room in ("runs", "builds", "venvs", "models", "cas", "agent")]
    left.append(f"builds/.building-{BUILD}")
    for name in left:
        (host.dir / name).mkdir(parents=True)
    with open(host.root.builds / f".lock-{BUILD}", "w") as guard:
        __import__("fcntl").flock(guard, 2)
        assert tidy.goes("rest") == set(left[:-1]), "a build that goes on is no leaving"
    assert tidy.goes("rest") == set(left)
    done = tidy.apply()
    assert done["skipped"] == []
    assert not [name for name in left if (host.dir / name).exists()]


def test_a_model_is_kept_for_a_run_that_calls_the_root_by_another_name(host: Any, tidy: Any, tmp_path: Path) -> None:
    place(host)
    (tmp_path / "link").symlink_to(host.dir)
    host.python("pass", resolved={"teacher": {"path": f"{tmp_path}/link/models/{MODEL}/files"}})
    assert tidy.goes("models", keep=0) == set()


def test_a_run_with_files_that_no_collect_can_bring_stays(host: Any, ended: Make, tidy: Any) -> None:
    run = ended(host, "import os; open(b'out/w\\xff', 'wb').write(b'x')")
    tidy.collect(run)
    assert tidy.goes(keep=0) == set()
    assert tidy.why(run, keep=0) == "1 of its files could not be collected"
    assert tidy.goes(keep=0, uncollected=True) == {run}
    assert json.loads(host.paths(run).artifacts.read_bytes())["skipped"]
