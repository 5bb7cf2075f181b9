"""Signatures of SSH keys: who wrote it, of what, and nothing that a copy of another's would show."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from latentforge.cli import main
from latentforge.errors import FailedError, RefusedError, UnknownOutcomeError
from latentforge.evidence import checks
from latentforge.evidence.checks import recorded_run
from latentforge.evidence.heads import HEADS, sign_head
from latentforge.evidence.ledger import check_chain, read_chain
from latentforge.evidence.signatures import NAMESPACE, check_signature, sign_bytes
from latentforge.evidence.signing import sign_evidence
from latentforge.evidence.verify import Verification, verify_evidence
from latentforge.verdicts import ExitCode, Outcome

SIG = "manifest.json.sig"


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys of Alice and Mallory, and the file that names Alice as an allowed signer."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("alice", "mallory"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "signers").write_text(f"alice@example.org {(folder / 'alice.pub').read_text()}")
    return folder


def problems(verification: Verification) -> dict[str, str]:
    return {one.what: one.text for one in verification.problems}


def test_a_signed_run_is_verified_as_signed_by_name(run_dir: Path, keys: Path) -> None:
    before = (run_dir / "manifest.json").read_bytes()
    assert sign_evidence(run_dir, keys / "alice") == (run_dir.name, run_dir.resolve() / SIG)
    result = verify_evidence(run_dir, signers=keys / "signers")
    assert (result.outcome, result.standing) == (Outcome.PASS, "verified, signed by alice@example.org")
    assert (run_dir / "manifest.json").read_bytes() == before
    openssh = ["ssh-keygen", "-Y", "verify", "-f", str(keys / "signers"), "-I", "alice@example.org", "-n", NAMESPACE]
    subprocess.run([*openssh, "-s", str(run_dir / SIG)], input=before, check=True, capture_output=True)


def test_without_signers_a_signature_names_its_key_and_nobody(run_dir: Path, keys: Path) -> None:
    sign_evidence(run_dir, keys / "alice")
    result = verify_evidence(run_dir)
    assert result.outcome is Outcome.PASS
    assert result.standing.startswith("verified, signed with ED25519 SHA256:")
    assert result.standing.endswith(", whose was not asked")
    assert result.as_json()["signed"] is False


def test_who_names_signers_is_not_told_that_unsigned_evidence_verifies(run_dir: Path, keys: Path) -> None:
    result = verify_evidence(run_dir, signers=keys / "signers")
    assert result.outcome is Outcome.UNKNOWN
    assert "is not signed by anyone of" in problems(result)["manifest.json"]


def test_the_signature_of_another_key_fails(run_dir: Path, keys: Path) -> None:
    sign_evidence(run_dir, keys / "mallory")
    result = verify_evidence(run_dir, signers=keys / "signers")
    assert result.outcome is Outcome.FAIL
    assert problems(result)[SIG].startswith("is a signature of ED25519 SHA256:")
    assert f"which {keys / 'signers'} does not name" in problems(result)[SIG]


def test_the_signature_of_another_run_fails_with_and_without_signers(runs: Path, keys: Path) -> None:
    one, two = (runs / entry.run for entry in read_chain(runs / "ledger.jsonl").entries)
    sign_evidence(one, keys / "alice")
    shutil.copy(one / SIG, two / SIG)
    for signers in (None, keys / "signers"):
        result = verify_evidence(two, signers=signers)
        assert result.outcome is Outcome.FAIL
        assert "bad signature" in problems(result)[SIG]


def test_a_signature_made_for_another_purpose_fails(run_dir: Path, keys: Path) -> None:
    command = ["ssh-keygen", "-q", "-Y", "sign", "-n", "git", "-f", str(keys / "alice"), str(run_dir / "manifest.json")]
    subprocess.run(command, check=True, capture_output=True)
    assert "namespace does not match" in problems(verify_evidence(run_dir))[SIG]


def test_a_flipped_byte_or_a_cut_or_a_strange_signature_fails(run_dir: Path, keys: Path) -> None:
    sign_evidence(run_dir, keys / "alice")
    path = run_dir / SIG
    whole = path.read_bytes()
    path.chmod(0o644)
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for content in (flipped, whole[:middle], b"", b"x" * (1 << 17)):
        path.write_bytes(content)
        assert verify_evidence(run_dir).outcome is Outcome.FAIL
    path.unlink()
    path.mkdir()
    assert verify_evidence(run_dir).outcome is Outcome.FAIL


def test_a_key_whose_time_is_over_does_not_sign(run_dir: Path, keys: Path, tmp_path: Path) -> None:
    sign_evidence(run_dir, keys / "alice")
    signers = tmp_path / "signers"
    signers.write_text(f'alice@example.org valid-before="20200101" {(keys / "alice.pub").read_text()}')
    assert "key has expired" in problems(verify_evidence(run_dir, signers=signers))[SIG]


def test_a_signed_run_that_was_handed_on_alone_is_verified_by_its_signature(
    run_dir: Path, keys: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sign_evidence(run_dir, keys / "alice")
    alone = tmp_path / "alone" / run_dir.name
    shutil.copytree(run_dir, alone)
    assert verify_evidence(alone).outcome is Outcome.UNKNOWN
    assert main(["evidence", "verify", str(alone), "--signers", str(keys / "signers")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("verified, signed by alice@example.org")
    assert "no ledger.jsonl beside it" in said


def test_a_second_signature_is_refused_and_the_first_stays(run_dir: Path, keys: Path) -> None:
    sign_evidence(run_dir, keys / "alice")
    before = (run_dir / SIG).read_bytes()
    with pytest.raises(RefusedError, match="is signed already"):
        sign_evidence(run_dir, keys / "mallory")
    assert (run_dir / SIG).read_bytes() == before


def test_what_does_not_verify_is_not_signed(runs: Path, run_dir: Path, keys: Path) -> None:
    (run_dir / "launch.log").write_text("something else")
    with pytest.raises(FailedError, match=r"is not signed: launch\.log"):
        sign_evidence(run_dir, keys / "alice")
    with pytest.raises(FailedError, match=r"is not signed: launch\.log"):
        sign_evidence(runs, keys / "alice")
    assert not (run_dir / SIG).exists()
    assert not (runs / HEADS).exists()


def test_a_key_that_is_none_or_does_not_sign_leaves_nothing(runs: Path, run_dir: Path, keys: Path) -> None:
    with pytest.raises(RefusedError, match="there is no key"):
        sign_evidence(run_dir, keys / "nobody")
    with pytest.raises(RefusedError, match="does not sign"):
        sign_evidence(run_dir, keys / "signers")
    with pytest.raises(RefusedError, match="does not sign"):
        sign_evidence(runs, keys / "signers")
    assert not (run_dir / SIG).exists()
    assert not (runs / HEADS).exists()


def test_without_ssh_keygen_a_signature_is_unknown_never_passed(
    run_dir: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sign_evidence(run_dir, keys / "alice")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert verify_evidence(run_dir).outcome is Outcome.UNKNOWN
    with pytest.raises(UnknownOutcomeError, match="ssh-keygen"):
        sign_bytes(b"", keys / "alice")


def test_a_signed_ledger_vouches_for_every_run_in_it_and_for_none_after(runs: Path, keys: Path) -> None:
    what, signature = sign_evidence(runs, keys / "alice")
    assert (what, signature.name) == ("ledger.jsonl up to entry 2", "00000002.json.sig")
    signers = keys / "signers"
    whole = verify_evidence(runs, signers=signers)
    assert (whole.outcome, whole.standing) == (Outcome.PASS, "verified, signed by alice@example.org")
    first = verify_evidence(runs / whole.runs[0].run if whole.runs[0].run else runs, signers=signers)
    assert (first.outcome, first.standing) == (Outcome.PASS, "verified, signed by alice@example.org")
    later = recorded_run(runs, seed=8)
    assert verify_evidence(later, signers=signers).outcome is Outcome.UNKNOWN
    assert verify_evidence(runs).standing.endswith(" up to entry 2")
    assert verify_evidence(runs, signers=signers).outcome is Outcome.UNKNOWN


def test_a_ledger_that_was_cut_after_it_was_signed_fails(runs: Path, keys: Path) -> None:
    sign_evidence(runs, keys / "alice")
    last = read_chain(runs / "ledger.jsonl").entries[-1]
    lines = (runs / "ledger.jsonl").read_bytes().splitlines(keepends=True)
    (runs / "ledger.jsonl").write_bytes(lines[0])
    shutil.rmtree(runs / last.run)
    result = verify_evidence(runs)
    assert result.outcome is Outcome.FAIL
    assert "the last were cut off" in problems(result)["heads/00000002.json"]


def test_a_ledger_written_anew_fails_against_a_head_that_was_kept_elsewhere(
    runs: Path, keys: Path, tmp_path: Path
) -> None:
    sign_evidence(runs, keys / "alice")
    kept = tmp_path / "kept"
    (runs / HEADS).rename(kept)
    assert verify_evidence(runs, signers=keys / "signers", heads=[kept / "00000002.json"]).outcome is Outcome.PASS
    anew = tmp_path / "anew"
    for seed in (7, 6):
        recorded_run(anew, seed=seed)
    assert verify_evidence(anew).outcome is Outcome.PASS
    result = verify_evidence(anew, heads=[kept / "00000002.json"])
    assert result.outcome is Outcome.FAIL
    assert "the ledger was written anew" in problems(result)[str(kept / "00000002.json")]


@pytest.mark.parametrize("name", ["00000002.json", "00000002.json.sig"])
def test_a_byte_flipped_in_a_signed_head_fails(runs: Path, keys: Path, name: str) -> None:
    sign_evidence(runs, keys / "alice")
    path = runs / HEADS / name
    content = path.read_bytes()
    path.chmod(0o644)
    path.write_bytes(content[:60] + bytes([content[60] ^ 1]) + content[61:])
    assert verify_evidence(runs).outcome is Outcome.FAIL
    path.unlink()
    assert verify_evidence(runs).outcome is (Outcome.FAIL if name.endswith("json") else Outcome.PASS)


def test_a_pipe_in_the_place_of_a_head_or_a_signature_fails_and_keeps_nobody_waiting(runs: Path, run_dir: Path) -> None:
    (runs / HEADS).mkdir()
    os.mkfifo(runs / HEADS / "00000002.json")
    assert problems(verify_evidence(runs))["heads/00000002.json"] == "is no regular file"
    os.mkfifo(run_dir / SIG)
    assert verify_evidence(run_dir).outcome is Outcome.FAIL


def test_the_same_head_is_signed_once_and_a_torn_signing_is_taken_up(runs: Path, keys: Path) -> None:
    _, signature = sign_evidence(runs, keys / "alice")
    with pytest.raises(RefusedError, match=r"entry 2 of .* is signed already"):
        sign_evidence(runs, keys / "alice")
    signature.unlink()
    sign_evidence(runs, keys / "alice")
    assert check_signature((runs / HEADS / "00000002.json").read_bytes(), signature, keys / "signers").signer


def test_the_commands_sign_and_verify(
    runs: Path, run_dir: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVIDENCE_DIR", str(runs))
    monkeypatch.delenv("EVIDENCE_KEY", raising=False)
    assert main(["evidence", "sign", run_dir.name]) == ExitCode.REFUSED
    assert "--key ~/.ssh/id_ed25519" in capsys.readouterr().err
    assert main(["evidence", "sign", run_dir.name, str(runs), "--key", str(keys / "alice"), "--json"]) == 0
    assert [one["signed"] for one in json.loads(capsys.readouterr().out)] == [
        run_dir.name,
        "ledger.jsonl up to entry 2",
    ]
    assert main(["evidence", "verify", str(runs), "--signers", str(keys / "signers")]) == 0
    assert capsys.readouterr().out.startswith("verified, signed by alice@example.org  2 runs, ")
    monkeypatch.setenv("EVIDENCE_SIGNERS", str(keys / "signers"))
    assert main(["evidence", "verify", run_dir.name, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["signed"], report["signature"]["signer"]) == (True, "alice@example.org")
    monkeypatch.setenv("EVIDENCE_SIGNERS", str(keys / "absent"))
    assert main(["evidence", "verify", run_dir.name]) == ExitCode.REFUSED
    assert "EVIDENCE_SIGNERS" in capsys.readouterr().err


def test_a_head_that_is_named_where_no_ledger_is_leaves_the_outcome_unknown(
    runs: Path, run_dir: Path, keys: Path, tmp_path: Path
) -> None:
    sign_evidence(runs, keys / "alice")
    sign_evidence(run_dir, keys / "alice")
    alone = tmp_path / "alone" / run_dir.name
    shutil.copytree(run_dir, alone)
    kept = runs / HEADS / "00000002.json"
    assert verify_evidence(alone, signers=keys / "signers").outcome is Outcome.PASS
    result = verify_evidence(alone, signers=keys / "signers", heads=[kept])
    assert result.outcome is Outcome.UNKNOWN
    assert problems(result) == {str(kept): "cannot be held against a ledger.jsonl: none is here"}
    with pytest.raises(RefusedError, match="there is no head of a ledger at"):
        verify_evidence(runs, heads=[tmp_path / "absent.json"])


def test_a_head_put_under_another_name_fails_and_is_not_signed_over(runs: Path, keys: Path) -> None:
    recorded_run(runs, seed=8)
    sign_evidence(runs, keys / "alice")
    shutil.copy(runs / HEADS / "00000003.json", runs / HEADS / "00000002.json")
    assert problems(verify_evidence(runs)) == {"heads/00000002.json": "is the head of entry 3: it was put there"}
    (runs / HEADS / "00000002.json").unlink()
    recorded_run(runs, seed=9)
    shutil.copy(runs / HEADS / "00000003.json", runs / HEADS / "00000004.json")
    with pytest.raises(FailedError, match="it was put there"):
        sign_evidence(runs, keys / "alice")
    with pytest.raises(RefusedError, match="is another head than entry 4"):
        sign_head(runs, read_chain(runs / "ledger.jsonl"), keys / "alice")
    assert not (runs / HEADS / "00000004.json.sig").exists()


def test_anything_but_a_folder_in_the_place_of_the_heads_fails(runs: Path, keys: Path) -> None:
    (runs / HEADS).write_text("")
    assert problems(verify_evidence(runs)) == {HEADS: "cannot be read: Not a directory"}
    (runs / HEADS).unlink()
    (runs / HEADS).symlink_to("nowhere")
    assert verify_evidence(runs).outcome is Outcome.FAIL
    (runs / HEADS).unlink()
    sign_evidence(runs, keys / "alice")
    (runs / HEADS / "00000002.json.sig").unlink()
    (runs / HEADS / "00000002.json.sig").symlink_to("nowhere")
    assert verify_evidence(runs).outcome is Outcome.FAIL


def test_heads_that_may_not_be_listed_leave_the_outcome_unknown(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs / HEADS).mkdir()
    real = os.listdir

    def denied(path: Path) -> list[str]:
        if Path(path).name == HEADS:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "listdir", denied)
    assert problems(verify_evidence(runs)) == {HEADS: "cannot be read: Permission denied"}
    assert verify_evidence(runs).outcome is Outcome.UNKNOWN


def test_a_ledger_that_holds_nothing_is_signed_by_nobody(tmp_path: Path, keys: Path) -> None:
    (tmp_path / "ledger.jsonl").write_bytes(b"")
    assert verify_evidence(tmp_path).outcome is Outcome.PASS
    assert verify_evidence(tmp_path, signers=keys / "signers").outcome is Outcome.UNKNOWN
    assert main(["evidence", "verify", str(tmp_path), "--signers", str(keys / "signers")]) == ExitCode.UNKNOWN


def test_a_ledger_whose_runs_were_signed_one_by_one_says_so(runs: Path, keys: Path) -> None:
    one, two = (runs / entry.run for entry in read_chain(runs / "ledger.jsonl").entries)
    sign_evidence(one, keys / "alice")
    assert verify_evidence(runs).standing == "verified, unsigned but for 1 of its runs"
    sign_evidence(two, keys / "alice")
    result = verify_evidence(runs, signers=keys / "signers")
    assert (result.standing, result.signed) == ("verified, each run signed by alice@example.org", True)
    assert (verify_evidence(runs).signed, verify_evidence(runs).outcome) == (False, Outcome.PASS)


def test_what_is_signed_is_what_was_verified_and_not_what_was_put_there_since(
    runs: Path, run_dir: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole = {path: path.read_bytes() for path in (runs / "ledger.jsonl", run_dir / "manifest.json")}
    anew = tmp_path / "anew"
    forged = recorded_run(anew, seed=7)

    def exchanged(path: Path) -> Verification:
        found = verify_evidence(path)
        for file, other in zip(whole, (anew / "ledger.jsonl", forged / "manifest.json"), strict=True):
            file.chmod(0o644)
            file.write_bytes(other.read_bytes() if file.name == "ledger.jsonl" else other.read_bytes() + b" ")
        return found

    monkeypatch.setattr("latentforge.evidence.signing.verify_evidence", exchanged)
    with pytest.raises(FailedError, match="was altered while it was verified"):
        sign_evidence(run_dir, keys / "alice")
    assert not (run_dir / SIG).exists()
    for path, content in whole.items():
        path.write_bytes(content)
    sign_evidence(runs, keys / "alice")
    head = json.loads((runs / HEADS / "00000002.json").read_bytes())
    assert head["head"] == check_chain(whole[runs / "ledger.jsonl"]).head


def test_a_ledger_whose_runs_are_elsewhere_is_signed_for_their_digests(runs: Path, run_dir: Path, keys: Path) -> None:
    shutil.rmtree(run_dir)
    assert verify_evidence(runs).outcome is Outcome.UNKNOWN
    assert sign_evidence(runs, keys / "alice")[0] == "ledger.jsonl up to entry 2"


@pytest.mark.parametrize("option", ["--signers", "--key", "--head"])
def test_an_option_that_is_given_an_empty_name_is_refused(
    runs: Path, run_dir: Path, option: str, monkeypatch: pytest.MonkeyPatch, keys: Path
) -> None:
    monkeypatch.setenv("EVIDENCE_KEY", str(keys / "alice"))
    monkeypatch.setenv("EVIDENCE_SIGNERS", str(keys / "signers"))
    command = "sign" if option == "--key" else "verify"
    assert main(["evidence", command, str(run_dir), option, ""]) == ExitCode.REFUSED


def test_files_of_signers_and_keys_are_found_below_a_home_and_refused_by_name(
    run_dir: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(keys))
    monkeypatch.delenv("EVIDENCE_SIGNERS", raising=False)
    assert main(["evidence", "sign", str(run_dir), "--key", "~/alice"]) == 0
    assert main(["evidence", "verify", str(run_dir), "--signers", "~/signers"]) == 0
    for named in ("~nobody-of-that-name/x", str(keys), "x" * 5000, "a\0b"):
        assert main(["evidence", "verify", str(run_dir), "--signers", named]) == ExitCode.REFUSED
        assert main(["evidence", "sign", str(run_dir.parent), "--key", named]) == ExitCode.REFUSED
    capsys.readouterr()
    large = keys / "large"
    with open(large, "wb") as file:
        file.truncate(1 << 30)
    assert main(["evidence", "verify", str(run_dir), "--signers", str(large)]) == ExitCode.REFUSED
    assert "1 MiB" in capsys.readouterr().err


def test_a_report_refuses_signers_that_are_no_file(
    run_dir: Path, keys: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVIDENCE_SIGNERS", str(tmp_path / "absent"))
    report = ["report", str(run_dir), "--to", str(tmp_path / "report.html")]
    assert main(report) == ExitCode.REFUSED
    assert "EVIDENCE_SIGNERS" in capsys.readouterr().err
    monkeypatch.setenv("HOME", str(keys))
    monkeypatch.setenv("EVIDENCE_SIGNERS", "~/signers")
    assert main(report) == 0


@pytest.mark.parametrize(
    ("mutant", "said"), [("cut", "the last were cut off"), ("anew", "the ledger was written anew")]
)
def test_the_contracts_ledger_verifies_without_its_head_and_not_with_it(mutant: str, said: str) -> None:
    found = checks.a_signed_head_holds_the_ledger(mutant=mutant)
    assert (found.passed, found.measured["alone"], found.measured["held"]) == (False, "pass", "fail")
    assert said in found.text


def test_the_contracts_checks_of_signatures_are_unknown_without_ssh_keygen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checks.a_signature_says_who().passed is None
    assert checks.a_signed_head_holds_the_ledger().passed is None
