"""`latentforge runs`: what is here, what the ledger names, what hosts hold; filtered, shown and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from latentforge.cli import main
from latentforge.errors import RefusedError
from latentforge.evidence.checks import planted_run, recorded_run
from latentforge.evidence.reading import read_run
from latentforge.history.comparing import ABSENT, compare
from latentforge.history.rows import Filter, Given, list_rows
from latentforge.verdicts import ExitCode

ON_HOST = "distill-" + "9" * 20


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two recorded runs, one that is not concluded yet; the laptop's own memory is empty."""
    folder = tmp_path / "runs"
    folder.mkdir()
    for seed in (6, 7):
        recorded_run(folder, seed=seed)
    planted_run(folder, seed=8)
    monkeypatch.setenv("EVIDENCE_DIR", str(folder))
    for name in ("XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    return folder


def listed(capsys: pytest.CaptureFixture[str], *options: str, code: int = 0) -> list[dict[str, Any]]:
    assert main(["runs", "list", "--json", *options]) == code
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["runs"]
    return found


def test_runs_of_the_folder_the_ledger_and_hosts_are_each_listed_once(runs: Path) -> None:
    first, *_ = sorted(path.name for path in runs.iterdir() if (path / "manifest.json").is_file())
    (runs / first).rename(runs / "elsewhere")
    here = [path.name for path in runs.iterdir() if path.name.startswith("distill-")]
    rows, problems = list_rows(runs, [Given(ON_HOST, "gx10", "2026-11-20T08:00:00+00:00"), Given(here[0], "gx10", "")])
    assert problems == []
    assert {row.run: row.where for row in rows} == {**dict.fromkeys(here, "here"), first: "ledger", ON_HOST: "host"}
    away = {row.run: row for row in rows}
    assert (away[first].outcome, away[first].asked, away[first].entry is None) == (None, None, False)
    assert (away[ON_HOST].host, away[ON_HOST].told) == ("gx10", f"latentforge dispatch collect {ON_HOST}")


def test_each_filter_leaves_what_it_says(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(listed(capsys)) == 3
    assert [row["asked"]["seed"] for row in listed(capsys, "--where", "seed=7")] == [7]
    assert len(listed(capsys, "--where", "learning_rate=1e-3", "--where", "distill.steps=2")) == 3
    assert listed(capsys, "--where", "steps=3") == listed(capsys, "--where", "absent=1") == []
    assert len(listed(capsys, "--kind", "distill")) == 3
    assert listed(capsys, "--kind", "latent") == listed(capsys, "--since", "2999-01-01") == []
    assert len(listed(capsys, "--host", "planted")) == 2
    assert len(listed(capsys, "--outcome", "PASS")) == 3
    assert len(listed(capsys, "--last", "1")) == 1


@pytest.mark.parametrize(
    ("option", "value", "told"),
    [
        ("--kind", "distil", "'distil' is none of data, teacher"),
        ("--outcome", "passed", "'passed' is none of fail, unknown, pass"),
        ("--since", "yesterday", "'yesterday' is no date or time"),
        ("--since", "9999-12-31T23:59:59-23:59", "'9999-12-31T23:59:59-23:59' is no date or time"),
        ("--since", "0001-01-01T00:00+14:00", "'0001-01-01T00:00+14:00' is no date or time"),
        ("--where", "steps", "'steps' is no FIELD=VALUE"),
        ("--where", "=3", "'=3' is no FIELD=VALUE"),
    ],
)
def test_a_filter_that_no_run_could_pass_is_refused_by_value(
    runs: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, told: str
) -> None:
    assert main(["runs", "list", option, value]) == ExitCode.REFUSED
    assert told in capsys.readouterr().err


def test_what_cannot_be_read_is_named_and_hides_no_other(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = next(path for path in runs.iterdir() if (path / "manifest.json").is_file())
    (one / "manifest.json").chmod(0o644)
    (one / "manifest.json").write_text('{"predicate": 3}')
    assert main(["runs", "list"]) == ExitCode.UNKNOWN
    told = capsys.readouterr()
    assert told.out.count("F-DISTILL-SMOKE-001 PASS") == 2
    assert f"UNKNOWN  {one.name}: its manifest.json says something else than is known here" in told.err


@pytest.mark.parametrize(
    "change",
    [
        lambda said: said["end"].update(record={"started": 1e20}),
        lambda said: said["end"].update(record={"started": 1.0, "seconds": "x"}),
        lambda said: said["end"].update(outcome="better"),
        lambda said: said.update(verdicts=[{}]),
        lambda said: said.update(host="x"),
        lambda said: said["configuration"].pop("requested"),
    ],
)
def test_a_manifest_of_another_shape_hides_no_other_run(
    runs: Path, capsys: pytest.CaptureFixture[str], change: Any
) -> None:
    one = next(path for path in runs.iterdir() if (path / "manifest.json").is_file())
    statement = json.loads((one / "manifest.json").read_text())
    change(statement["predicate"])
    (one / "manifest.json").chmod(0o644)
    (one / "manifest.json").write_text(json.dumps(statement))
    assert len(listed(capsys, code=ExitCode.UNKNOWN)) == 2


def test_text_of_a_run_cannot_steer_the_terminal(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in runs.glob("distill-*"):
        log = (path / "events.jsonl").read_text()
        (path / "events.jsonl").write_text(log.replace("val_loss 3.0400", "\\u001b[2J\\nforged"))
        assert main(["runs", "show", str(path)]) == 0
        told = capsys.readouterr().out
        assert "\x1b" not in told
        assert "\nforged" not in told


def test_no_name_of_a_run_can_steer_the_terminal_as_text_or_as_json(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two = sorted(str(path) for path in runs.glob("distill-*"))[:2]
    for number, path in enumerate(map(Path, two)):
        effective = json.loads((path / "effective.json").read_text())
        effective["timings"] = {"\x1b[2J\nforged": 1.5 + number}
        effective["flops"] = {"\u202e\x9b\U0001f600": 3.0}
        (path / "effective.json").write_text(json.dumps(effective))
    for command in (["show", two[0]], ["compare", *two], ["show", two[0], "--json"], ["compare", *two, "--json"]):
        assert main(["runs", *command]) == 0
        told = capsys.readouterr().out
        assert told.encode()
        assert "\x1b" not in told
        assert "\nforged" not in told
        assert all(one.isprintable() for one in told.splitlines())


def test_a_ledger_that_was_altered_is_said_and_the_folders_are_listed(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger = runs / "ledger.jsonl"
    ledger.chmod(0o644)
    ledger.write_bytes(ledger.read_bytes().replace(b'"entry":1', b'"entry":3'))
    assert len(listed(capsys, code=ExitCode.UNKNOWN)) == 3


def test_one_run_is_shown_with_verdicts_results_and_settings(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = next(path.name for path in runs.iterdir() if (path / "manifest.json").is_file())
    assert main(["runs", "show", run]) == 0
    told = capsys.readouterr().out
    assert "F-DISTILL-SMOKE-001 PASS val_loss 3.0400 < 4.9100 at step 2" in told
    assert "learning_rate  0.001" in told
    assert main(["runs", "show", run, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["held out, as saved"] == {
        "student val_loss": 3.04,
        "rows (sha256)": "not known",
    }


def test_runs_side_by_side_show_what_differs_and_all_of_it_if_asked(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = sorted(str(path) for path in runs.iterdir() if path.is_dir())
    seeds = [read_run(Path(one)).requested["seed"] for one in three]  # type: ignore[index]
    assert main(["runs", "compare", *three, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["lines"]
    assert found["asked for"] == {"seed": seeds}
    assert main(["runs", "compare", *three, "--json", "--all"]) == 0
    assert json.loads(capsys.readouterr().out)["lines"]["asked for"]["steps"] == [2, 2, 2]
    assert main(["runs", "compare", *three]) == 0
    assert "  seed" in capsys.readouterr().out


def test_held_out_values_of_other_rows_are_shown_with_the_rows_that_each_is_of(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    three = sorted(path for path in runs.iterdir() if path.is_dir())
    for path, digest in zip(three[:2], ("1" * 64, "2" * 64), strict=True):
        log = (path / "events.jsonl").read_text()
        (path / "events.jsonl").write_text(log.replace('"heldout"', f'"heldout", "rows_sha256": "{digest}"'))
    assert main(["runs", "compare", *map(str, three), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["lines"]["held out, as saved"]
    assert found == {"rows (sha256)": ["1" * 64, "2" * 64, "not known"]}


def test_what_a_run_does_not_have_is_no_value_of_it(runs: Path) -> None:
    first, second, *_ = sorted(path for path in runs.iterdir() if path.is_dir())
    (first / "effective.json").unlink()
    lines = {(one.subject, one.name): one.values for one in compare([read_run(first), read_run(second)])}
    assert lines["cost", "peak memory (bytes)"] == (ABSENT, 1 << 28)
    with pytest.raises(RefusedError, match="is compared with itself"):
        compare([read_run(first), read_run(first)])


def test_filters_ask_only_what_is_set() -> None:
    row = list_rows(Path("/nowhere"), [Given(ON_HOST, "gx10", "2026-11-20T08:00:00+02:00")])[0][0]
    assert row.began == "2026-11-20T06:00:00Z"
    assert Filter().takes(row)
    assert Filter(host="gx10", since="2026-11-20").takes(row)
    assert not Filter(since="2026-11-20T07:00").takes(row)
    assert Filter(since="0999-01-01").takes(row)
    assert not Filter(where=("steps=1",)).takes(row)
