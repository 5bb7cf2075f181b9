"""`spec show`: every value, and where it came from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from latentforge.cli import main
from latentforge.spec.resolve import ENVIRONMENT
from latentforge.verdicts import ExitCode


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*ENVIRONMENT, "ALPHA", "TEACHER_BACKEND"]:
        monkeypatch.delenv(name, raising=False)


def origins(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, tuple[object, str]]:
    assert main(["spec", "show", "--json", *arguments]) == 0
    values = json.loads(capsys.readouterr().out)["values"]
    return {field: (one["value"], one["origin"]) for field, one in values.items()}


def test_each_value_is_shown_with_its_origin(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("STEPS", "40")
    monkeypatch.setenv("ALPHA", "0.3")
    found = origins(capsys, "smoke", "--set", "seed=9")
    assert found["seed"] == (9, "flag")
    assert found["distill.steps"] == (40, "environment STEPS")
    assert found["distill.kd_weight"] == (0.7, "environment ALPHA")
    assert found["data.vocab_size"] == (2048, "file")
    assert found["distill.weight_decay"] == (0.01, "default")


def test_a_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("STEPS", "40")
    assert origins(capsys, "smoke", "--set", "distill.steps=7")["distill.steps"] == (7, "flag")


def test_the_table_says_what_was_decided_for_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spec", "show", "smoke", "--set", "distill.temperature=2.0"]) == 0
    shown = capsys.readouterr().out
    assert "distill.temperature" in shown
    assert "note: T = 2 is not in score.temperatures" in shown


def test_a_file_of_the_users_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.toml").write_text("[distill]\nsteps = 3\n")
    assert origins(capsys, str(tmp_path / "mine.toml"))["distill.steps"] == (3, "file")


@pytest.mark.parametrize(
    ("steps", "arguments", "said"),
    [
        ("5OO", ["smoke"], "STEPS='5OO' is not a whole number"),
        (None, ["smoke", "--set", "distill.stepz=3"], "distill.steps"),
        (None, ["smok"], "did you mean 'smoke'?"),
        (None, ["smoke", "--set", "profile=full"], "only fit for profile smoke"),
    ],
)
def test_what_does_not_parse_is_refused_never_a_default(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    steps: str | None,
    arguments: list[str],
    said: str,
) -> None:
    if steps is not None:
        monkeypatch.setenv("STEPS", steps)
    assert main(["spec", "show", *arguments]) == ExitCode.REFUSED
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_a_field_is_explained_with_its_default_and_what_is_off_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["spec", "explain", "latent"]) == 0
    told = capsys.readouterr().out.splitlines()
    for field, why in (
        ("mse_weight", "it blurs"),
        ("ce_weight", "are mixed"),
        ("kl_weight", "no chunk of the teacher"),
    ):
        at = told.index(f"latent.{field} = 0.0")
        assert "of the first LatentForge, off" in told[at + 1]
        assert why in told[at + 1]
    assert main(["spec", "explain", "data.chunk", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert (one["field"], one["default"]) == ("data.chunk", 1)
    assert main(["spec", "explain", "latent.mse_wieght"]) == ExitCode.REFUSED
    assert "did you mean 'latent.mse_weight'?" in capsys.readouterr().err
