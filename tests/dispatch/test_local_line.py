"""The whole line on host ``local``, with jobs that only pretend to train, under the real agent."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dispatch.planning.survey import survey
from dispatch.session import preview
from latentforge.errors import LatentForgeError, RefusedError
from latentforge.evidence.verify import verify_evidence
from latentforge.verdicts import ExitCode, Outcome

Make = Callable[..., Any]


def last_lines(capsys: pytest.CaptureFixture[str], count: int = 2) -> list[str]:
    return capsys.readouterr().out.splitlines()[-count:]


def final_run(jobs: Any) -> str:
    return next(run for run in jobs.starts() if run.startswith("distill-"))


def test_go_ends_with_the_verdict_and_verified_evidence(
    jobs: Any, ask: Make, session: Make, laptop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session().go(ask()) is ExitCode.PASS
    run = final_run(jobs)
    assert last_lines(capsys) == [
        f"F-DISTILL-SMOKE-001 PASS run={run} val_loss 4.0 < 5.0 at step 20",
        f"evidence: runs/{run}/manifest.json  verified, unsigned",
    ]
    assert verify_evidence(laptop.places.run(run)).outcome is Outcome.PASS
    assert [one.partition("-")[0] for one in jobs.starts()] == ["data", "teacher", "score", "distill"]


def test_go_ends_with_every_run_of_the_pipeline_and_its_verdicts(
    jobs: Any, ask: Make, session: Make, laptop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.others["verdict"] = "F-BEFORE-IT-001"
    assert session().go(ask()) is ExitCode.PASS
    told = capsys.readouterr().out
    listed = told[told.index("runs of the pipeline:\n") :].splitlines()[1:]
    kinds, final = ["data", "teacher", "score", "distill"], final_run(jobs)
    *before, last, _, _ = listed
    assert last.split() == ["distill", "pass", final]
    for kind, line, verdict in zip(kinds, before[::2], before[1::2], strict=False):
        run = next(one for one in jobs.starts() if one.startswith(kind))
        assert line.split() == [kind, "pass", run]
        assert verdict == f"    F-BEFORE-IT-001 PASS run={run} said by {kind}"
    # What is kept was seen once, or by another laptop alone.
    assert session(json=True).go(ask()) is ExitCode.PASS
    again = capsys.readouterr()
    assert "\n".join(listed[:-2]) in again.err
    ends = json.loads(again.out)["ends"]
    assert [(end["kind"], end["ended"], len(end["verdicts"])) for end in ends] == [(kind, "pass", 1) for kind in kinds]
    assert ends[0]["verdicts"][0]["line"] == before[1].strip()
    shutil.rmtree(laptop.places.followed("local", ends[0]["run"]))
    assert session().go(ask()) is ExitCode.PASS
    told = capsys.readouterr().out.partition("runs of the pipeline:\n")[2]
    assert told.splitlines()[0].endswith(f"verdicts: latentforge dispatch watch {ends[0]['run']}")


def test_of_a_pipeline_that_ends_early_the_runs_that_never_ran_are_named(
    jobs: Any, ask: Make, session: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.others |= {"verdict": "F-BEFORE-IT-001", "fail": True}
    assert session().go(ask()) is ExitCode.FAIL
    told = capsys.readouterr().out
    listed = told[told.index("runs of the pipeline:\n") :].splitlines()[1:]
    assert [line.split()[:2] for line in listed[:4]] == [
        ["data", "fail"],
        *([kind, "not"] for kind in ("teacher", "score", "distill")),
    ]


def test_a_second_go_changes_nothing_and_gives_the_same_verdict(
    jobs: Any, ask: Make, session: Make, laptop: Any, capsys: pytest.CaptureFixture[str], snapshot: Make
) -> None:
    session().go(ask())
    first = last_lines(capsys)
    before = snapshot(laptop.home)
    assert session().go(ask()) is ExitCode.PASS
    out = capsys.readouterr().out
    assert "no changes. " in out
    assert out.splitlines()[-2:] == first
    changed = {name for name, seen in snapshot(laptop.home).items() if before.get(name, (0, 0, b""))[2] != seen[2]}
    assert not changed
    assert len(jobs.starts()) == 4


def test_a_failed_verdict_is_reported_again_and_never_run_again(
    jobs: Any, ask: Make, session: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.how["fail"] = True
    assert session().go(ask()) is ExitCode.FAIL
    assert session().go(ask()) is ExitCode.FAIL
    assert "F-DISTILL-SMOKE-001 FAIL" in capsys.readouterr().out
    assert len(jobs.starts()) == 4


def test_a_refused_run_gives_its_reason_when_it_is_followed_and_when_it_is_asked_again(
    jobs: Any, ask: Make, session: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.how |= {"exit": 2, "reason": "the corpus has only 3 rows"}
    for _ in range(2):
        assert session().go(ask()) is ExitCode.REFUSED
        told = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("error: "))
        assert " refused " in told
        assert told.endswith(": the corpus has only 3 rows")
    assert len(jobs.starts()) == 4


def test_a_failure_without_a_falsifier_gives_its_reason(
    jobs: Any, ask: Make, session: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.how |= {"exit": 1, "reason": "loss nan at step 3 is not finite"}
    assert session().go(ask()) is ExitCode.FAIL
    out = capsys.readouterr().out
    assert ": loss nan at step 3 is not finite\n  next: read its log" in out
    assert "error: " not in out


def test_attempt_next_resumes_the_ended_run_under_a_new_id(jobs: Any, ask: Make, session: Make) -> None:
    jobs.how["exit"] = 5
    assert session().go(ask()) is ExitCode.CRASHED
    first = final_run(jobs)
    jobs.how.pop("exit")
    dispatch = session()
    assert dispatch.go(ask(attempt_next=True)) is ExitCode.PASS
    second = jobs.starts()[-1]
    assert second.startswith("distill-")
    assert second != first
    launch = json.loads((Path(os.environ["XDG_STATE_HOME"]) / "latentforge/runs" / second / "launch.json").read_text())
    assert launch["predecessor"] == first
    # A bare go now stands on the newest attempt, and reports that one.
    assert session().go(ask()) is ExitCode.PASS
    assert len(jobs.starts()) == 5


def test_attempt_next_without_an_attempt_is_refused(jobs: Any, ask: Make, session: Make) -> None:
    with pytest.raises(RefusedError, match="no attempt"):
        session().go(ask(attempt_next=True))


def test_a_run_killed_with_9_is_told_as_killed_and_exits_5(
    jobs: Any, ask: Make, session: Make, eventually: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.hold_at(7)
    codes: list[ExitCode] = []
    dispatch = session()
    thread = threading.Thread(target=lambda: codes.append(dispatch.go(ask())))
    thread.start()
    run = eventually(lambda: next((one for one in jobs.starts() if one.startswith("distill-")), None), "it starts")
    log = Path(os.environ["XDG_STATE_HOME"]) / "latentforge/runs" / run / "launch.log"
    eventually(lambda: log.exists() and "step 6/" in log.read_text(), "it reaches step 6")
    state = dispatch.transport.call("status", {"runs": [run]}).result[run]
    os.kill(state["pid"], signal.SIGKILL)
    thread.join(30)
    assert codes == [ExitCode.CRASHED]
    out = capsys.readouterr().out
    assert f"error: {run} killed by signal 9" in out
    assert "at step 6" in out
    assert "--attempt next" in out
    # Asked again, it says the same and starts nothing.
    starts = len(jobs.starts())
    assert session().go(ask()) is ExitCode.CRASHED
    assert len(jobs.starts()) == starts


def test_two_at_once_are_one_run_and_both_get_the_verdict(
    jobs: Any, ask: Make, session: Make, eventually: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs.hold_at(5)
    codes: list[ExitCode] = []
    two = [session(), session()]
    threads = [threading.Thread(target=lambda one=one: codes.append(one.go(ask()))) for one in two]
    for thread in threads:
        thread.start()
    eventually(lambda: any(one.startswith("distill-") for one in jobs.starts()), "the last run starts")
    jobs.open()
    for thread in threads:
        thread.join(60)
    assert codes == [ExitCode.PASS, ExitCode.PASS]
    assert len(jobs.starts()) == 4
    assert capsys.readouterr().out.count("verified, unsigned") == 2


def test_a_preview_creates_and_changes_no_file_and_is_the_same_twice(
    ask: Make, laptop: Any, capsys: pytest.CaptureFixture[str], snapshot: Make
) -> None:
    before = snapshot(laptop.home)
    shown = []
    for _ in range(2):
        assert preview(ask(), laptop.places, as_json=False) is ExitCode.PASS
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "nothing was changed (dry run). To do it:  latentforge dispatch go tiny --host local" in shown[0]
    assert snapshot(laptop.home) == before


def test_a_preview_after_a_run_is_the_same_twice(
    jobs: Any, ask: Make, session: Make, laptop: Any, capsys: pytest.CaptureFixture[str], snapshot: Make
) -> None:
    session().go(ask())
    capsys.readouterr()
    before = snapshot(laptop.home)
    shown = []
    for _ in range(2):
        preview(ask(), laptop.places, as_json=False)
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
    assert "nothing is to be done" in shown[0]
    assert snapshot(laptop.home) == before


def test_ctrl_c_while_following_detaches_and_the_run_goes_on(
    jobs: Any, ask: Make, session: Make, eventually: Make, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    jobs.hold_at(5)
    dispatch = session()

    def interrupted(events: list[Any]) -> None:
        if any(event.kind == "step" and event.run.startswith("distill-") for event in events):
            raise KeyboardInterrupt

    monkeypatch.setattr(dispatch.observer, "events", interrupted)
    assert dispatch.go(ask()) is ExitCode.DETACHED
    run = final_run(jobs)
    out = capsys.readouterr().out
    assert f"back:  latentforge dispatch watch {run}" in out
    assert f"stop:  latentforge dispatch cancel {run}" in out
    jobs.open()
    assert session().watch(run, [run], {"digest": "x"}) is ExitCode.PASS
    assert len(jobs.starts()) == 4


def test_what_is_watched_is_the_host_s_log_byte_for_byte(jobs: Any, ask: Make, session: Make, laptop: Any) -> None:
    jobs.how |= {"steps": 200, "noise": True}
    session().go(ask())
    run = final_run(jobs)
    host = Path(os.environ["XDG_STATE_HOME"]) / "latentforge/runs" / run
    for name in ("launch.log", "events.jsonl"):
        assert (laptop.places.followed("local", run) / name).read_bytes() == (host / name).read_bytes()


def test_a_finished_run_of_another_clone_is_adopted_and_that_is_said(
    jobs: Any,
    ask: Make,
    session: Make,
    laptop: Any,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: Any,
) -> None:
    session().go(ask())
    run = final_run(jobs)
    # A second clone: another current folder and laptop state, the same host.
    monkeypatch.chdir(tmp_path)
    from dispatch.places import Places

    other = session()
    other.places = other.follower.places = Places(laptop.places.config, tmp_path / "other", tmp_path / "runs")
    capsys.readouterr()
    assert other.go(ask()) is ExitCode.PASS
    out = capsys.readouterr().out
    assert f"adopted: an earlier dispatch to local finished {run}; nothing was trained now" in out
    assert verify_evidence(tmp_path / "runs" / run).outcome is Outcome.PASS
    assert len(jobs.starts()) == 4


def test_a_judgement_that_changed_since_the_preview_is_refused(
    jobs: Any, ask: Make, session: Make, laptop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from dispatch.apply import launch

    dispatch = session()
    assert dispatch.go(ask()) is ExitCode.PASS
    more = ask(None, "distill.steps=61")
    plan, _facts = survey(dispatch.transport, more, laptop.places)
    shutil.rmtree(Path(os.environ["XDG_STATE_HOME"]) / "latentforge/runs")
    with pytest.raises(RefusedError, match="changed since the plan was shown: data was 'keep', is now 'run'"):
        launch(plan, more, dispatch.transport, laptop.places, dispatch.follower, say=print)


def test_a_held_lease_is_refused_with_7_and_names_its_holder(
    jobs: Any, ask: Make, session: Make, eventually: Make
) -> None:
    jobs.hold_at(5)
    first = session()
    assert first.go(ask(), detach=True) is ExitCode.PASS
    holder = eventually(lambda: next((one for one in jobs.starts() if one.startswith("distill-")), None), "it starts")
    with pytest.raises(LatentForgeError, match=f"held by {holder}") as refused:
        session().go(ask(None, "distill.steps=61"))
    assert refused.value.code is ExitCode.BUSY
    assert refused.value.next.endswith("--wait")
    jobs.open()
    assert session().go(ask(None, "distill.steps=61", wait=True)) is ExitCode.PASS


def test_one_flipped_byte_in_the_copy_is_not_verified_and_exits_1(
    jobs: Any, ask: Make, session: Make, laptop: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    session().go(ask())
    manifest = laptop.places.run(final_run(jobs)) / "manifest.json"
    content = bytearray(manifest.read_bytes())
    content[-10] ^= 1
    os.chmod(manifest, 0o644)
    manifest.write_bytes(content)
    assert session().go(ask()) is ExitCode.FAIL
    assert "NOT verified" in capsys.readouterr().out


def test_a_run_that_is_cancelled_says_so_ends_with_5_and_stays_ended(
    jobs: Any, ask: Make, session: Make, eventually: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    from dispatch.standing import cancel_run

    jobs.hold_at(5)
    first = session()
    first.go(ask(), detach=True)
    run = eventually(lambda: next((one for one in jobs.starts() if one.startswith("distill-")), None), "it starts")
    eventually(lambda: first.transport.call("status", {"runs": [run]}).result[run]["state"] == "running", "it runs")
    assert cancel_run(first.transport, run, grace=2.0) is ExitCode.PASS
    assert "ended (cancelled" in capsys.readouterr().out
    assert session().go(ask()) is ExitCode.CRASHED
    assert f"error: {run} cancelled" in capsys.readouterr().out
    assert len(jobs.starts()) == 4


def test_a_waiting_run_that_is_cancelled_is_told_as_such(
    jobs: Any, ask: Make, session: Make, eventually: Make, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    import dispatch.apply
    from dispatch.standing import cancel_run

    real = dispatch.apply.job
    gate = jobs.folder / "teacher-gate"

    def slow_teacher(one: Any, facts: Any, plan: Any) -> Any:
        argv, env = real(one, facts, plan)
        if one.kind == "teacher":
            argv[-1] = json.dumps({**json.loads(argv[-1]), "wait_at": 2, "gate": str(gate)})
        return argv, env

    monkeypatch.setattr("dispatch.apply.job", slow_teacher)
    codes: list[ExitCode] = []
    going = session()
    thread = threading.Thread(target=lambda: codes.append(going.go(ask())))
    thread.start()
    eventually(lambda: any(one.startswith("teacher-") for one in jobs.starts()), "the teacher starts")
    other = session()
    waiting = next(path.stem for path in other.places.records.glob("distill-*.json"))
    cancel_run(other.transport, waiting, grace=1.0)
    gate.touch()
    thread.join(60)
    assert codes == [ExitCode.CRASHED]
    assert f"error: {waiting} was cancelled before it started" in capsys.readouterr().out


def test_a_full_disk_here_is_no_crash_of_the_run_and_never_green(
    jobs: Any, ask: Make, session: Make, laptop: Any, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import errno

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "runs/x")

    for step in (
        "dispatch.records.write_atomic",
        "dispatch.following.cursor.write_atomic",
        "dispatch.collect.os.fsync",
    ):
        with monkeypatch.context() as broken:
            broken.setattr(step, full)
            with pytest.raises(LatentForgeError, match="could not be written on this machine: No space left") as told:
                session().go(ask())
            assert told.value.code is ExitCode.UNKNOWN
            assert "free disk space" in str(told.value.next)
    assert session().go(ask()) is ExitCode.PASS
    assert len(jobs.starts()) == 4
    assert capsys.readouterr().out.count("verified, unsigned") == 1
