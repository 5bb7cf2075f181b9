"""A falsifier passes only where its check passed and its control was seen to fail; nothing unknown turns green."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from asyncio import CancelledError
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from latentforge.cli import main
from latentforge.contracts import Checked, Finding, check_contract, load_contracts, overall
from latentforge.contracts import load as loading
from latentforge.contracts.machine import Machine
from latentforge.verdicts import ExitCode, Outcome, Verdict

CPU = Machine("x86_64", ())

TEMPLATE = """\
contract: {name}
version: 1
title: a planted contract
description: planted
references: [none]
{extra}
falsifiers:
  - id: {id}
    statement: it holds
    prediction: it passes
    check: {check}
    control: {{name: mutant, with: {{mutant: planted}}}}
    if_fails: it does not hold
"""

Check = Callable[..., Any]


@pytest.fixture
def contract(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a contract whose check is the given function."""
    module = ModuleType("latentforge.planted_checks")
    monkeypatch.setitem(sys.modules, "latentforge.planted_checks", module)
    monkeypatch.setattr(loading, "contracts_folder", lambda: tmp_path)

    def plant(
        check: Check | None,
        *,
        name: str = "planted",
        id: str = "F-PLANTED-001",
        extra: str = "",
        reference: str | None = None,
    ) -> Path:
        function = name.replace("-", "_")
        if check is not None:
            setattr(module, function, check)
        reference = reference or f"latentforge.planted_checks:{function}"
        (tmp_path / f"{name}.yaml").write_text(TEMPLATE.format(name=name, id=id, extra=extra, check=reference))
        return tmp_path

    return plant


def outcome(folder: Path, machine: Machine = CPU) -> tuple[Outcome, str, ExitCode]:
    contracts = load_contracts(folder)
    results = [result for one in contracts for result in check_contract(one, contracts, machine=machine)]
    return results[0].verdict.outcome, results[0].verdict.text, overall(results)


def honest(*, mutant: str | None = None) -> Finding:
    return Finding(mutant is None, f"error {0.0 if mutant is None else 1.0}", {"error": 0.0 if mutant is None else 1.0})


def raising(when: str | None) -> Check:
    def check(*, mutant: str | None = None) -> Finding:
        if mutant == when:
            raise RuntimeError("broken\nin two lines")
        return Finding(True, "fine")

    return check


def test_a_check_that_passes_and_whose_control_fails_is_a_pass(contract: Callable[..., Path]) -> None:
    assert outcome(contract(honest)) == (Outcome.PASS, "error 0.0", ExitCode.PASS)


def test_a_check_that_fails_is_a_fail(contract: Callable[..., Path]) -> None:
    assert outcome(contract(lambda *, mutant=None: Finding(False, "bad")))[::2] == (Outcome.FAIL, ExitCode.FAIL)


def test_a_check_without_a_body_is_caught_by_its_control(contract: Callable[..., Path]) -> None:
    found, text, code = outcome(contract(lambda *, mutant=None: Finding(True, "always")))
    assert (found, code) == (Outcome.FAIL, ExitCode.FAIL)
    assert text.startswith("control not caught: mutant passes")


def test_a_check_that_cannot_decide_is_unknown(contract: Callable[..., Path]) -> None:
    assert outcome(contract(lambda *, mutant=None: Finding(None, "no data")))[::2] == (
        Outcome.UNKNOWN,
        ExitCode.UNKNOWN,
    )


def test_a_control_that_cannot_decide_is_unknown(contract: Callable[..., Path]) -> None:
    found, text, code = outcome(contract(lambda *, mutant=None: Finding(None if mutant else True, "x")))
    assert (found, code) == (Outcome.UNKNOWN, ExitCode.UNKNOWN)
    assert "was not decided" in text


@pytest.mark.parametrize("when", [None, "planted"])
def test_a_check_or_control_that_raises_is_unknown_with_the_reason_on_one_line(
    contract: Callable[..., Path], when: str | None
) -> None:
    found, text, code = outcome(contract(raising(when)))
    assert (found, code) == (Outcome.UNKNOWN, ExitCode.UNKNOWN)
    assert "RuntimeError: broken in two lines" in text


def test_a_check_that_needs_what_is_not_installed_says_so(contract: Callable[..., Path]) -> None:
    def check(*, mutant: str | None = None) -> Finding:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    found, text, code = outcome(contract(check))
    assert (found, code) == (Outcome.UNKNOWN, ExitCode.UNKNOWN)
    assert "the check cannot run: it needs torch, which is not installed" in text


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("latentforge.planted_checks:absent", "has no absent"),
        ("latentforge.absent:check", "there is no module latentforge.absent"),
        ("latentforge.errors:__doc__", "is not a function"),
    ],
)
def test_a_check_that_is_not_there_is_unknown(contract: Callable[..., Path], reference: str, reason: str) -> None:
    found, text, code = outcome(contract(None, reference=reference))
    assert (found, code) == (Outcome.UNKNOWN, ExitCode.UNKNOWN)
    assert reason in text


@pytest.mark.parametrize(
    "check",
    [
        lambda *, mutant=None: True,
        lambda *, mutant=None: None,
        lambda *, mutant=None: Finding(1, "one"),  # type: ignore[arg-type]
        lambda: Finding(True, "takes no mutant"),
        lambda *, mutant=None: sys.exit(0),
        lambda *, mutant=None: os._exit(0),
        lambda *, mutant=None: (_ for _ in ()).throw(GeneratorExit()),
        lambda *, mutant=None: (_ for _ in ()).throw(CancelledError()),
        lambda *, mutant=None: Finding(mutant is None, None),  # type: ignore[arg-type]
        lambda *, mutant=None: Finding(mutant is None, "one", {"value": object()}),
        lambda *, mutant=None: Finding(mutant is None, "one", {("a", "key"): 1}),  # type: ignore[dict-item]
        lambda *, mutant=None: Finding(mutant is None, "one", [1]),  # type: ignore[arg-type]
        int,
    ],
)
def test_a_check_that_does_not_answer_with_a_finding_is_unknown(contract: Callable[..., Path], check: Check) -> None:
    assert outcome(contract(check))[0] is Outcome.UNKNOWN


ANSWERS: dict[str, Any] = {
    "passes": lambda: Finding(True, "fine"),
    "fails": lambda: Finding(False, "bad"),
    "undecided": lambda: Finding(None, "no data"),
    "raises": lambda: 1 / 0,
    "answers True": lambda: True,
}
TABLE = {("passes", "fails"): Outcome.PASS, ("passes", "passes"): Outcome.FAIL}
"""What a check and its control answer together; a check that fails is FAIL whatever its control, all else UNKNOWN."""


@pytest.mark.parametrize("control", ANSWERS)
@pytest.mark.parametrize("of_check", ANSWERS)
def test_only_a_check_that_passes_with_a_control_that_fails_is_green(
    contract: Callable[..., Path], of_check: str, control: str
) -> None:
    wanted = Outcome.FAIL if of_check == "fails" else TABLE.get((of_check, control), Outcome.UNKNOWN)
    found, _, code = outcome(contract(lambda *, mutant=None: ANSWERS[control if mutant else of_check]()))
    assert found is wanted
    assert (code is ExitCode.PASS) == (wanted is Outcome.PASS)


def checked(outcome: Outcome, counts: bool) -> Checked:
    """A falsifier that was looked at, of which nothing is known but this."""
    return Checked(None, None, Verdict("F-A-001", outcome, ""), None, 0.0, counts)  # type: ignore[arg-type]


RESULTS = st.lists(st.builds(checked, st.sampled_from(list(Outcome)), st.booleans()), max_size=8)
_RANK = [ExitCode.FAIL, ExitCode.UNKNOWN, ExitCode.PASS]


def law_of_ends(*some: Checked) -> None:
    """AssertionError where a check of these does not end as the worst part that counts does."""
    counted = [one for one in some if one.counts]
    code = overall(some)
    assert code is overall(counted) is overall(some[::-1])
    passes = bool(counted) and all(one.verdict.outcome is Outcome.PASS for one in counted)
    assert (code is ExitCode.PASS) == passes, (
        f"exit code {int(code)} of {[one.verdict.outcome.name for one in counted]}"
    )


@given(RESULTS, RESULTS)
def test_the_end_of_a_check_is_its_worst_part_and_what_does_not_count_changes_nothing(
    some: list[Checked], more: list[Checked]
) -> None:
    law_of_ends(*some)
    if any(one.counts for one in some):
        assert _RANK.index(overall(some + more)) <= _RANK.index(overall(some))


def test_outside_its_scope_a_falsifier_is_not_run_and_does_not_count(contract: Callable[..., Path]) -> None:
    contract(honest)
    folder = contract(raising(None), name="gpu", id="F-GPU-001", extra="scope: {device: cuda}")
    found, text, code = outcome(folder)
    assert (found, code) == (Outcome.UNKNOWN, ExitCode.PASS)
    assert text == "needs a GPU; not required on this machine"
    assert outcome(folder, Machine("aarch64", ("sm_121",)))[::2] == (Outcome.UNKNOWN, ExitCode.UNKNOWN)


def test_a_claim_of_an_extra_counts_where_the_extra_is_installed_and_nowhere_else(
    contract: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    contract(honest)
    folder = contract(raising(None), name="extra", id="F-EXTRA-001", extra="scope: {package: deepspeed}")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert outcome(folder)[::2] == (Outcome.UNKNOWN, ExitCode.UNKNOWN)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert outcome(folder)[::2] == (Outcome.UNKNOWN, ExitCode.PASS)
    assert outcome(folder)[1] == "needs deepspeed, which is not installed; not required on this machine"


def test_nothing_checked_is_not_a_pass(contract: Callable[..., Path]) -> None:
    assert outcome(contract(honest, extra="scope: {arch: [sm_121]}"))[2] is ExitCode.UNKNOWN


def test_supersession_takes_a_falsifier_out_of_the_verdict(contract: Callable[..., Path]) -> None:
    contract(lambda *, mutant=None: Finding(False, "old claim"), name="old", id="F-OLD-001")
    folder = contract(honest, name="successor", id="F-NEW-001", extra="supersedes: [F-OLD-001]")
    assert outcome(folder) == (Outcome.UNKNOWN, "superseded by successor", ExitCode.PASS)


@pytest.mark.parametrize(
    "text",
    [
        "import sys; sys.exit(0)",
        "print('{}'); raise SystemExit",
        "1 / 0",
        "raise GeneratorExit",
        "import os; os._exit(0)",
    ],
)
def test_a_module_of_checks_that_ends_the_process_is_unknown_and_not_green(
    contract: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
) -> None:
    import latentforge

    package = tmp_path / "more"
    package.mkdir()
    (package / "planted_leaving.py").write_text(text)
    monkeypatch.setattr(latentforge, "__path__", [*latentforge.__path__, str(package)])
    monkeypatch.delitem(sys.modules, "latentforge.planted_leaving", raising=False)
    contract(None, reference="latentforge.planted_leaving:check")
    assert main(["contracts", "check", "--json"]) == ExitCode.UNKNOWN
    (one,) = json.loads(capsys.readouterr().out)["falsifiers"]
    assert "check cannot be imported" in one["text"]


def test_ctrl_c_ends_the_command_and_is_no_verdict(contract: Callable[..., Path]) -> None:
    def interrupted(*, mutant: str | None = None) -> Finding:
        raise KeyboardInterrupt

    contract(interrupted)
    assert main(["contracts", "check"]) == ExitCode.DETACHED


def test_json_is_json_whatever_was_measured(contract: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    measured = {"loss": float("nan"), "bound": [float("inf"), -float("inf")], "pair": (1, 2)}
    contract(lambda *, mutant=None: Finding(mutant is None, "one", measured))
    assert main(["contracts", "check", "--json"]) == 0

    def no_such_number(word: str) -> None:
        raise AssertionError(word)

    (one,) = json.loads(capsys.readouterr().out, parse_constant=no_such_number)["falsifiers"]
    assert one["measured"] == {"loss": "nan", "bound": ["inf", "-inf"], "pair": [1, 2]}


def test_the_table_shows_each_verdict_with_its_control(
    contract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    contract(honest)
    assert main(["contracts", "check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "planted"
    assert " ".join(lines[1].split()) == "F-PLANTED-001 PASS error 0.0 control mutant seen FAIL (error 1.0)"
    assert lines[2] == "1 falsifier: 1 pass, 0 fail, 0 unknown"


def test_a_removed_check_function_ends_with_exit_code_3(
    contract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    contract(None)
    assert main(["contracts", "check"]) == ExitCode.UNKNOWN
    assert "UNKNOWN" in capsys.readouterr().out


def test_json_holds_what_the_table_shows(contract: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    contract(honest)
    assert main(["contracts", "check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["exit_code"] == 0
    (one,) = report["falsifiers"]
    assert (one["outcome"], one["control"]["seen_failing"], one["measured"]) == ("pass", True, {"error": 0.0})


def test_what_a_check_prints_stays_out_of_the_table(
    contract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    def noisy(*, mutant: str | None = None) -> Finding:
        print("step 1/10 loss 3.0")
        return honest(mutant=mutant)

    contract(noisy)
    main(["contracts", "check"])
    assert "step 1/10" not in capsys.readouterr().out


def test_checks_compute_in_one_thread_unless_more_are_asked_for(
    contract: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Of two threads one waits for the other at each small operator: 20 s became 3 minutes on a busy machine.
    torch = pytest.importorskip("torch")
    seen: list[int] = []

    def counting(*, mutant: str | None = None) -> Finding:
        seen.append(torch.get_num_threads())
        return honest(mutant=mutant)

    contract(counting)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for asked, threads in ((None, 1), ("3", 3)):
            if asked is None:
                monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
            else:
                monkeypatch.setenv("OMP_NUM_THREADS", asked)
            assert main(["contracts", "check"]) == 0
            assert seen[-2:] == [threads, threads]
            assert torch.get_num_threads() == 3
            assert os.environ.get("OMP_NUM_THREADS") == asked
    finally:
        torch.set_num_threads(before)


def test_one_falsifier_can_be_checked_by_its_id(
    contract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    contract(honest)
    contract(raising(None), name="other", id="F-OTHER-001")
    assert main(["contracts", "check", "F-PLANTED-001"]) == 0
    assert main(["contracts", "check", "F-PLANTD-001"]) == ExitCode.REFUSED
    assert "latentforge contracts show F-PLANTED-001" in capsys.readouterr().err


def test_list_and_show_tell_what_a_contract_claims(
    contract: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    contract(honest)
    assert main(["contracts", "list"]) == 0
    assert main(["contracts", "show", "planted"]) == 0
    shown = capsys.readouterr().out
    assert "planted   1 falsifier" in shown
    assert "F-PLANTED-001" in shown
    assert "latentforge.planted_checks:planted" in shown


@pytest.fixture
def several(contract: Callable[..., Path]) -> None:
    """Four contracts: one of any machine, one of GPUs, one of full runs, one that replaces the first."""
    contract(honest, name="old", id="F-OLD-001")
    contract(honest, name="gpu", id="F-GPU-001", extra="scope: {device: cuda, arch: [sm_121]}")
    contract(honest, name="full", id="F-FULL-001", extra="scope: {profile: full}")
    contract(honest, name="successor", id="F-NEW-001", extra="supersedes: [F-OLD-001]")


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ([], {"F-OLD-001", "F-GPU-001", "F-FULL-001", "F-NEW-001"}),
        (["gpu", "F-FULL-001"], {"F-GPU-001", "F-FULL-001"}),
        (["--device", "cuda"], {"F-GPU-001"}),
        (["--device", "any", "--profile", "any"], {"F-OLD-001", "F-NEW-001"}),
        (["--profile", "full"], {"F-FULL-001"}),
        (["--arch", "sm_121"], {"F-GPU-001"}),
        (["--arch", "any"], {"F-OLD-001", "F-FULL-001", "F-NEW-001"}),
        (["--arch", "sm_12"], set()),
        (["--state", "superseded"], {"F-OLD-001"}),
        (["--state", "current", "old", "successor"], {"F-NEW-001"}),
        (["--kind", "events"], set()),
        (["--kind", "function", "--device", "cuda"], {"F-GPU-001"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_list_is_narrowed_by_name_scope_kind_and_state(
    several: None, capsys: pytest.CaptureFixture[str], asked: list[str], wanted: set[str]
) -> None:
    assert main(["contracts", "list", *asked, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {one for contract in found for one in contract["falsifiers"]} == wanted
    assert all(contract["falsifiers"] for contract in found)
    assert main(["contracts", "list", *asked]) == 0
    told = capsys.readouterr().out
    assert all(one in told for one in wanted) or not asked
    assert "no such claim" in told or wanted


def test_list_says_what_is_superseded_and_by_what(several: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contracts", "list", "--state", "superseded"]) == 0
    assert "F-OLD-001  it holds  (superseded by successor)" in capsys.readouterr().out
    assert main(["contracts", "list", "old", "--json"]) == 0
    (old,) = json.loads(capsys.readouterr().out)
    assert old["superseded"] == {"F-OLD-001": "successor"}
    assert old["scope"] == {"F-OLD-001": dict.fromkeys(("arch", "device", "profile", "package", "tool"), "any")}


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (["--device", "gpu"], "--device 'gpu' is none of any, cpu, cuda"),
        (["--profile", ""], "--profile '' is none of any, smoke, full"),
        (["--state", "supersede"], "next: latentforge contracts list --state superseded"),
        (["--kind", "event"], "next: latentforge contracts list --kind events"),
        (["--arch", "sm_121|x"], "--arch 'sm_121|x' is no architecture"),
        (["F-OLD-002"], "there is no contract or falsifier 'F-OLD-002'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_list_refuses_what_no_claim_could_have(
    several: None, capsys: pytest.CaptureFixture[str], asked: list[str], said: str
) -> None:
    assert main(["contracts", "list", *asked]) == ExitCode.REFUSED
    assert said in capsys.readouterr().err


def test_show_of_a_falsifier_is_that_falsifier_as_json_too(several: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["contracts", "show", "F-OLD-001", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["contract"], shown["id"], shown["superseded_by"]) == ("old", "F-OLD-001", "successor")
    assert "falsifiers" not in shown
    assert main(["contracts", "show", "old", "--json"]) == 0
    (claim,) = json.loads(capsys.readouterr().out)["falsifiers"]
    assert claim["superseded_by"] == "successor"
