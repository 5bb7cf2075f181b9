"""A full run waits for a fresh canary that passed; what is not fresh, or did not pass, vouches for nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dispatch.hosts.facts import HostFacts
from dispatch.planning.choice import ChosenRun, choose
from latentforge.errors import RefusedError
from latentforge.spec.canary import CANARY
from latentforge.spec.pipeline import PlannedRun, effective_pipeline, pipeline_runs
from latentforge.spec.resolve import resolve_pipeline
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]
CODE, LOCK, CONTENT = "1" * 64, "2" * 64, "3" * 64
PASSED = {"state": "finished", "outcome": "pass", "code": 0, "exit": 0}
FAILED = {**PASSED, "outcome": "fail", "code": 1, "exit": 1}


class Line(NamedTuple):
    """A full pipeline by its recipe, and the roles of its last run and of that one's canary."""

    recipe: str
    canary: str
    long: str


TOKEN, LATENT = Line("tiny", "canary", "distill"), Line("tiny-latent", "latent-canary", "latent")


@pytest.fixture(params=[TOKEN, LATENT], ids=lambda line: line.long)
def line(request: pytest.FixtureRequest) -> Line:
    """Each line in its turn."""
    found: Line = request.param
    return found


def planned_of(
    *overrides: str, code: str = CODE, lock: str = LOCK, recipe: str = TOKEN.recipe
) -> dict[str, PlannedRun]:
    words = ["profile=full", "data.corpus=/c", *overrides]
    spec, _ = effective_pipeline(resolve_pipeline(recipe, overrides=words).spec)
    return {run.role: run for run in pipeline_runs(spec, digests={"/c": CONTENT}, code=code, lock=lock)}


def choice_of(line: Line, states: dict[str, Any], **more: Any) -> dict[str, ChosenRun]:
    """The choice where the roles have these states, and those before the canary passed; ``boot`` and ``driver`` are
    those that the canary ran under."""
    planned = planned_of(recipe=line.recipe)
    canary = planned[line.canary]
    attempts = more.pop("attempts", {1: states.get(line.canary, {"state": "absent"})})
    earlier = {role: PASSED for role in planned if role not in (line.canary, line.long)}
    runs = {planned[role].run_id: state for role, state in (earlier | states).items() if role != line.canary}
    runs |= {canary.identity.at_attempt(n).run_id: state for n, state in attempts.items()}
    ran = {"boot_id": more.pop("boot", "boot-1"), "driver": more.pop("driver", "580.1")}
    kin = [{"id": canary.identity.at_attempt(n).run_id, "attempt": n, **state, **ran} for n, state in attempts.items()]
    host = {"boot_id": "boot-1", "driver": "580.1"}
    python = {"executable": "/usr/bin/python3", "version": "3.12.3"}
    facts = HostFacts.model_validate(
        {"host": host, "python": python, "root": "/r", "runs": runs, "kin_runs": {canary.kin: kin}}
    )
    chosen = choose(list(planned.values()), facts, attempt_next=more.pop("attempt_next", False))
    return {one.kind: one for one in chosen}


def test_a_full_pipeline_has_a_canary_of_few_steps_with_an_early_checkpoint_and_a_smoke_pipeline_has_none() -> None:
    planned = planned_of("distill.steps=100000", "distill.checkpoint_every=5000", "distill.warmup_steps=2000")
    assert list(planned) == ["data", "teacher", "score", "canary", "distill"]
    asked = planned["canary"].identity.spec["distill"]
    assert (asked["steps"], asked["checkpoint_every"], asked["require"]) == (8, 4, [CANARY])
    assert asked["warmup_steps"] <= 4
    assert planned["distill"].resolved["canary"] == {"run": planned["canary"].run_id}
    spec, _ = effective_pipeline(resolve_pipeline("tiny").spec)
    assert [run.role for run in pipeline_runs(spec, digests={}, code=CODE, lock=LOCK)] == [
        "data", "teacher", "score", "distill",
    ]  # fmt: skip


@pytest.mark.parametrize("other", ["distill.steps=61", "distill.checkpoint_every=7"])
def test_a_canary_vouches_for_any_number_of_steps_and_checkpoints(other: str) -> None:
    assert planned_of(other)["canary"].run_id == planned_of()["canary"].run_id
    assert planned_of(other)["distill"].run_id != planned_of()["distill"].run_id


@pytest.mark.parametrize(
    "other", ["distill.learning_rate=1e-4", "distill.warmup_steps=2000", "seed=8", "distill.batch_size=8", "score.k=8"]
)
def test_another_training_needs_another_canary(other: str) -> None:
    assert planned_of(other)["canary"].run_id != planned_of()["canary"].run_id


@pytest.mark.parametrize("other", [{"code": "4" * 64}, {"lock": "5" * 64}])
def test_another_code_or_lock_file_needs_another_canary(other: dict[str, str]) -> None:
    assert planned_of(**other)["canary"].run_id != planned_of()["canary"].run_id


def test_a_fresh_canary_that_passed_is_kept(line: Line) -> None:
    chosen = choice_of(line, {line.canary: PASSED})
    assert (chosen[line.canary].will, chosen[line.long].will) == ("keep", "run")


@pytest.mark.parametrize(
    ("then", "why"),
    [
        ({"boot": "boot-0"}, "the host was restarted since"),
        ({"driver": "570.9"}, "the driver was 570.9, is 580.1"),
        ({"driver": None}, "the driver was none, is 580.1"),
        ({"boot": None}, "is not known"),
    ],
)
def test_a_canary_of_another_boot_or_driver_runs_again_from_step_0(line: Line, then: dict[str, Any], why: str) -> None:
    planned = planned_of(recipe=line.recipe)
    chosen = choice_of(line, {line.canary: PASSED}, **then)
    again = chosen[line.canary]
    assert (again.will, again.predecessor) == ("run", None)
    assert why in again.because
    assert again.run == planned[line.canary].identity.at_attempt(2).run_id
    assert chosen[line.long].resolved["canary"] == {"run": again.run}
    assert chosen[line.long].run == planned[line.long].run_id


def test_a_stale_canary_is_nobody_s_business_once_the_full_run_has_passed(line: Line) -> None:
    chosen = choice_of(line, {line.canary: PASSED, line.long: PASSED}, boot="boot-0")
    assert {one.will for one in chosen.values()} == {"keep"}


def test_a_failed_canary_stops_the_chain_and_is_run_again_only_by_another_attempt(line: Line) -> None:
    chosen = choice_of(line, {line.canary: FAILED})
    assert (chosen[line.canary].will, chosen[line.long].will) == ("ended", "skip")
    again = choice_of(line, {line.canary: FAILED}, attempt_next=True)
    assert (again[line.canary].will, again[line.canary].predecessor, again[line.long].will) == ("run", None, "run")


def test_there_is_an_end_to_attempts() -> None:
    with pytest.raises(RefusedError, match="is attempt 64, the last"):
        choice_of(TOKEN, {}, attempts={64: PASSED}, boot="boot-0")


def test_a_canary_of_other_code_is_never_taken_over(line: Line) -> None:
    planned, other = planned_of(recipe=line.recipe), planned_of(recipe=line.recipe, code="4" * 64)
    facts = HostFacts.model_validate(
        {
            "host": {"boot_id": "b", "driver": None},
            "python": {"executable": "p", "version": "3.12"},
            "root": "/r",
            "runs": {run.run_id: PASSED for role, run in planned.items() if role not in (line.canary, line.long)},
            "kin_runs": {planned[line.canary].kin: [{"id": other[line.canary].run_id, "boot_id": "b", **PASSED}]},
        }
    )
    chosen = {one.kind: one.will for one in choose(list(planned.values()), facts, attempt_next=False)}
    assert chosen[line.canary] == "run"


@pytest.fixture
def full(ask: Make, tmp_path: Path) -> Make:
    """A request for the full pipeline on a corpus of the user's."""
    (tmp_path / "corpus.txt").write_text("one line of text after the other\n" * 2000)
    return lambda *more, **how: ask(None, "profile=full", f"data.corpus={tmp_path}/corpus.txt", *more, **how)


def test_go_runs_the_canary_before_the_full_run_and_shows_it(
    jobs: Any, full: Make, session: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session().go(full()) is ExitCode.PASS
    out = capsys.readouterr().out
    assert "\n  canary     run     distill-" in out
    assert len(jobs.starts()) == 5
    launch = json.loads(_launch(jobs.starts()[-1]).read_text())
    assert launch["resolved"]["canary"] == {"run": jobs.starts()[-2]}
    # Another number of steps is another full run under the same canary.
    assert session().go(full("distill.steps=61")) is ExitCode.PASS
    assert len(jobs.starts()) == 6
    assert "\n  canary     keep    distill-" in capsys.readouterr().out


def test_a_canary_that_fails_stops_the_chain_before_the_full_run(
    jobs: Any, full: Make, session: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import dispatch.apply

    real = dispatch.apply.job

    def failing(one: Any, facts: Any, plan: Any) -> Any:
        argv, env = real(one, facts, plan)
        if one.kind == "canary":
            argv[-1] = json.dumps({**json.loads(argv[-1]), "fail": True})
        return argv, env

    with monkeypatch.context() as broken:
        broken.setattr("dispatch.apply.job", failing)
        assert session().go(full()) is ExitCode.FAIL
    assert len(jobs.starts()) == 4
    assert not _launch(_final(capsys)).exists(), "the full run was reserved, and is taken back"
    assert session().go(full()) is ExitCode.FAIL, "a bare go reports it and starts nothing"
    assert len(jobs.starts()) == 4
    assert session().go(full(attempt_next=True)) is ExitCode.PASS
    assert len(jobs.starts()) == 6


def test_a_restart_of_the_host_makes_the_next_full_run_wait_for_a_new_canary(
    jobs: Any, full: Make, session: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert session().go(full()) is ExitCode.PASS
    journal = _launch(jobs.starts()[-2]).with_name("journal.jsonl")
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    for line in lines:
        if "boot_id" in line:
            line["boot_id"] = "0" * 8
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    assert session().go(full("distill.steps=61")) is ExitCode.PASS
    assert "the host was restarted since" in capsys.readouterr().out
    assert len(jobs.starts()) == 7


def _launch(run: str) -> Path:
    import os

    return Path(os.environ["XDG_STATE_HOME"]) / "latentforge/runs" / run / "launch.json"


def _final(capsys: pytest.CaptureFixture[str]) -> str:
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  distill "))
    return next(word for word in line.split() if word.startswith("distill-"))
