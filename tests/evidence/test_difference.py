"""What changed between two runs: every value that differs is named, and none that does not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentforge.cli import main
from latentforge.errors import RefusedError
from latentforge.evidence.checks import planted_run
from latentforge.evidence.difference import ABSENT, Change, compare_runs
from latentforge.evidence.reading import read_run
from latentforge.verdicts import ExitCode


def changes(before: Path, after: Path) -> dict[str, dict[str, Change]]:
    sections = compare_runs(read_run(before), read_run(after))
    return {one.name: {change.what: change for change in one.changes} for one in sections}


def rewrite(path: Path, old: str, new: str) -> None:
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """Two runs that differ in their seed."""
    return planted_run(tmp_path / "a", seed=6), planted_run(tmp_path / "b", seed=7)


def test_only_what_differs_is_named(pair: tuple[Path, Path]) -> None:
    found = changes(*pair)
    assert found["asked for"] == {"seed": Change("seed", 6, 7)}
    assert found["in force"] == {"seed": Change("seed", 6, 7)}
    assert found["seeds"] == {"torch": Change("torch", 6, 7)}
    assert found["verdicts"] == found["identities"] == found["results"] == found["environment"] == {}
    assert "out/student/model.safetensors" not in found["files"]
    assert "identity.json" in found["files"]


@pytest.mark.parametrize(
    ("file", "old", "new", "section", "what"),
    [
        ("effective.json", '"learning_rate": 0.001', '"learning_rate": 0.002', "in force", "learning_rate"),
        ("effective.json", "dddd", "eeee", "identities", "extension.sha256"),
        ("effective.json", '"3.11.7"', '"3.12.0"', "environment", "versions.python"),
        ("effective.json", '"peak_memory_bytes": 268435456', '"peak_memory_bytes": 1', "cost", "peak_memory_bytes"),
        ("effective.json", '"train": 1.5e+18', '"train": 3e+18', "cost", "flops.train"),
        ("events.jsonl", '"outcome": "pass", "text"', '"outcome": "fail", "text"', "verdicts", "F-DISTILL-SMOKE-001"),
        ("events.jsonl", '"final": 3.04', '"final": 3.9', "verdicts", "F-DISTILL-SMOKE-001 measured.final"),
        ("events.jsonl", '"value": 3.04', '"value": 2.5', "results", "student val_loss heldout (kept)"),
        ("events.jsonl", '"code": 0', '"code": 5', "results", "code"),
        ("out/student/config.json", "320", "321", "files", "out/student/config.json"),
        ("out/student/config.json", "320", "321", "identities", "products.student"),
    ],
)
def test_a_change_is_named_under_its_subject(
    pair: tuple[Path, Path], file: str, old: str, new: str, section: str, what: str
) -> None:
    before, after = pair
    rewrite(after / file, old, new)
    assert what in changes(before, after)[section]
    assert what not in changes(*(planted_run(before.parent / name, seed=5 + n) for n, name in enumerate("xy")))[section]


def test_weights_of_a_run_and_of_its_inputs_are_told_apart_from_other_identities(pair: tuple[Path, Path]) -> None:
    for run, digest in zip(pair, ("1" * 64, "2" * 64), strict=True):
        effective = json.loads((run / "effective.json").read_text())
        tensors = {"model.safetensors": {"w": {"dtype": "F32", "shape": [1], "sha256": digest}}, "broken": None}
        effective["inputs"]["teacher"] = {"sha256": "3" * 64, "tensors": tensors}
        (run / "effective.json").write_text(json.dumps(effective))
    weights = pair[1] / "out/student/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    found = changes(*pair)
    assert set(found["tensors"]) == {"teacher: model.safetensors w", "out/student/model.safetensors embed.weight"}
    assert set(found["identities"]) == {"products.student"}


def test_what_one_run_lacks_is_absent_and_not_null(pair: tuple[Path, Path]) -> None:
    before, after = pair
    (after / "effective.json").unlink()
    change = changes(before, after)["in force"]["learning_rate"]
    assert (change.before, change.after) == (0.001, ABSENT)
    assert change.as_json() == {"what": "learning_rate", "before": 0.001}


def test_a_folder_is_not_compared_with_itself_and_two_copies_of_a_run_are(pair: tuple[Path, Path]) -> None:
    before, after = pair
    with pytest.raises(RefusedError, match="is compared with itself"):
        changes(before, before)
    copied = planted_run(before.parent.parent / "copy", seed=6)
    rewrite(copied / "out/student/config.json", "320", "321")
    assert set(changes(before, copied)["files"]) >= {"out/student/config.json"}
    (after / "identity.json").unlink()
    with pytest.raises(RefusedError, match=r"has no identity\.json"):
        changes(before, after)


def test_the_command_tells_people_and_programs(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    before, after = map(str, pair)
    rewrite(Path(after) / "effective.json", '"peak_memory_bytes": 268435456', '"peak_memory_bytes": 536870912')
    assert main(["evidence", "diff", before, after]) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[0] == f"{Path(before).name} → {Path(after).name}"
    assert "268435456 → 536870912  (× 2)" in said
    assert "the same: identities, environment, verdicts, results" in said
    assert main(["evidence", "diff", before, after, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["sections"]
    assert found["asked for"]["changed"] == [{"what": "seed", "before": 6, "after": 7}]
    assert found["asked for"]["same"] > 3
    assert main(["evidence", "diff", before, "distill-absent"]) == ExitCode.REFUSED
