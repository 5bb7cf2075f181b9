"""Verification believes nothing that it can recompute."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from latentforge.cli import main
from latentforge.errors import RefusedError
from latentforge.evidence import checks
from latentforge.evidence.checks import planted_run, recorded_run
from latentforge.evidence.ledger import append, read_chain
from latentforge.evidence.manifest import record, write_manifest
from latentforge.evidence.reading import read_run
from latentforge.evidence.statement import build_statement
from latentforge.evidence.verify import verify_evidence
from latentforge.spec.canonical import canonical_bytes
from latentforge.verdicts import ExitCode, Outcome


def problems(run_dir: Path) -> list[tuple[str, str]]:
    return [(problem.what, problem.text) for problem in verify_evidence(run_dir).problems]


def forge(runs: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A run whose statement was changed before it was written and entered: every digest is right, the words are not."""
    run_dir = planted_run(runs, seed=9)
    statement = build_statement(run_dir, plan=None, host={}, dispatched={}, environ={})
    change(statement)
    record(run_dir, statement)
    return run_dir


def test_an_untouched_run_verifies(run_dir: Path) -> None:
    result = verify_evidence(run_dir)
    assert result.outcome is Outcome.PASS
    assert (result.subjects, result.entry and result.entry.entry, result.problems) == (8, 2, [])


def test_the_manifest_and_the_ledger_folder_verify_as_well(run_dir: Path, runs: Path) -> None:
    assert verify_evidence(run_dir / "manifest.json").outcome is Outcome.PASS
    whole = verify_evidence(runs)
    assert (whole.outcome, len(whole.runs), whole.entries) == (Outcome.PASS, 2, 2)


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A recorded run and every file that its verification covers, the ledger included."""
    runs = tmp_path_factory.mktemp("lasting")
    recorded_run(runs, seed=6)
    run_dir = recorded_run(runs)
    (run_dir / "manifest.json").chmod(0o644)
    files = sorted(path for path in run_dir.rglob("*") if path.is_file())
    return run_dir, [*files, runs / "ledger.jsonl"]


@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), flip=st.integers(1, 255))
def test_one_flipped_byte_anywhere_fails(lasting: tuple[Path, list[Path]], data: st.DataObject, flip: int) -> None:
    run_dir, files = lasting
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    position = data.draw(st.integers(0, len(content) - 1))
    path.write_bytes(content[:position] + bytes([content[position] ^ flip]) + content[position + 1 :])
    try:
        result = verify_evidence(run_dir)
    finally:
        path.write_bytes(content)
    named = path.relative_to(run_dir).as_posix() if path.is_relative_to(run_dir) else path.name
    assert result.outcome is Outcome.FAIL
    assert named in [problem.what for problem in result.problems]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_truncated_file_fails(lasting: tuple[Path, list[Path]], data: st.DataObject) -> None:
    run_dir, files = lasting
    path = data.draw(st.sampled_from(files))
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    try:
        outcome = verify_evidence(run_dir).outcome
    finally:
        path.write_bytes(content)
    assert outcome is Outcome.FAIL


def test_every_differing_file_is_named_with_both_digests(run_dir: Path) -> None:
    for name in ("launch.log", "out/student/model.safetensors"):
        (run_dir / name).write_bytes((run_dir / name).read_bytes() + b"x")
    found = problems(run_dir)
    assert [what for what, _ in found][:2] == ["launch.log", "out/student/model.safetensors"]
    assert all("recorded" in text and "found" in text for _, text in found[:2])


def test_a_missing_file_and_a_new_file_are_named(run_dir: Path) -> None:
    (run_dir / "launch.log").unlink()
    (run_dir / "notes.txt").write_text("later")
    assert ("launch.log", "is missing") in problems(run_dir)
    assert ("notes.txt", "appeared since: it is not in the manifest") in problems(run_dir)


def test_a_run_whose_folder_is_a_link_is_judged_by_its_name_and_beside_it(runs: Path, run_dir: Path) -> None:
    kept = runs.parent / "kept"
    run_dir.rename(kept)
    run_dir.symlink_to(kept, target_is_directory=True)
    alias = runs.parent / "latest"
    alias.symlink_to(run_dir, target_is_directory=True)
    assert verify_evidence(run_dir).outcome is Outcome.PASS
    assert read_run(run_dir).id == run_dir.name
    with pytest.raises(RefusedError, match="neither a run folder"):
        verify_evidence(alias)  # leads to a folder that is called kept, and no ledger is beside that
    assert verify_evidence(runs).outcome is Outcome.PASS
    other = next(path for path in runs.iterdir() if path.is_dir() and path != run_dir)
    alias.unlink()
    alias.symlink_to(other, target_is_directory=True)
    assert verify_evidence(alias).run == other.name


def test_a_run_that_was_only_collected_is_not_called_altered(runs: Path) -> None:
    collected = verify_evidence(planted_run(runs, seed=9))
    assert collected.outcome is Outcome.UNKNOWN
    assert "was never recorded" in collected.problems[0].text
    assert f"latentforge dispatch watch {collected.run}" in collected.problems[0].text


@pytest.mark.parametrize("kept", ["ledger.jsonl", "manifest.json.sig"])
def test_a_manifest_that_was_taken_away_is_missing_where_something_knows_of_it(
    run_dir: Path, runs: Path, kept: str
) -> None:
    (run_dir / "manifest.json").unlink()
    if kept == "manifest.json.sig":
        (runs / "ledger.jsonl").unlink()
        (run_dir / kept).write_text("of what was here")
    assert verify_evidence(run_dir).outcome is Outcome.FAIL
    assert problems(run_dir)[0] == ("manifest.json", "is missing")


def test_a_file_replaced_by_a_link_out_of_the_folder_fails(run_dir: Path, tmp_path: Path) -> None:
    shutil.copy(run_dir / "launch.log", tmp_path / "elsewhere.log")
    (run_dir / "launch.log").unlink()
    (run_dir / "launch.log").symlink_to(tmp_path / "elsewhere.log")
    assert verify_evidence(run_dir).outcome is Outcome.FAIL


def test_the_manifest_of_another_run_is_not_accepted(runs: Path) -> None:
    one, two = (runs / entry.run for entry in read_chain(runs / "ledger.jsonl").entries)
    (two / "manifest.json").unlink()
    shutil.copy(one / "manifest.json", two / "manifest.json")
    assert any(text.startswith("is the manifest of") for _, text in problems(two))


def test_a_renamed_run_folder_is_not_accepted(run_dir: Path) -> None:
    renamed = run_dir.parent / ("distill-" + "0" * 20)
    run_dir.rename(renamed)
    assert verify_evidence(renamed).outcome is Outcome.FAIL


def test_a_manifest_that_is_in_no_ledger_fails(runs: Path) -> None:
    run_dir = planted_run(runs, seed=9)
    write_manifest(run_dir, build_statement(run_dir, plan=None, host={}, dispatched={}, environ={}))
    assert (("manifest.json", f"{run_dir.name} is not in ledger.jsonl")) in problems(run_dir)
    assert verify_evidence(runs).outcome is Outcome.FAIL


def test_without_a_ledger_the_outcome_is_unknown_not_pass(run_dir: Path) -> None:
    (run_dir.parent / "ledger.jsonl").unlink()
    assert verify_evidence(run_dir).outcome is Outcome.UNKNOWN


def test_a_ledger_entry_whose_run_is_elsewhere_is_unknown(runs: Path) -> None:
    append(runs / "ledger.jsonl", "distill-" + "0" * 20, "0" * 64)
    assert verify_evidence(runs).outcome is Outcome.UNKNOWN


# Statements that lie with every digest right: each is derived again from the files and refuted.
LIES: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
    ("verdicts", lambda s: s["predicate"]["verdicts"][0].update(outcome="fail")),
    ("verdicts", lambda s: s["predicate"]["verdicts"][0]["measured"].update(final=1.0)),
    ("verdicts", lambda s: s["predicate"]["verdicts"].clear()),
    ("configuration", lambda s: s["predicate"]["configuration"]["effective"].update(learning_rate=1.0)),
    ("configuration", lambda s: s["predicate"]["configuration"]["requested"].update(steps=500)),
    ("observations", lambda s: s["predicate"]["observations"][1].update(value=0.1)),
    ("end", lambda s: s["predicate"]["end"].update(outcome="unknown")),
    ("end", lambda s: s["predicate"]["end"]["record"].update(code=False)),
    ("seeds", lambda s: s["predicate"]["seeds"].update(torch=1)),
    ("timings", lambda s: s["predicate"]["timings"].update(train=99)),
    ("peak_memory_bytes", lambda s: s["predicate"].update(peak_memory_bytes=1)),
    ("identities.code", lambda s: s["predicate"]["identities"].update(code="0" * 64)),
    ("identities.products", lambda s: s["predicate"]["identities"]["products"].update(student="0" * 64)),
    (
        "marked checked",
        lambda s: s["predicate"]["conclusions"].append({"text": "x", "check": None, "status": "checked"}),
    ),
    ("marked claim", lambda s: s["predicate"]["conclusions"][0].update(status="claim")),
    (
        "what the verdicts say",
        lambda s: s["predicate"]["conclusions"][0].update(text="F-DISTILL-SMOKE-001 PASS by far"),
    ),
    ("what the verdicts say", lambda s: s["predicate"]["conclusions"].pop(0)),
    ("identities.kernel", lambda s: s["predicate"]["identities"].update(kernel="9.9")),
    ("identities.driver", lambda s: s["predicate"]["identities"].update(driver="9.9")),
    ("identities.extension", lambda s: s["predicate"]["identities"]["extension"].update(sha256="0" * 64)),
]


@pytest.mark.parametrize(("part", "lie"), LIES, ids=[f"{part}-{i}" for i, (part, _) in enumerate(LIES)])
def test_a_statement_that_does_not_follow_from_the_files_is_refuted(
    tmp_path: Path, part: str, lie: Callable[[dict[str, Any]], Any]
) -> None:
    run_dir = forge(tmp_path, lie)
    assert any(part in text for _, text in problems(run_dir))
    assert verify_evidence(run_dir).outcome is Outcome.FAIL


def test_a_log_that_tells_another_verdict_than_the_events_is_named(tmp_path: Path) -> None:
    run_dir = planted_run(tmp_path)
    log = (run_dir / "launch.log").read_text()
    (run_dir / "launch.log").write_text(log.replace("F-DISTILL-SMOKE-001 PASS", "F-DISTILL-SMOKE-001 FAIL"))
    record(run_dir, build_statement(run_dir, plan=None, host={}, dispatched={}, environ={}))
    assert ("launch.log", "says F-DISTILL-SMOKE-001 FAIL, the events say PASS") in problems(run_dir)


def test_a_manifest_in_other_bytes_of_the_same_meaning_fails(run_dir: Path) -> None:
    path = run_dir / "manifest.json"
    path.chmod(0o644)
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    assert any("canonical" in text for _, text in problems(run_dir))


def test_what_no_file_repeats_is_held_by_the_ledgers_digest_of_the_manifest(run_dir: Path) -> None:
    path = run_dir / "manifest.json"
    path.chmod(0o644)
    path.write_bytes(path.read_bytes().replace(b'"hostname":"planted"', b'"hostname":"another"'))
    assert [what for what, text in problems(run_dir) if "recorded" in text] == ["manifest.json"]
    assert verify_evidence(run_dir).outcome is Outcome.FAIL


def test_numbers_beyond_two_to_the_53_survive_the_round(run_dir: Path) -> None:
    assert json.loads((run_dir / "manifest.json").read_bytes())["predicate"]["flops"]["train"] == 1.5e18
    assert verify_evidence(run_dir).outcome is Outcome.PASS


def test_what_is_neither_run_nor_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="neither"):
        verify_evidence(tmp_path)
    with pytest.raises(RefusedError, match="not a folder"):
        verify_evidence(tmp_path / "absent")


def test_verifying_changes_nothing(runs: Path, run_dir: Path) -> None:
    def picture() -> dict[str, tuple[int, bytes]]:
        files = [path for path in runs.rglob("*") if path.is_file()]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    before = picture()
    verify_evidence(run_dir)
    verify_evidence(runs)
    assert picture() == before


@pytest.mark.parametrize(
    "check",
    [
        checks.one_flipped_byte_is_named,
        checks.second_write_is_refused,
        checks.a_claim_is_marked,
        checks.secrets_stay_out,
        checks.a_signature_says_who,
        checks.a_signed_head_holds_the_ledger,
    ],
)
def test_the_contracts_checks_pass_and_refuse_an_unknown_mutant(check: Callable[..., Any]) -> None:
    assert check().passed is True
    with pytest.raises(ValueError, match="unknown mutant"):
        check(mutant="no such thing")


def test_the_command_says_verified_unsigned(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evidence", "verify", str(run_dir)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("verified, unsigned  8 subjects, ")
    assert first.endswith("ledger entry 2 links to 1")
    assert second == "requested and effective configuration agree"


def test_the_command_names_the_altered_file_and_exits_1(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "out/student/model.safetensors").write_bytes(b"other")
    assert main(["evidence", "verify", str(run_dir)]) == ExitCode.FAIL
    assert capsys.readouterr().out.startswith("FAILED   out/student/model.safetensors  sha256 ")


def test_the_command_finds_a_run_by_the_beginning_of_its_id(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVIDENCE_DIR", str(run_dir.parent))
    assert main(["evidence", "verify", run_dir.name[:14]]) == 0
    assert main(["evidence", "verify", "distill-"]) == ExitCode.REFUSED
    assert main(["evidence", "verify", "teacher-00"]) == ExitCode.REFUSED
    assert "is the beginning of 2 runs" in capsys.readouterr().err


def test_the_commands_json_holds_the_same(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "launch.log").unlink()
    assert main(["evidence", "verify", "--json", str(run_dir)]) == ExitCode.FAIL
    report = json.loads(capsys.readouterr().out)
    assert report["outcome"] == "fail"
    assert report["problems"][0] == {"what": "launch.log", "text": "is missing", "outcome": "fail"}


def test_sound_evidence_of_a_failed_run_says_that_it_failed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = planted_run(tmp_path)
    events = (run_dir / "events.jsonl").read_text()
    (run_dir / "events.jsonl").write_text(
        events.replace('"outcome": "pass", "text"', '"outcome": "fail", "text"').replace('"code": 0', '"code": 1')
    )
    log = (run_dir / "launch.log").read_text()
    (run_dir / "launch.log").write_text(log.replace("001 PASS", "001 FAIL"))
    (run_dir / "exit.json").write_bytes(canonical_bytes({"code": 1, "outcome": "fail"}))
    record(run_dir, build_statement(run_dir, plan=None, host={}, dispatched={}, environ={}))
    assert main(["evidence", "verify", str(run_dir)]) == 0
    assert "the run itself did not pass: fail, exit code 1" in capsys.readouterr().out


def test_thousands_of_runs_that_are_elsewhere_do_not_bury_what_failed(
    runs: Path, run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(40):
        append(runs / "ledger.jsonl", f"distill-{number:020x}", "0" * 64)
    (run_dir / "launch.log").unlink()
    assert main(["evidence", "verify", str(runs)]) == ExitCode.FAIL
    said = capsys.readouterr().out.splitlines()
    assert len(said) < 20
    assert any("and 30 more: --json lists all" in line for line in said)
    assert any(line.startswith("FAILED") and "launch.log  is missing" in line for line in said)
