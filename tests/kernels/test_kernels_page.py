"""docs/kernels.md names what there is, and every command that it shows is one that the command line takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from latentforge.cli import main
from latentforge.kernels import backends
from latentforge.kernels.guard import reasons

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "kernels.md").read_text(encoding="utf-8")
COMMANDS = sorted(set(re.findall(r"latentforge kernels (?:bench [a-z]+|[a-z]+)[^`\n]*", PAGE)))


def test_every_operator_has_its_section_with_every_heading() -> None:
    for op in backends.OPS:
        section = PAGE.partition(f"\n## {op}\n")[2].partition("\n## ")[0]
        assert section, op
        for heading in ("Shapes", "Bytes", "Operations", "Precision", "Determinism", "Refused"):
            assert f"**{heading}**" in section, f"{op} lacks {heading}"
        assert f"latentforge kernels bench {op.partition('_')[0] if op != 'latent_decode' else 'decode'}" in section
        assert "vs eager" in section or "Not measured at this size yet" in section, f"{op} has no table"


def test_every_backend_is_in_the_table_of_backends() -> None:
    section = PAGE.partition("\n## Backends\n")[2].partition("\n## ")[0]
    for backend in backends.BACKENDS:
        assert f"`{backend}`" in section


def test_what_was_not_run_is_not_claimed() -> None:
    for backend in ("cuda", "triton"):
        row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{backend}` |"))
        assert "**not run on a GPU**" in row


def test_the_falsifiers_it_names_exist() -> None:
    known = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "contracts").glob("*.yaml"))
    for name in set(re.findall(r"F-[A-Z]+-[A-Z]+-\d{3}", PAGE)):
        assert f"id: {name}\n" in known, name


def test_the_reasons_of_the_guard_are_where_the_page_says() -> None:
    assert reasons.__file__.endswith("latentforge/kernels/guard/reasons.py")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_that_it_shows_is_taken(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = command.split()[1:]
    # Options are checked against the help of the command that they are shown with.
    depth = 3 if words[1] == "bench" and len(words) > 2 and not words[2].startswith("-") else 2
    assert main([*words[:depth], "--help"]) == 0
    shown = capsys.readouterr().out
    for option in [word for word in words[depth:] if word.startswith("--")]:
        assert option in shown, f"{option} of {command}"
