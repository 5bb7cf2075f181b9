"""How often a host is asked: once for what is finished, once for what goes on, and no more than it must be."""

from __future__ import annotations

import ast
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import pytest

from latentforge.verdicts import ExitCode

Make = Callable[..., Any]


def test_a_finished_pipeline_takes_one_round_trip_and_changes_nothing_at_any_step(
    jobs: Any, ask: Make, session: Make, asked_verbs: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert session().go(ask()) is ExitCode.PASS
    capsys.readouterr()
    asked_verbs.clear()
    assert session().go(ask()) is ExitCode.PASS
    assert asked_verbs == ["probe"]
    out = capsys.readouterr().out
    table = out[out.index("  step ") : out.index("\n\n", out.index("  step "))].splitlines()[1:]
    wills = {line.split()[0]: line.split()[1] for line in table}
    assert {"build", "data", "teacher", "score", "distill", "collect", "evidence"} <= wills.keys()
    assert {will for step, will in wills.items() if step != "preflight"} == {"keep"}
    assert "\nno changes. distill-" in out


def test_the_launch_of_a_run_that_goes_on_takes_at_most_two_round_trips(
    jobs: Any, ask: Make, session: Make, asked_verbs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.hold_at(5)
    assert session().go(ask(), detach=True) is ExitCode.PASS
    asked_verbs.clear()
    assert session().go(ask(), detach=True) is ExitCode.PASS
    assert asked_verbs == ["probe"]
    asked_verbs.clear()
    dispatch = session()
    begin = dispatch.observer.begin

    def begun(*run: Any) -> None:
        jobs.open()  # not before it is followed, or there would be nothing to follow
        begin(*run)

    monkeypatch.setattr(dispatch.observer, "begin", begun)
    assert dispatch.go(ask()) is ExitCode.PASS
    assert asked_verbs[: asked_verbs.index("follow")] == ["probe"]
    assert len(jobs.starts()) == 4


def test_a_second_attempt_of_a_pipeline_on_files_of_the_user_s_is_found_in_two_round_trips(
    jobs: Any, ask: Make, session: Make, asked_verbs: list[str], tmp_path: Any
) -> None:
    (tmp_path / "corpus.txt").write_text("one line of text after the other\n" * 2000)
    words = f"data.corpus={tmp_path}/corpus.txt"
    assert session().go(ask(None, words)) is ExitCode.PASS
    asked_verbs.clear()
    assert session().go(ask(None, words)) is ExitCode.PASS
    assert asked_verbs == ["probe", "probe"]


_COUNTING = """
import os, sys
def note(event, args):
    if event == "subprocess.Popen":
        with open(os.environ["COUNTED"], "a") as file:
            file.write(repr([str(word) for word in args[1]]) + chr(10))
sys.addaudithook(note)
"""
# What a go over SSH that finds everything done has no use for.
_UNUSED = {"tenacity", "httpx", "rich", "numpy", "torch", "transformers", "zstandard", "dispatch.pulling.pull"}


@pytest.mark.sshd
def test_a_go_that_has_nothing_to_do_over_ssh_is_quick(
    jobs: Any, ask: Make, session: Make, shared_sshd: Any, enrolled: Make, built: Make, laptop: Any, checkout: Any
) -> None:
    """Under 1.5 s on a quiet machine; what is bounded here is what it does in that time."""
    host = enrolled(shared_sshd)
    built(host, ask(host))
    assert session(host).go(ask(host)) is ExitCode.PASS
    counted, words = laptop.home / "counted", ("go", "tiny", "--host", "box")
    (laptop.home / "sitecustomize.py").write_text(_COUNTING)
    more = {"EVIDENCE_DIR": str(laptop.cwd / "runs")}
    logins, commands = shared_sshd.logins(), shared_sshd.log.read_text().count("Starting session: command")
    watched = {"PYTHONPATH": str(laptop.home), "COUNTED": str(counted), "PYTHONPROFILEIMPORTTIME": "1"}
    done = laptop.process(*words, cwd=checkout, **more, **watched)
    assert "no changes. distill-" in done.stdout, done.stdout + done.stderr
    # One connection, one start of the agent; beside it OpenSSH is asked for its settings, and git for the commit.
    assert shared_sshd.logins() - logins == 1
    assert shared_sshd.log.read_text().count("Starting session: command") - commands == 1
    started = [ast.literal_eval(line) for line in counted.read_text().splitlines()]
    assert sorted(os.path.basename(argv[0]) for argv in started) == ["git", "ssh"]
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dispatch.session" in imported
    assert not imported & _UNUSED
    spent: list[float] = []
    for _ in range(3):
        begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = laptop.process(*words, cwd=checkout, **more)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - begin
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        print(f"no-op go over ssh: {wall:.2f} s, {spent[-1]:.2f} s of processor time")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "no changes. distill-" in done.stdout
    assert min(spent) < 2.5
    assert len(jobs.starts()) == 4
