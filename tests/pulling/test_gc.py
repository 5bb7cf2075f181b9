"""What gc removes, and what it never touches, whatever its age. D42: a clean-up that could delete a live run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch import agent_package
from dispatch.agent import gc, locks
from dispatch.agent.paths import Root
from dispatch.agent.rubbish import Wishes
from dispatch.pulling.tidy import held_copies

Make = Callable[..., Any]


OLD, LIVE, NEW, BROKEN = (f"{digit * 16}-{'0' * 8}" for digit in "abcd")


def test_a_run_goes_when_it_is_collected_and_a_later_one_stands_in_for_it(host: Any, ended: Make, tidy: Any) -> None:
    first, second = ended(host), ended(host)
    tidy.collect(first, second)
    assert tidy.goes() == {first}
    assert tidy.why(second) == "it is the last that passed of its kind and meaning"
    assert tidy.goes(keep=2) == set()
    assert tidy.goes(keep=0) == {first, second}


def test_what_was_not_collected_or_is_not_proven_to_be_stays(host: Any, ended: Make, tidy: Any) -> None:
    first, second = ended(host), ended(host)
    tidy.collect(second)
    assert tidy.goes(keep=0) == {second}
    tidy.collected[first] = "0" * 64
    assert tidy.goes(keep=0) == {second}
    assert tidy.why(first) == "what it left was not collected"
    assert tidy.goes(keep=0, uncollected=True) == {first, second}


def test_a_run_that_followed_one_of_another_host_goes_when_it_has_ended_and_not_before(
    host: Any, ended: Make, tidy: Any, running: Make
) -> None:
    passed, failed = ended(host, kind="follow"), ended(host, "raise SystemExit(5)", kind="follow")
    live = running(kind="follow")
    assert tidy.goes() == {passed, failed}
    assert tidy.why(live) == "it is running"


def test_what_a_run_that_stays_names_stays_too_through_every_step(
    host: Any, ended: Make, tidy: Any, running: Make
) -> None:
    data, score, earlier = ended(host, kin="d"), "", ended(host, "raise SystemExit(5)", kin="x")
    score = ended(host, kin="s", resolved={"data": {"run": data}})
    live = running(kin="x", resolved={"targets": {"run": score}}, predecessor=earlier)
    tidy.collect(data, score, earlier)
    assert tidy.goes(keep=0) == set()
    assert tidy.why(live, keep=0) == "it is running"
    assert tidy.why(score, keep=0) == f"{live}, which stays, names it"
    assert tidy.why(data, keep=0) == f"{score}, which stays, names it"
    assert tidy.why(earlier, keep=0) == f"{live}, which stays, names it"


def test_neither_a_live_nor_a_queued_nor_a_reserved_nor_a_leased_run_can_be_removed(
    host: Any, tidy: Any, running: Make
) -> None:
    holder = running(lease=["device"])
    queued = host.python("pass", lease=["device"])
    host.call("launch", chain=[queued], wait_lease=True)
    host.wait(queued, "queued")
    reserved = host.python("pass")
    for name in (holder, queued, reserved):
        os.utime(host.paths(name).dir, (0, 0))  # as old as can be
    assert tidy.goes(keep=0) == set()
    assert tidy.goes(keep=0, uncollected=True) == {reserved}
    names = [{"room": "runs", "name": name} for name in (holder, queued)]
    done = tidy.apply(names, keep=0, uncollected=True)
    assert [one["why"] for one in done["skipped"]] == ["it is needed now, or gone"] * 2
    assert done["removed"] == []
    assert host.state(holder)["state"] == "running"
    host.call("cancel", run=queued, grace=1)


def test_a_job_that_outlived_its_supervisor_is_not_removed(host: Any, tidy: Any, running: Make) -> None:
    run = running()
    os.kill(host.state(run)["supervisor_pid"], signal.SIGKILL)
    host.wait(run, "unsupervised")
    assert tidy.goes(keep=0, uncollected=True) == set()


def test_only_what_was_shown_goes_and_only_if_it_still_can(host: Any, ended: Make, tidy: Any, running: Make) -> None:
    old, new = ended(host, kin="a"), ended(host, kin="b")
    tidy.collect(old, new)
    shown = [item for item in tidy.look(keep=0)["items"] if item["name"] == old]
    user = running(resolved={"data": {"run": old}}, kin="c")
    done = tidy.apply(shown, keep=0)
    assert done["removed"] == []
    assert [one["name"] for one in done["skipped"]] == [old]
    assert host.paths(new).dir.is_dir()
    assert host.paths(old).dir.is_dir()
    assert host.state(user)["state"] == "running"


def test_what_is_removed_is_gone_with_its_read_only_folders_and_the_freed_bytes_are_told(
    host: Any, ended: Make, tidy: Any
) -> None:
    run = ended(
        host,
        "import os; os.makedirs('out/a/b'); open('out/a/b/w','wb').write(bytes(300_000)); os.chmod('out/a', 0o500)",
    )
    tidy.collect(run)
    done = tidy.apply(keep=0)
    assert run in [one["name"] for one in done["removed"]]
    assert done["bytes"] >= 300_000
    assert done["skipped"] == []
    assert not host.paths(run).dir.exists()
    assert host.state(run)["state"] == "absent"
    assert tidy.goes(keep=0) == set()


@pytest.mark.parametrize("at", ["before the rename", "after the rename", "in the middle of the deletion"])
def test_a_crash_leaves_a_run_whole_or_absent_and_the_next_gc_finishes(
    host: Any, ended: Make, tidy: Any, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    run = ended(host, "open('out/w','wb').write(bytes(100_000))")
    tidy.collect(run)
    wishes, names = Wishes(0, False, tidy.collected), [{"room": "runs", "name": run}]

    class Crash(BaseException):
        """The process dies here."""

    def crash(*_: Any) -> Any:
        raise Crash

    def half(path: Path) -> bool:
        (path / "identity.json").unlink()
        raise Crash

    stop = {"before the rename": ("_renamed", crash), "after the rename": ("_delete", crash)}
    monkeypatch.setattr(gc, *stop.get(at, ("_delete", half)))
    with pytest.raises(Crash):
        gc.apply(host.root, wishes, None, names)
    monkeypatch.undo()
    state = host.state(run)["state"]
    assert state == ("finished" if at == "before the rename" else "absent")
    assert not locks.held(host.root.reserve_lock)
    for _ in range(2):
        tidy.apply(keep=0)
    assert not [path for path in host.root.runs.iterdir() if run in path.name]


def test_builds_environments_objects_and_agents_stay_only_where_something_to_come_needs_them(
    host: Any, tidy: Any, running: Make
) -> None:
    root = host.root

    def make(folder: Path, made: float, **marker: Any) -> None:
        folder.mkdir(parents=True)
        (folder / ".complete.json").write_text(json.dumps({"made": made, **marker}))

    running()  # makes the root, and runs from its agent
    for number, name in enumerate((OLD, LIVE, NEW)):
        make(root.builds / name, number, venv=str(root.venvs / name[:16]))
        make(root.venvs / name[:16], number)
    (root.builds / BROKEN).mkdir()
    live = running(env={"PYTHONPATH": str(root.builds / LIVE / "site")})
    put = {}
    for name in ("wanted", "unwanted"):
        content = name.encode()
        sha256 = __import__("hashlib").sha256(content).hexdigest()
        host.frame("put", {"sha256": sha256}, content)
        put[name] = sha256
    reserved = host.python("pass", env={"LIST": str(root.object(put["wanted"]))})
    (root.agent / f"{'a' * 64}.pyz").write_bytes(b"an older laptop's")
    assert tidy.goes("builds") == {OLD, BROKEN}
    assert tidy.goes("venvs") == {OLD[:16]}
    assert tidy.goes("cas") == {put["unwanted"]}
    assert tidy.goes("agent") == {"a" * 64}
    assert tidy.goes("builds", keep=0) == {OLD, NEW, BROKEN}
    assert tidy.why(LIVE) == "a run that is to start or goes on names it"
    with open(root.builds / f".lock-{OLD}", "w") as guard:
        import fcntl

        fcntl.flock(guard, fcntl.LOCK_EX)
        assert tidy.why(OLD) == "it is being made"
    done = tidy.apply()
    assert done["skipped"] == []
    assert sorted(path.name for path in root.builds.iterdir() if not path.name.startswith(".")) == [LIVE, NEW]
    assert host.state(live)["state"] == "running"
    assert host.state(reserved)["state"] == "reserved"
    assert (root.agent / f"{agent_package.agent_sha256()}.pyz").is_file()


def test_a_model_stays_for_its_runs_or_until_one_has_used_it(host: Any, ended: Make, tidy: Any) -> None:
    models = host.root.models
    used, ahead, kept = (f"{name}@{'c' * 40}" for name in ("acme--used", "acme--ahead", "acme--kept"))
    host.call("install")
    for name in (used, ahead, kept):
        (models / name / "files").mkdir(parents=True)

    def names(model: str) -> dict[str, Any]:
        return {"teacher": {"path": str(models / model / "files"), "sha256": "0" * 64}}

    (models / used / ".complete.json").write_text(json.dumps({"files": [], "sha256": "0"}))
    (models / kept / ".complete.json").write_text(json.dumps({"files": [], "sha256": "0"}))
    gone, stays = ended(host, kin="a", resolved=names(used)), ended(host, kin="b", resolved=names(kept))
    tidy.collect(gone)
    assert tidy.goes("models") == set(), "the last run of its kind stays, and its model"
    assert tidy.goes("models", keep=0) == {used, ahead}
    assert tidy.why(kept, keep=0) == f"{stays}, which stays, names it"
    assert tidy.why(ahead) == "no run has used it yet"


def test_a_launch_after_a_clean_up_is_refused_where_something_that_it_needs_is_gone(
    host: Any, ended: Make, tidy: Any
) -> None:
    data = ended(host)
    waiting = [
        host.python("pass", resolved={"data": {"run": data}}),
        host.python("pass", env={"PYTHONPATH": f"{host.root.builds}/gone-1/site"}),
        host.python("pass", env={"LIST": f"{host.root.cas}/{'b' * 64}"}),
    ]
    shutil.rmtree(host.paths(data).dir)
    for run, what in zip(waiting, (data, "builds/gone-1", "b" * 64), strict=True):
        with pytest.raises(Exception, match=f"{run} needs .*{what}, which is not on this host any more"):
            host.call("launch", chain=[run])
        assert host.state(run)["state"] == "reserved"


def test_a_launch_is_refused_while_its_model_is_not_complete(host: Any) -> None:
    """D4: what a run takes is looked at before it starts; row 17: a launch refuses half a model."""
    name = f"acme--half@{'c' * 40}"
    (host.root.models / name / "tree").mkdir(parents=True)
    os.chmod(host.dir, 0o700)
    path = str(host.root.models / name / "files")
    run = host.python("pass", resolved={"teacher": {"path": path, "sha256": "0" * 64}})
    with pytest.raises(Exception, match=f"takes the model {name}, which is not complete: its pull did not come to"):
        host.call("launch", chain=[run])
    assert host.state(run)["state"] == "reserved"


def test_looking_changes_nothing(host: Any, ended: Make, tidy: Any, snapshot: Make) -> None:
    tidy.collect(ended(host))
    before = snapshot(host.dir)
    tidy.look(keep=0)
    assert snapshot(host.dir) == before


def test_a_copy_proves_itself_only_when_all_of_it_is_here(laptop: Any) -> None:
    folder = laptop.cwd / "runs" / f"data-{'0' * 20}"
    folder.mkdir(parents=True)
    (folder / "artifacts.json").write_text(json.dumps({"files": [{"path": "launch.log", "bytes": 3}]}))
    (folder / "launch.log").write_text("abc")
    assert held_copies(laptop.places) == {}, "it was not collected to its end"
    (folder / "exit.json").write_text("{}")
    assert list(held_copies(laptop.places)) == [folder.name]
    (folder / "launch.log").write_text("ab")
    assert held_copies(laptop.places) == {}


def test_the_command_shows_first_and_removes_when_told(laptop: Any, snapshot: Make) -> None:
    root = Root(str(laptop.home / "state" / "latentforge"))
    root.create()
    (root.builds / OLD).mkdir()
    (root.builds / OLD / "weights").write_bytes(bytes(50_000))
    before = snapshot(root.dir)
    shown = laptop.cli("gc")
    assert shown.returncode == 0, shown.stderr
    assert f"builds  {OLD}" in shown.stdout
    assert "1 can go, " in shown.stdout
    assert "nothing was removed. To do it:  latentforge dispatch gc --host local --apply" in shown.stdout
    assert snapshot(root.dir) == before
    refused = laptop.cli("gc", "--apply", DRY_RUN="1")
    assert refused.returncode == 2
    done = laptop.cli("gc", "--each", "local", "--apply", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)["hosts"]["local"]["value"]
    assert [one["name"] for one in told["removed"]] == [OLD]
    assert told["bytes"] >= 50_000
    assert not (root.builds / OLD).exists()


def test_a_run_whose_lock_somebody_took_after_the_look_is_left_alone(
    host: Any, ended: Make, tidy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = ended(host)
    tidy.collect(run)
    shown = [item for item in tidy.look(keep=0)["items"] if item["name"] == run]
    out_of_the_way = gc._out_of_the_way

    def raced(root: Root, item: dict[str, Any]) -> Path | None:
        lock = locks.take(root.run(run).lock)
        assert lock is not None
        try:
            return out_of_the_way(root, item)
        finally:
            locks.release(lock)

    monkeypatch.setattr(gc, "_out_of_the_way", raced)
    done = tidy.apply(shown, keep=0)
    assert [one["why"] for one in done["skipped"]] == ["somebody uses it now"]
    assert host.state(run)["state"] == "finished"
