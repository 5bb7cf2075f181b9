"""The planner is a pure function: what it sees decides, how often it is asked does not, and readings do not show."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dispatch.building.build import BuildNames, choose_build
from dispatch.hosts.facts import HostFacts
from dispatch.hosts.inventory import Host, PinnedKey
from dispatch.planning.ask import Ask
from dispatch.planning.choice import choose
from dispatch.planning.memory import judge_memory
from dispatch.planning.plan import Plan, make_plan
from dispatch.planning.preview import ending, render
from dispatch.preflight.need import need_of
from latentforge.errors import RefusedError
from latentforge.spec.pipeline import PlannedRun, pipeline_runs
from latentforge.verdicts import ExitCode

Make = Callable[..., Any]
GIB = 2**30
KEY = PinnedKey(type="ssh-ed25519", sha256="SHA256:" + "Q" * 43, date="2026-11-09")
BOX = Host(name="box", address="127.0.0.1", root="/r", keys=(KEY,))
PASSED = {"state": "finished", "outcome": "pass", "code": 0, "exit": 0, "ended": 1_800_000_000.0}
FAILED = {**PASSED, "outcome": "fail", "code": 1, "exit": 1}


def planned_of(ask: Ask) -> dict[str, PlannedRun]:
    return {run.kind: run for run in pipeline_runs(ask.spec, digests={}, code=ask.code, lock=ask.lock)}


def facts_of(runs: dict[str, Any] | None = None, **more: Any) -> HostFacts:
    machine = {"hostname": "h", "arch": "aarch64", "cores": 20, "mem_total": 128 * GIB, "mem_available": 100 * GIB}
    machine |= {"disk_free": 500 * GIB, **more.pop("host", {})}
    python = more.pop("python", {"executable": "/usr/bin/python3", "version": "3.12.3"})
    return HostFacts.model_validate({"host": machine, "python": python, "root": "/r", "runs": runs or {}, **more})


def plan_of(ask: Ask, facts: HostFacts, **more: Any) -> Plan:
    runs = choose(list(planned_of(ask).values()), facts, attempt_next=ask.attempt_next)
    build = None
    if ask.bundle is not None:
        build = choose_build(ask, facts, wanted=any(run.will == "run" for run in runs))
    return make_plan(ask, facts, runs, build=build, memory=judge_memory(ask, facts), **more)


def wills(plan: Plan) -> dict[str, str]:
    return {step.name: step.will for step in plan.steps}


@pytest.fixture(scope="module")
def asks(checkout: Any) -> dict[str, Ask]:
    """One request for an SSH host and one for local, made once: the planner must not change them."""
    from dataclasses import replace

    from dispatch.planning.ask import asked

    return {
        "box": asked("tiny", BOX, env={}, folder=checkout),
        "local": replace(asked("tiny", Host(name="local"), env={}, folder=checkout), unfit=None),
        "codec": asked("tiny-autoencoder", BOX, env={}, folder=checkout),
        "latent": asked("tiny-latent", BOX, env={}, overrides=["latent.beside=true"], folder=checkout),
    }


def test_an_empty_host_runs_everything_in_order(asks: dict[str, Ask]) -> None:
    plan = plan_of(asks["box"], facts_of())
    assert list(wills(plan).items()) == [
        ("trust", "keep"),
        ("preflight", "check"),
        ("code", "send"),
        ("build", "run"),
        ("data", "run"),
        ("teacher", "run"),
        ("score", "run"),
        ("distill", "run"),
        ("follow", "follow"),
        ("collect", "run"),
        ("evidence", "write"),
    ]
    assert not plan.changes_nothing
    assert not plan.refusals


def test_a_pipeline_for_a_codec_asks_no_teacher_and_says_its_own_memory_and_disk(asks: dict[str, Ask]) -> None:
    ask, facts = asks["codec"], facts_of()
    plan = plan_of(ask, facts)
    assert [name for name in wills(plan) if wills(plan)[name] == "run"] == ["build", "data", "autoencoder", "collect"]
    assert not plan.refusals
    need = need_of(ask, facts)
    assert need.memory is not None
    assert [term.name for term in need.memory.terms] == [
        "codec",
        "states",
        "checkpoint",
        "activations",
        "logits",
        "runtime",
    ]
    assert [term.name for term in need.disk] == ["environment", "build", "data", "codec", "logs"]
    assert need.wanted["kinds"] == ("data", "autoencoder")
    assert {"autoencoder.latent", "data.chunk", "through"} <= set(need.wanted["fields"])
    assert not any(field.startswith(("distill.", "score.", "teacher.")) for field in need.wanted["fields"])
    assert need.wanted["falsifiers"] == ("F-LATENT-AE-001", "F-LATENT-AE-002")


def test_a_pipeline_for_a_latent_student_runs_what_its_signals_need_and_says_its_disk(asks: dict[str, Ask]) -> None:
    ask, facts = asks["latent"], facts_of()
    plan = plan_of(ask, facts)
    made = ["data", "teacher", "score", "continuations", "autoencoder", "distill", "latent"]
    assert [name for name in wills(plan) if wills(plan)[name] == "run"] == ["build", *made, "collect"]
    assert not plan.refusals
    need = need_of(ask, facts)
    assert need.wanted["kinds"] == tuple(made)
    assert {"latent.sample_weight", "continuations.count", "distill.steps"} <= set(need.wanted["fields"])
    assert {"F-LATENT-AE-001", "F-LATENT-CAUSAL-001", "F-LATENT-KD-001"} <= set(need.wanted["falsifiers"])
    disk = [term.name for term in need.disk]
    assert {"data", "codec", "continuations", "latent student", "teacher", "targets", "student", "logs"} <= set(disk)


def test_of_other_code_what_a_latent_student_is_made_from_is_kept_and_the_student_is_not(asks: dict[str, Ask]) -> None:
    planned = planned_of(asks["latent"])
    kin = {
        planned[role].kin: [{"id": f"{role}-" + "7" * 20, "identity": "{}", **PASSED}]
        for role in ("continuations", "latent")
    }
    plan = plan_of(asks["latent"], facts_of(kin_runs=kin))
    assert (wills(plan)["continuations"], wills(plan)["latent"]) == ("keep", "run")


def test_a_codec_of_other_code_that_passed_is_kept(asks: dict[str, Ask]) -> None:
    planned = planned_of(asks["codec"])
    other = "autoencoder-" + "7" * 20
    kin = {planned["autoencoder"].kin: [{"id": other, "identity": "{}", **PASSED}]}
    plan = plan_of(asks["codec"], facts_of(kin_runs=kin))
    assert wills(plan)["autoencoder"] == "keep"
    assert wills(plan)["data"] == "keep"
    assert plan.final.run == other
    assert plan.final.state is not None
    assert plan.final.state.passed, "it is told as what it is, and not as the run that nobody made"


def test_a_host_where_all_passed_and_all_was_collected_changes_nothing(asks: dict[str, Ask]) -> None:
    ids = {run.run_id: PASSED for run in planned_of(asks["local"]).values()}
    plan = plan_of(asks["local"], facts_of(ids), copied=frozenset(ids))
    assert plan.changes_nothing
    assert {will for name, will in wills(plan).items() if name != "preflight"} == {"keep"}


READINGS = st.fixed_dictionaries(
    {
        "mem_available": st.integers(40 * GIB, 128 * GIB),
        "disk_free": st.integers(3 * GIB, 900 * GIB),
        "boot_id": st.text("abc0", min_size=4, max_size=8),
    }
)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(one=READINGS, two=READINGS, where=st.sampled_from(["box", "local"]))
def test_readings_that_change_no_judgement_change_no_byte_of_a_preview(
    asks: dict[str, Ask], one: dict[str, Any], two: dict[str, Any], where: str
) -> None:
    ask = asks[where]
    plans = [plan_of(ask, facts_of(host=reading)) for reading in (one, two)]
    assert render(plans[0], ask) == render(plans[1], ask)
    assert plans[0].digest == plans[1].digest
    assert plans[0].as_json() == plans[1].as_json()


STATES = st.sampled_from(
    [
        {"state": "absent"},
        {"state": "reserved"},
        {"state": "queued"},
        {"state": "running"},
        {"state": "unsupervised"},
        PASSED,
        FAILED,
        {**PASSED, "outcome": "killed", "code": None, "signal": 9, "exit": 5},
        {"state": "lost", "outcome": "unknown", "exit": 3},
        {"state": "interrupted", "outcome": "unknown", "exit": 3},
    ]
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(states=st.fixed_dictionaries(dict.fromkeys(("data", "teacher", "score", "distill"), STATES)))
def test_whatever_states_there_are_no_ended_run_is_started_and_nothing_unknown_turns_green(
    asks: dict[str, Ask], states: dict[str, Any]
) -> None:
    ask = asks["local"]
    planned = planned_of(ask)
    plan = plan_of(ask, facts_of({planned[kind].run_id: state for kind, state in states.items()}))
    for run in plan.runs:
        state = states[run.kind]["state"]
        if run.will == "run":
            assert state in ("absent", "reserved")
        if run.will == "follow":
            assert state in ("queued", "running", "unsupervised")
        if run.will == "keep" and run.kind == "distill":
            assert states["distill"] == PASSED
    # Every input of a run that starts has passed, or goes before it in the chain.
    done = {run.run for run in plan.runs if states[run.kind] == PASSED} | {run.run for run in plan.chain}
    for run in plan.runs:
        if run.will == "run":
            assert {ref["run"] for ref in run.resolved.values() if "run" in ref} <= done
    assert plan.final.will == "ended" or plan.final.kind == "distill"


def test_a_plan_is_applied_as_it_was_shown_or_refused_with_what_changed(asks: dict[str, Ask]) -> None:
    from dataclasses import replace

    from dispatch.apply import same_judgements
    from dispatch.planning.plan import Step

    ask = asks["box"]
    shown = plan_of(ask, facts_of())
    warmup = Step("warmup", "run", "new build", "warmup-1")
    longer = replace(shown, steps=(*shown.steps, warmup))
    systemd = replace(shown, runner=replace(shown.runner, name="systemd", why="a user manager answers"))

    def refusal(before: Plan, now: Plan) -> str:
        with pytest.raises(RefusedError, match=r"^box changed since the plan was shown: ") as refused:
            same_judgements(before, now, ask)
        return str(refused.value)

    same_judgements(shown, plan_of(ask, facts_of(host={"mem_available": 90 * GIB})), ask)
    assert "warmup was not needed, is now 'run' (new build)" in refusal(shown, longer)
    assert "warmup was 'run', is now left out" in refusal(longer, shown)
    assert "the runner was systemd, is now detached" in refusal(systemd, shown)
    assert "preflight was 'check', is now 'refuse'" in refusal(shown, plan_of(ask, facts_of(host={"disk_free": GIB})))
    # Somebody else did it all meanwhile: nothing is left to prove.
    done = plan_of(ask, facts_of({run.run_id: PASSED for run in planned_of(ask).values()}))
    assert not done.starts_something
    same_judgements(longer, done, ask)


def test_an_earlier_run_that_failed_stops_the_pipeline_and_is_what_is_reported(asks: dict[str, Ask]) -> None:
    ask = asks["local"]
    planned = planned_of(ask)
    plan = plan_of(ask, facts_of({planned["data"].run_id: PASSED, planned["teacher"].run_id: FAILED}))
    assert wills(plan)["teacher"] == "ended"
    assert wills(plan)["score"] == wills(plan)["distill"] == "skip"
    assert plan.final.run == planned["teacher"].run_id
    assert plan.chain == ()


def test_a_finished_run_of_other_code_is_kept_except_the_last_and_that_is_said(asks: dict[str, Ask]) -> None:
    ask = asks["local"]
    planned = planned_of(ask)
    other = {kind: f"{kind}-{'b' * 20}" for kind in planned}
    kin = {
        planned[kind].kin: [{"id": other[kind], "state": "finished", "outcome": "pass", "attempt": 1}]
        for kind in planned
    }
    plan = plan_of(ask, facts_of(kin_runs=kin))
    by_kind = {run.kind: run for run in plan.runs}
    assert [by_kind[kind].run for kind in ("data", "teacher", "score")] == [
        other[k] for k in ("data", "teacher", "score")
    ]
    assert "made by other code" in by_kind["score"].because
    assert by_kind["distill"].will == "run"
    assert by_kind["distill"].resolved["targets"] == {"run": other["score"]}
    assert by_kind["distill"].run == planned["distill"].run_id


def test_only_a_passing_kin_is_kept(asks: dict[str, Ask]) -> None:
    ask = asks["local"]
    planned = planned_of(ask)["data"]
    for state in ({"state": "running"}, {"state": "finished", "outcome": "fail"}, {"state": "lost"}):
        kin = {planned.kin: [{"id": "data-" + "b" * 20, "attempt": 1, **state}]}
        assert wills(plan_of(ask, facts_of(kin_runs=kin)))["data"] == "run"


def test_the_newest_attempt_is_the_one_that_counts(asks: dict[str, Ask]) -> None:
    ask = asks["local"]
    planned = planned_of(ask)
    second = planned["distill"].identity.at_attempt(2).run_id
    states = {run.run_id: PASSED for run in planned.values()} | {planned["distill"].run_id: FAILED, second: PASSED}
    assert plan_of(ask, facts_of(states)).final.run == second


def test_another_attempt_is_refused_while_one_goes_on(asks: dict[str, Ask]) -> None:
    from dataclasses import replace

    ask = replace(asks["local"], attempt_next=True)
    planned = planned_of(ask)
    states = {run.run_id: PASSED for run in planned.values()} | {planned["distill"].run_id: {"state": "running"}}
    with pytest.raises(RefusedError, match="goes on"):
        plan_of(ask, facts_of(states))


@pytest.mark.parametrize(
    ("facts", "code", "words"),
    [
        ({"host": {"disk_free": 10_000}}, ExitCode.FAIL, "free in /r on box, 2.5 GiB needed"),
        ({"host": {"mem_available": GIB // 2}}, ExitCode.FAIL, "not enough now"),
        ({"python": {"executable": "/usr/bin/python3", "version": "3.10.4"}}, ExitCode.FAIL, "is Python 3.10.4"),
        ({"lease": {"device": {"run": "teacher-" + "c" * 20, "pid": 7}}}, ExitCode.BUSY, "held by teacher-cccc"),
    ],
)
def test_an_unfit_host_is_refused_with_the_reason_and_a_remedy(
    asks: dict[str, Ask], facts: dict[str, Any], code: ExitCode, words: str
) -> None:
    plan = plan_of(asks["box"], facts_of(**facts))
    assert plan.refusals[0].code is code
    assert words in plan.refusals[0].why
    assert plan.refusals[0].next


def test_a_build_that_failed_is_reported_and_never_used(asks: dict[str, Ask]) -> None:
    ask = asks["box"]
    names = BuildNames.of(ask)
    build = choose_build(ask, facts_of({names.identity.run_id: FAILED}), wanted=True)
    assert build.will == "ended"
    complete = facts_of(builds={names.build: True}, venvs={names.venv: True})
    assert choose_build(ask, complete, wanted=True).will == "keep"
    # A build without its environment, or the other way round, is no build.
    for half in ({"builds": {names.build: True}}, {"venvs": {names.venv: True}}):
        assert choose_build(ask, facts_of(**half), wanted=True).will == "run"


def test_a_temperature_without_tails_plans_live_targets_and_says_so(ask: Make) -> None:
    request = ask(None, "distill.temperature=2.0")
    text = render(plan_of(request, facts_of()), request)
    assert "note: T = 2 is not in score.temperatures [1]: planned with live dense targets" in text
    assert "score " not in text.split("note:")[0].replace("score.temperatures", "")


def test_the_command_to_copy_carries_the_flags_and_the_environment_that_steered_the_plan(ask: Make) -> None:
    request = ask(None, "distill.steps=61", env={"ALPHA": "0.4", "LR": "1e-4", "UNUSED": "x"})
    assert request.command == "ALPHA=0.4 LR=1e-4 latentforge dispatch go tiny --set distill.steps=61 --host local"


def test_the_command_to_copy_goes_to_the_same_place_and_asks_for_the_same_attempt(ask: Make) -> None:
    request = ask(None, env={"GX10_REPO_PATH": "/data/lf", "EVIDENCE_DIR": "kept here"}, attempt_next=True, wait=True)
    assert request.command.startswith("EVIDENCE_DIR='kept here' GX10_REPO_PATH=/data/lf latentforge dispatch go tiny")
    shown = ending(plan_of(ask(), facts_of()), request)
    assert shown.endswith(f"To do it:  {request.command} --attempt next --wait")


def test_the_bundle_has_the_same_bytes_for_the_same_files_and_others_for_one_byte(tmp_path: Any) -> None:
    import os

    from dispatch.building.bundle import pack
    from latentforge.spec.code import CodeSource

    for name in ("b", "a"):
        (tmp_path / name).write_text(name)
    one = CodeSource(tmp_path, {"pyproject.toml": tmp_path / "a", "csrc/x.cpp": tmp_path / "b"})
    two = CodeSource(tmp_path, {"csrc/x.cpp": tmp_path / "b", "pyproject.toml": tmp_path / "a"})
    first = pack(one)
    os.utime(tmp_path / "a", (1, 1))
    os.chmod(tmp_path / "b", 0o700)
    assert pack(two) == first
    (tmp_path / "a").write_text("c")
    assert pack(CodeSource(tmp_path, one.files)).sha256 != first.sha256


def test_a_unit_that_cannot_be_is_refused_before_anything_is_launched(asks: dict[str, Ask]) -> None:
    from dataclasses import replace

    box = asks["box"]
    wanted = replace(box, host=box.host.model_copy(update={"runner": "systemd"}))
    seen = {"systemd": False, "why": "lingering is off: loginctl enable-linger", "linger": False}
    plan = plan_of(wanted, facts_of(runner=seen))
    assert "lingering is off" in plan.refusals[0].why
    assert plan.refusals[0].code == ExitCode.FAIL
    assert "runner: detached (lingering is off" in render(plan_of(box, facts_of(runner=seen)), box)
    units = plan_of(box, facts_of(runner={"systemd": True, "why": "systemd 255, lingering is on", "linger": True}))
    assert "; systemd unit, device lease free" in render(units, box)
    assert (units.as_json()["runner"]["name"], units.refusals) == ("systemd", ())


@pytest.mark.parametrize("backend", ["vllm-local", "vllm-local-inproc"])
def test_a_vllm_of_ours_without_an_environment_is_refused_before_anything_is_planned(
    ask: Callable[..., Ask], backend: str, tmp_path: Path
) -> None:
    engine = (f"teacher.backend={backend}", "teacher.model=/models/t")
    for host in (Host(name="local"), BOX):
        with pytest.raises(RefusedError, match=r"teacher\.environment names none") as refused:
            ask(host, *engine)
        assert "--set teacher.environment=" in str(refused.value.next)
    with pytest.raises(RefusedError, match="has no bin/python"):
        ask(None, *engine, f"teacher.environment={tmp_path}")
    assert ask(BOX, *engine, "teacher.environment=/opt/vllm").spec.teacher.environment == "/opt/vllm"
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").touch()
    assert ask(None, *engine, env={"LATENTFORGE_VLLM_ENVIRONMENT": str(tmp_path)}).spec.teacher.backend == backend
